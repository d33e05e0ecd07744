"""What one model expects of a text, byte by byte, whatever its tokens are."""

from __future__ import annotations

import codecs

from jaxtyping import Float

from multicolm.backend.base import Model
from multicolm.errors import InputError
from multicolm.exact.byte_session import ByteSession
from multicolm.types import Tensor

__all__ = ["next_byte_logprobs", "span_logprob"]


def next_byte_logprobs(model: Model, prefix: str | bytes) -> Float[Tensor, "257"]:
    """What the model expects after a text, byte by byte, under the exact byte bridge.

    Marginal over all tokens that spell the text, as :mod:`multicolm.exact.lattice` defines
    it. The text begins as the tokenizer begins texts. Where it puts nothing in front, the
    first token of the text's own encoding is taken for certain: nothing predicts it.

    Args:
        model: whose tokens may spell it.
        prefix: the text; as bytes it may end within a character.

    Returns:
        Natural logs for the 256 bytes and, the last one, for the end of the text.

    Raises:
        InputError: if nothing comes before the first prediction, the model cannot write the
            text, or it is neither text nor bytes.
        VocabularyError: if the bridge does not cover the tokenizer.
    """
    session = _read(model, _as_bytes(prefix, "the prefix"))
    logprobs: Float[Tensor, "257"] = session.next_byte_logprobs([0])[0]
    return logprobs


def span_logprob(model: Model, prefix: str | bytes, span: str | bytes) -> float:
    """How likely the model finds some text or bytes after a text, in nats.

    Args:
        model: whose tokens may spell it.
        prefix: the text, as in :func:`next_byte_logprobs`.
        span: what follows; it need not end where a token or a character does.

    Raises:
        InputError: as :func:`next_byte_logprobs`.
        VocabularyError: if the bridge does not cover the tokenizer.
    """
    prefix, span = _as_bytes(prefix, "the prefix"), _as_bytes(span, "the span")
    session = _read(model, prefix)
    before = session.logprob(0)
    if before == float("-inf"):
        raise InputError(
            f"model '{model.name}' cannot write the {len(prefix)} bytes before the span."
        )
    session.feed([0], [span])
    return session.logprob(0) - before


def _read(model: Model, prefix: bytes) -> ByteSession:
    session = ByteSession(model, 1, prune=0.0)
    start = model.tokenizer.encode("")
    given = [] if start else model.tokenizer.encode_continuation(_characters(prefix))[:1]
    session.begin(0, start, given)
    taken = model.tokenizer.decode(given)
    if not prefix.startswith(taken):
        raise InputError(
            f"model '{model.name}' cannot write a text that begins with {prefix[:8]!r}: its "
            "tokenizer turns it into another one; normalise the text first."
        )
    session.feed([0], [prefix[len(taken) :]])
    return session


def _as_bytes(text: str | bytes, what: str) -> bytes:
    """A text in UTF-8, or bytes as they are.

    Raises:
        InputError: if it is neither, or no Unicode.
    """
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    if not isinstance(text, str):
        raise InputError(f"{what} is a {type(text).__name__}; allowed are text and bytes.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} is not valid Unicode at character {error.start}; read it as UTF-8 first."
        ) from error


def _characters(content: bytes) -> str:
    """The characters of a text that may break off within one."""
    return codecs.getincrementaldecoder("utf-8")("ignore").decode(content)
