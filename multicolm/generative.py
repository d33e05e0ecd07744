"""An ensemble that stands where a model of the transformers library is expected to generate.

model = multicolm.as_transformers(ensemble, "cosd-rule")
inputs = model.tokenizer(["What is Dulerex made from?"], return_tensors="pt", padding=True)
model.generate(**inputs, max_new_tokens=32, streamer=TextStreamer(model.tokenizer))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.generation.utils import GenerateDecoderOnlyOutput

from multicolm.backend.base import Model
from multicolm.backend.transformers import TransformersModel
from multicolm.decoding.streaming import Stream
from multicolm.ensemble import Ensemble, PolicySource
from multicolm.errors import CapabilityError, InputError
from multicolm.numbers import check_seed
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer
from multicolm.types import Answer

__all__ = ["GenerativeEnsemble", "Streamer", "as_transformers"]


@runtime_checkable
class Streamer(Protocol):
    """What takes tokens while they are written, such as transformers' ``TextStreamer``."""

    def put(self, value: Tensor) -> object:
        """Take the prompt, [1, time], or then one token, [1]."""

    def end(self) -> object:
        """There are no more."""


_LENGTHS = ("max_length", "max_new_tokens")
_HONOURED = (
    "do_sample",
    "max_length",
    "max_new_tokens",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
    "stop_strings",
    "temperature",
    "top_k",
    "top_p",
)
# What other fields may be, for then they ask for nothing; and those that say what is so anyway.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "diversity_penalty": (0.0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "length_penalty": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "output_scores": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "use_cache": (True, False),
}
_OF_NO_MATTER = ("bos_token_id", "eos_token_id", "is_assistant", "transformers_version")


