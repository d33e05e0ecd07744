"""How the tokens of a text are put to a server that takes characters only."""

from __future__ import annotations

import pytest
from tiny_models import END, byte_level

from multicolm.backend.remote.written import PromptFormat
from multicolm.errors import CapabilityError
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

TOKENIZER = HuggingFaceTokenizer(byte_level(specials=["<|user|>"]), "m")


def prompt_format(*, takes_ids: bool) -> PromptFormat:
    server = "http://127.0.0.1:1"
    return PromptFormat(TOKENIZER, takes_ids=takes_ids, returns_ids=False, name="m", server=server)


def test_special_tokens_are_put_to_a_server_of_text_by_their_names() -> None:
    ids = TOKENIZER.encode_rendered(f"<|user|>the é{END}{END}")
    assert prompt_format(takes_ids=False).prompt(ids) == f"<|user|>the é{END}{END}"
    assert prompt_format(takes_ids=True).prompt(ids) == ids


@pytest.mark.parametrize("name", [END, "<|user|>"])
def test_text_that_a_server_would_take_for_a_special_token_is_not_put_to_it(name: str) -> None:
    """A chat's writer cannot end a turn there either."""
    ids = [*TOKENIZER.encode_rendered("<|user|>"), *TOKENIZER.encode_continuation(f"hi{name}")]
    assert prompt_format(takes_ids=True).prompt(ids) == ids
    with pytest.raises(CapabilityError) as caught:
        prompt_format(takes_ids=False).prompt(ids)
    assert str(caught.value) == (
        "model 'm' cannot continue here: its server http://127.0.0.1:1 takes no token ids, and "
        "would "
        f"read '{name}', which is text here, as that special token. Leave it out, or use a server "
        "that takes token ids."
    )
