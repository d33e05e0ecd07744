"""One policy at work, for texts that come and go."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from multicolm.config import GenerationConfig
from multicolm.decoding.loop import loop_for
from multicolm.decoding.plan import Plan
from multicolm.decoding.prompts import prompt_ids
from multicolm.decoding.row import Row, Written
from multicolm.decoding.runner import Runner
from multicolm.decoding.sampling import Sampling, row_key
from multicolm.decoding.text import TextStream
from multicolm.decoding.thinking import Thinking
from multicolm.errors import CapabilityError, InputError, ModelError
from multicolm.exact.byte_vocabulary import ByteVocabulary
from multicolm.exact.character_vocabulary import CharacterVocabulary
from multicolm.policy.base import Schedule
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.incremental import IncrementalEncoder
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import MIXTURE, Alternative, Answer, Piece, Prompt, Trace, TracedToken, Usage

__all__ = ["Live"]

_BLANKS = 8  # maximum number of tokens of blank space after a marker at the end of a prompt


class Live:
    """One policy at work: texts may come and go while others are written.

    What is written for a prompt depends on the prompt, its settings and its seed, and on nothing
    else: not on which other texts there are, when it came, or who left. It is not safe to use from
    two threads at a time.

    Args:
        plan: the policy and its models.
        vocabulary: the tokens of prompts and of traces; what is written in, unless that is bytes
            or characters.
        name: the policy's, for answers.
        runner: runs the models, and has the places of the texts that are written; others wait.
        schedule: how models are run; ``None`` takes what suits the policy and its models.
        block_size: tokens that the base model drafts at a time under ``block``.

    Attributes:
        loop: the decode loop itself.
    """

    def __init__(
        self,
        plan: Plan,
        vocabulary: Vocabulary,
        name: str,
        runner: Runner,
        *,
        schedule: Schedule | None = None,
        block_size: int = 8,
    ) -> None:
        self._models = plan.models
        self._names = plan.names
        self._vocabulary = vocabulary
        self._policy = policy = plan.policy
        self._written_in = written_in = plan.vocabulary
        self._name = name
        self._used = plan.used
        self._runner = runner
        drafts = (schedule or plan.schedule) == "block"
        # Elsewhere what the base model drafts is not in the others' tokens, or in tokens at all.
        own = written_in is vocabulary and (policy.support == "shared" or vocabulary.is_shared)
        # What is remembered after a token is known once the token is, and whether it ends thoughts.
        by_token = policy.keeps_state or policy.reads_thinking
        self._block_size = block_size if drafts and own and not by_token else 1
        self.loop = loop_for(plan, runner, self._block_size)

    @property
    def busy(self) -> bool:
        """Whether any text is being written or waits for it."""
        return self.loop.busy

    def row(self, prompt: Prompt, number: int, wanted: GenerationConfig, seed: int) -> Row:
        """A text to be written; it is not begun before it is added.

        Args:
            prompt: text, a chat, or token ids of the shared vocabulary.
            number: for messages (``prompt 1`` is number 0), and in what is written.
            wanted: how it is written; ``schedule`` and ``block_size`` are those of all.
            seed: of everything random.

        Raises:
            InputError: if the prompt is empty, or longer than a context.
            CapabilityError: if tokens are to be drawn that a server does not return, or
                alternatives to tokens are wanted of a policy that does not write in tokens.
        """
        sampling = _sampling(wanted.temperature, wanted.top_k, wanted.top_p)
        self._check_draws(sampling)
        self._check_alternatives(wanted.top_logprobs)
        ids = prompt_ids(prompt, number, self._models, self._vocabulary, self._used)
        in_tokens = self._written_in is self._vocabulary
        return Row(
            number=number,
            prompt=prompt,
            prompt_ids=ids,
            key=row_key(seed, ids[self._used[0]]),
            seed=seed,
            max_new_tokens=wanted.max_new_tokens,
            text=TextStream(wanted.stop, self._thinking(wanted, ids)),
            draft_length=self._block_size,
            sampling=sampling,
            models=self._used,
            thinking_token_budget=wanted.thinking_token_budget,
            end_of_thinking=self._end_of_thinking(wanted),
            n_alternatives=wanted.top_logprobs,
            meter=None if in_tokens else IncrementalEncoder(self._models[0].tokenizer),
        )

    def _thinking(self, wanted: GenerationConfig, ids: Sequence[Sequence[int]]) -> Thinking | None:
        """What tells the thoughts of a text from its answer, if it may have any."""
        if wanted.think_end_token is None:
            return None
        start = wanted.think_start_token
        ends = (self._prompt_end(k, ids[k], len(start.encode())) for k in self._used)
        is_open = any(end.rstrip().endswith(start) for end in ends)
        return Thinking(start, wanted.think_end_token, is_open=is_open)

    def _prompt_end(self, k: int, ids: Sequence[int], n_bytes: int) -> str:
        """The end of a prompt, as text and names of special tokens."""
        tokenizer = self._models[k].tokenizer
        tail = [
            (tokenizer.special_name(token) or "").encode() or tokenizer.token_bytes(token)
            for token in ids[-(n_bytes + _BLANKS) :]
        ]
        return b"".join(tail).decode(errors="replace")

    def _end_of_thinking(self, wanted: GenerationConfig) -> list[int]:
        """The tokens that end the thoughts of a text whose budget is used up.

        Raises:
            CapabilityError: if the policy writes in characters.
        """
        end = wanted.think_end_token
        if wanted.thinking_token_budget is None or end is None:
            return []
        vocabulary, tokenizer = self._written_in, self._models[0].tokenizer
        own = tokenizer.encode_rendered(end)[len(tokenizer.encode("")) :]
        if isinstance(vocabulary, ByteVocabulary):
            return list(end.encode())
        if isinstance(vocabulary, BridgedVocabulary):
            return vocabulary.ids_of(0, own)
        if isinstance(vocabulary, CharacterVocabulary):
            raise CapabilityError(
                f"policy '{self._name}' writes in characters, and cannot be made to stop thinking; "
                "leave `thinking_token_budget` out."
            )
        return own

    def _check_draws(self, sampling: Sampling) -> None:
        """Refuse to draw from a distribution of which a part is not known."""
        if sampling.greedy or self._policy.acts == "mix":
            return
        for k in self._used:
            model, known = self._models[k], self._models[k].max_top_logprobs
            if known is None or (sampling.top_k is not None and sampling.top_k <= known):
                continue
            way = f"set `top_k` to {known} or less" if known else "set `temperature: 0`"
            raise CapabilityError(
                f"policy '{self._name}' lets model '{model.name}' draw tokens, and its server "
                f"{model.server} returns the probability of {known or 'none'} of them: {way}."
            )

    def _check_alternatives(self, n: int) -> None:
        """Refuse alternatives to tokens where no tokens are written."""
        if n and self._written_in is not self._vocabulary:
            raise CapabilityError(
                f"policy '{self._name}' writes in {self._policy.support}, and has no alternatives "
                f"to the tokens that these come to; top_logprobs must be 0, got {n}."
            )

    def resume(self, row: Row, written: Sequence[tuple[int, int]]) -> None:
        """Let a text that is not begun go on after tokens that it has already.

        They count as written, towards the longest text and in what it holds; if they end it, it is
        finished and must not be added.

        Args:
            row: of :meth:`row`; the policy writes tokens.
            written: tokens of the ensemble's vocabulary, and the index of each one's writer.
        """
        self.loop.resume(row, [Written(token, writer, 0.0, None) for token, writer in written])

    def add(self, row: Row) -> None:
        """Let a text be written as soon as there is a slot for it."""
        self.loop.add(row)

    def cancel(self, row: Row) -> None:
        """Write no further in a text; its slot is free at once."""
        self.loop.cancel(row)

    def step(self) -> list[Piece]:
        """One round of the loop; see :meth:`multicolm.decoding.loop.Loop.step`.

        Raises:
            InputError: if a model cannot read one of the texts.
            ModelError: if a model failed in one of the texts.
        """
        [pieces] = self._runner.run([self.loop.step()])
        for _, error in self.failed():
            raise error
        return pieces

    def failed(self) -> list[tuple[Row, InputError | ModelError]]:
        """The texts in which a model failed since this was asked last, and why."""
        failed = list(self.loop.failed)
        self.loop.failed.clear()
        return failed

    def finished(self) -> list[Row]:
        """The texts that were finished since this was asked last."""
        rows = list(self.loop.finished)
        self.loop.finished.clear()
        return rows

    @property
    def usage(self) -> dict[str, Usage]:
        """Per model, what it did for all texts so far; what they have written is not counted."""
        readers = self.loop.readers.opened
        return {
            name: readers[k].usage if k in readers else Usage()
            for k, name in enumerate(self._names)
        }

    def tokens(self, row: Row, first: int = 0) -> list[TracedToken]:
        """The tokens of a text from number ``first`` on, as far as they are certain by now.

        Of a text that is written in bytes or characters, tokens are those of the base model, and
        certain a little later than its characters.
        """
        names = [*self._names, MIXTURE]
        written = row.written if row.meter is None else self._as_tokens(row, row.meter)
        name = self._vocabulary.name
        return [
            TracedToken(
                new.token,
                name(new.token),
                names[new.writer],
                new.logprob,
                new.score,
                tuple(Alternative(i, name(i), logprob) for i, logprob in new.alternatives),
            )
            for new in written[first:]
        ]

    def answer(self, row: Row) -> Answer:
        """The answer of a text that is finished."""
        assert row.finish_reason is not None
        tokens = self.tokens(row)
        n_written = dict.fromkeys([*self._names, MIXTURE], 0)
        for token in tokens:
            n_written[token.model] += 1
        return Answer(
            prompt=row.prompt,
            text=row.text.text,
            trace=Trace(tuple(tokens)),
            usage={
                name: replace(row.usage[k], tokens_written=n_written[name])
                for k, name in enumerate(self._names)
            },
            finish_reason=row.finish_reason,
            policy=self._name,
            seed=row.seed if row.noise_used else None,
            reasoning_content=row.text.reasoning if row.text.content_start else None,
            content_start=row.text.content_start,
        )

    def _as_tokens(self, row: Row, meter: IncrementalEncoder) -> list[Written]:
        """A text of bytes or characters as tokens of the base model.

        Each has the probability of what was written since the one before; what ends within a
        token counts to it.
        """
        done = row.finish_reason is not None
        n_certain = len(meter.ids) if done else meter.stable
        sizes = [len(self._written_in.token_bytes(new.token)) for new in row.written]
        ends = list(accumulate(sizes))
        tokens, first = [], 0
        for token, end in zip(meter.ids[:n_certain], meter.ends, strict=False):
            last = max(first, bisect_right(ends, end))
            logprob = sum(new.logprob for new in row.written[first:last])
            writer = row.written[min(last, len(row.written)) - 1].writer
            tokens.append(Written(token, writer, logprob, None))
            first = last
        end_ids = self._vocabulary.end_ids(0) or self._vocabulary.end_ids(None)
        text_ends = self._written_in.end_ids(None)
        for new in row.written[first:] if done else ():
            if new.token in text_ends and end_ids:
                tokens.append(replace(new, token=min(end_ids)))
        return tokens


@lru_cache(maxsize=256)
def _sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    """Equal settings are one object, so that the loop sees at a glance that they are equal."""
    return Sampling(temperature, top_k, top_p)