class GenerativeEnsemble:
    """An ensemble under one policy, with the ``generate`` of a transformers model.

    With ``policy="single"`` it writes what the base model's own ``generate`` writes, token for
    token, in batches and after left padding too.

    Where it cannot stand for a model:

    - It has no ``forward``: there are no logits to train on or to score; see ``multicolm score``.
    - It does not move: every model has its device from the ensemble file.
    - It searches no beams, and takes no logits processors, stopping criteria, penalties or
      assistant models: a policy decides how models work together, and a field of the generation
      configuration that it does not honour is refused by name.
    - All models read the ids of the prompt, so a chat is read by all in the base model's template;
      :meth:`multicolm.Ensemble.generate` lets each read it in its own.

    Attributes:
        ensemble: that writes.
        policy: decides who writes.
        config: the base model's, of the transformers library; ``None`` for other backends.
        generation_config: what is not said in a call.
        tokenizer: the base model's, of the transformers library; ``None`` for other backends.
        device: where prompts may come from and texts go: that of the base model.
        dtype: the type that the base model computes in.
    """

    main_input_name = "input_ids"
    framework = "pt"
    input_modalities = ("text",)
    output_modalities = ("text",)

    def __init__(self, ensemble: Ensemble, policy: PolicySource | None = None) -> None:
        self.ensemble = ensemble
        self.policy = ensemble.resolve(policy)
        ensemble.check(self.policy)
        base: Model = ensemble.backends[0]
        self._base = base
        self._ends = sorted(ensemble.vocabulary.end_ids(0))
        self.config: PretrainedConfig | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        if isinstance(base, TransformersModel):
            self.config = base.model.config
            self.tokenizer = cast("HuggingFaceTokenizer", base.tokenizer).tokenizer
            self.device, self.dtype = base.device, base.dtype
        own = ensemble.generation
        self.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=own.max_new_tokens,
            do_sample=own.temperature > 0,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad_id(),
            **({"stop_strings": list(own.stop)} if own.stop else {}),
            **({"temperature": own.temperature} if own.temperature else {}),
            **({"top_k": own.top_k} if own.top_k and own.temperature else {}),
            **({"top_p": own.top_p} if own.top_p and own.temperature else {}),
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Streamer | None = None,
        seed: int | None = None,
        batch_size: int = 16,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Write on after prompts of token ids.

        Args:
            inputs: the same as ``input_ids``.
            generation_config: in the place of :attr:`generation_config`. Honoured are
                ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_k``,
                ``top_p``, ``num_return_sequences``, ``stop_strings`` (which stay in the text),
                ``pad_token_id`` and ``return_dict_in_generate``. What is not said is not applied:
                no ``top_k`` of 50 as in transformers.
            input_ids: prompts in the base model's ids, [rows, time], padded on the left.
            attention_mask: 0 at padding, [rows, time]; without it nothing is padding.
            streamer: gets the prompt, then the tokens of one text as they become certain.
            seed: of everything random; drawn from torch's global generator if not given, so that
                ``transformers.set_seed`` makes runs repeatable.
            batch_size: how many texts are written at a time.
            **kwargs: fields of the generation configuration, in its place.

        Returns:
            Prompts with their padding and after them the texts, their ends included, padded on
            the right: [rows * num_return_sequences, time]. In shared vocabularies the tokens are
            those that were written; otherwise, the base model's tokens of the text.

        Raises:
            InputError: if a prompt is empty or padded elsewhere, or a setting out of range.
            CapabilityError: if something is asked for that an ensemble does not do.
        """
        prompts = _one_of(inputs, input_ids)
        wanted = self._wanted(generation_config, kwargs)
        n_each = wanted.num_return_sequences or 1
        if streamer is not None and prompts.shape[0] * n_each > 1:
            raise InputError("a streamer takes one text; give one prompt, or no streamer.")
        rows = [ids for ids in _without_padding(prompts, attention_mask) for _ in range(n_each)]
        seed = int(torch.randint(2**31 - 1, (1,))) if seed is None else check_seed(seed)
        settings = self._settings(wanted, prompts.shape[1])
        stream = self.ensemble.stream(
            rows,
            self.policy,
            seed=[seed + i for i in range(len(rows))],
            batch_size=batch_size,
            **settings,
        )
        with stream:
            if streamer is None:
                for _ in stream:
                    pass
            else:
                self._stream(stream, prompts, streamer)
        texts = [self._ids(answer) for answer in stream.answers]
        pad = wanted.pad_token_id if wanted.pad_token_id is not None else self._pad_id()
        sequences = _joined(prompts.repeat_interleave(n_each, dim=0), texts, pad)
        if wanted.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast("torch.LongTensor", sequences))
        return sequences

    def can_generate(self) -> bool:
        """That is what it is for."""
        return True

    def eval(self) -> GenerativeEnsemble:
        """Itself: it is never in training mode."""
        return self

    def to(self, device: str | torch.device) -> GenerativeEnsemble:
        """Itself, if it is there already.

        Raises:
            CapabilityError: if it is not; models are placed by the ensemble file.
        """
        if torch.device(device) != self.device:
            raise CapabilityError(
                f"an ensemble does not move to {device}: each model has its own `device:` in the "
                "ensemble file."
            )
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuse to be called.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(
            "an ensemble has no single forward pass; call generate, or score a corpus with "
            "`multicolm score`."
        )

    def _pad_id(self) -> int:
        """What texts are padded with if nobody says: the tokenizer's own, or an end of text."""
        own = None if self.tokenizer is None else self.tokenizer.pad_token_id
        if isinstance(own, int):
            return own
        return self._ends[0] if self._ends else 0

    def _wanted(
        self, given: GenerationConfig | None, kwargs: Mapping[str, Any]
    ) -> GenerationConfig:
        """The configuration of a call.

        Raises:
            CapabilityError: naming what is not honoured.
            InputError: if settings contradict each other.
        """
        wanted = copy.deepcopy(self.generation_config if given is None else given)
        kwargs = dict(kwargs)
        # Stop strings are found in the text itself, without a tokenizer.
        kwargs.pop("tokenizer", None)
        # As in transformers, None is nothing that is said.
        kwargs = {k: v for k, v in kwargs.items() if v is not None or k not in _LENGTHS}
        if "max_length" in kwargs and "max_new_tokens" not in kwargs:
            wanted.max_new_tokens = None  # What the call says goes before what it does not.
        try:
            strange = wanted.update(**kwargs)  # type: ignore[no-untyped-call]
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"generate: these settings contradict each other: {reason}") from error
        asked = {**wanted.to_diff_dict(), **strange}
        for name, value in asked.items():
            neutral = value is None or value in _NEUTRAL.get(name, ())
            if name not in (*_HONOURED, *_OF_NO_MATTER) and not neutral:
                raise CapabilityError(
                    f"generate({name}={value!r}): an ensemble does not do this; it honours "
                    f"{', '.join(_HONOURED)}."
                )
        ends = wanted.eos_token_id
        if ends is not None and {*([ends] if isinstance(ends, int) else ends)} != {*self._ends}:
            raise CapabilityError(
                f"generate(eos_token_id={ends!r}): every model ends a text with its own tokens, "
                f"the base model with {self._ends}; give stop_strings for other ends."
            )
        if given is not None and not {*_LENGTHS} & {*asked}:
            wanted.max_new_tokens = self.generation_config.max_new_tokens
        return wanted

    def _settings(self, wanted: GenerationConfig, width: int) -> dict[str, Any]:
        """The configuration as :meth:`multicolm.Ensemble.generate` takes it."""
        n_new = wanted.max_new_tokens
        if n_new is None:
            n_new = wanted.max_length - width
            if n_new < 1:
                raise InputError(
                    f"max_length is {wanted.max_length}, and the prompts have {width} tokens "
                    "already; give max_new_tokens."
                )
        settings: dict[str, Any] = {"max_new_tokens": n_new, "temperature": 0.0}
        stop = wanted.stop_strings or ()
        # An empty tuple is a setting of its own: no stop strings of the ensemble's.
        settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if wanted.do_sample:
            settings["temperature"] = 1.0 if wanted.temperature is None else wanted.temperature
            settings["top_k"] = wanted.top_k or None
            settings["top_p"] = wanted.top_p
        return settings

    def _stream(self, stream: Stream, prompts: Tensor, streamer: Streamer) -> None:
        """Hand over the prompt, and the tokens as they become certain."""
        streamer.put(prompts.cpu())
        n_told = 0
        # Pieces of text and tokens come apart where there are several vocabularies, and after a
        # token that the base model does not have, the whole text is put in its tokens.
        is_told = self._is_written_in_base_ids() and self._has_all_texts()
        for _ in stream:
            if is_told:
                ids = [self._in_base_ids(token) for token in stream.token_ids(0)]
                n_told = self._tell(ids, n_told, streamer)
        [answer] = stream.answers
        self._tell(self._ids(answer), n_told, streamer)
        streamer.end()

    def _tell(self, ids: Sequence[int], n_told: int, streamer: Streamer) -> int:
        for token in ids[n_told:]:
            streamer.put(torch.tensor([token]))
        return len(ids)

    def _is_written_in_base_ids(self) -> bool:
        return self.ensemble.vocabulary.is_shared and self.policy.support in ("shared", "union")

    def _is_own(self, token: int) -> bool:
        return token < self._base.tokenizer.n_tokens

    def _has_all_texts(self) -> bool:
        """Whether whatever is written, but for ends of text, is written in own tokens."""
        vocabulary = self.ensemble.vocabulary
        others = range(self._base.tokenizer.n_tokens, vocabulary.size)
        return {*others} <= vocabulary.end_ids(None)

    def _in_base_ids(self, token: int) -> int:
        """A token of the text; another model's end of it is the base model's."""
        is_end = token in self.ensemble.vocabulary.end_ids(None)
        return self._ends[0] if is_end and token not in self._ends and self._ends else token

    def _ids(self, answer: Answer) -> list[int]:
        """A text in the base model's ids, its end included."""
        ids = [self._in_base_ids(token.id) for token in answer.trace]
        if self._is_written_in_base_ids() and all(map(self._is_own, ids)):
            return ids
        ids = self._base.tokenizer.encode_continuation(answer.text) if answer.text else []
        return [*ids, *self._ends[:1]] if answer.finish_reason == "eos" else ids


def as_transformers(ensemble: Ensemble, policy: PolicySource | None = None) -> GenerativeEnsemble:
    """An ensemble with the ``generate`` of a transformers model.

    Args:
        ensemble: that writes.
        policy: decides who writes; the ensemble's own if not given.

    Raises:
        CapabilityError: if the policy does not fit the ensemble.
        ConfigError: if there is no such policy.
    """
    return GenerativeEnsemble(ensemble, policy)


def _one_of(inputs: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """The prompts, by whichever name they were given.

    Raises:
        InputError: if they were not, twice, or not as rows of ids.
    """
    if (inputs is None) == (input_ids is None):
        raise InputError(
            "generate takes prompts of token ids: give `input_ids`, and give them once."
        )
    prompts = inputs if input_ids is None else input_ids
    assert prompts is not None
    counts = not (prompts.is_floating_point() or prompts.dtype == torch.bool)
    if prompts.ndim != 2 or not counts or 0 in prompts.shape:
        raise InputError(
            f"input_ids have shape {list(prompts.shape)} and type {prompts.dtype}; expected whole "
            "numbers, [rows, time]."
        )
    return prompts


def _without_padding(prompts: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row's own tokens.

    Raises:
        InputError: if a row is padded elsewhere than on the left, or is nothing but padding.
    """
    if mask is None:
        return [list(row) for row in prompts.tolist()]
    if mask.shape != prompts.shape:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}, and input_ids {list(prompts.shape)}."
        )
    rows = []
    for number, (ids, flags) in enumerate(zip(prompts.tolist(), mask.tolist(), strict=True)):
        n_padding = next((i for i, flag in enumerate(flags) if flag), len(flags))
        if not all(flags[n_padding:]):
            raise InputError(
                f"row {number} of input_ids is not padded on the left; set the tokenizer's "
                "padding_side to 'left'."
            )
        if n_padding == len(flags):
            raise InputError(f"row {number} of input_ids is nothing but padding; give a prompt.")
        rows.append(ids[n_padding:])
    return rows


def _joined(prompts: Tensor, texts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Prompts and after them the texts, padded on the right: [rows, time]."""
    width = max(map(len, texts))
    padded = [[*ids, *[pad] * (width - len(ids))] for ids in texts]
    new = torch.tensor(padded, dtype=prompts.dtype, device=prompts.device).reshape(-1, width)
    return torch.cat([prompts, new], dim=1)
