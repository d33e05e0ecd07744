"""One text while it is being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float, Shaped
from torch import Tensor

from multicolm.decoding.sampling import Likeliest, Sampling
from multicolm.decoding.text import TextStream
from multicolm.errors import InputError, ModelError
from multicolm.tokenizer.incremental import IncrementalEncoder
from multicolm.types import FinishReason, Pooling, Prompt, Usage

__all__ = ["Row", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
    """One written token.

    Attributes:
        token: its id in the shared vocabulary.
        writer: index of its model; the number of models for a mixture.
        logprob: in nats, under the writer's distribution.
        score: the number the policy decided on, if it gives one.
        alternatives: the likeliest tokens of that distribution, the likeliest first.
    """

    token: int
    writer: int
    logprob: float
    score: float | None
    alternatives: Likeliest = ()


@dataclass(eq=False, slots=True)
class Row:
    """One text while it is being written.

    Attributes:
        number: which prompt of the call it answers.
        prompt: what was asked, as given.
        prompt_ids: per model, what it reads before the text.
        key: what its randomness depends on.
        seed: what the user seeded it with; ``None`` when nothing is random.
        max_new_tokens: the most tokens that it may get.
        text: the text as it is shown.
        draft_length: how many tokens the base model drafts at a time.
        sampling: how its tokens are drawn.
        thinking_token_budget: the most tokens that it may think; ``None`` if that is not limited.
        end_of_thinking: tokens that are written when it has, until they are.
        n_alternatives: how many of the likeliest tokens are kept with each written one.
        prompt_mean_nll: per model, how unlikely it finds its prompt, for policies that look at
            prompts, in nats per token of the base model's prompt; NaN for models not in use.
        models: indices of the models that may be run or write in it, ascending.
        prompt_hidden: per model index and pooling, its hidden state of the prompt, where the
            policy reads it.
        state: what the policy remembers of it, if it keeps state.
        drafter: index of the model whose tokens follow the written ones.
        beside: indices of models that are run with the base model for the next token, since they
            were wanted for the last one.
        slot: its place in every session.
        ids: written tokens and, after them, drafted ones.
        written: the written tokens.
        base_run: how many tokens the base model has written in a row at the end.
        n_deferred: written tokens at which the policy deferred.
        n_changed: those among them that the draft did not have.
        lengths: per model, prompt and written tokens in its own tokens.
        meter: of a text of bytes, counts the base model's tokens in it.
        usage: per model, what it did.
        noise_used: whether anything random has had a part in the text.
        is_paused: whether it keeps its place and is written no further for now.
        finish_reason: why it ended; ``None`` while it is written.
        error: why it cannot continue, if a model failed in this text alone.
    """

    number: int
    prompt: Prompt
    prompt_ids: Sequence[Sequence[int]]
    key: int
    seed: int | None
    max_new_tokens: int
    text: TextStream
    draft_length: int
    sampling: Sampling
    thinking_token_budget: int | None = None
    end_of_thinking: Sequence[int] = ()
    n_alternatives: int = 0
    slot: int = -1
    drafter: int = 0
    beside: frozenset[int] = frozenset()
    ids: list[int] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    prompt_mean_nll: list[float] = field(default_factory=list)
    models: tuple[int, ...] = ()
    prompt_hidden: dict[tuple[int, Pooling], Float[Tensor, "hidden"]] = field(default_factory=dict)
    state: Shaped[Tensor, "width"] | None = None
    base_run: int = 0
    n_deferred: int = 0
    n_changed: int = 0
    lengths: list[int] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)
    meter: IncrementalEncoder | None = None
    noise_used: bool = False
    is_paused: bool = False
    finish_reason: FinishReason | None = None
    error: InputError | ModelError | None = None

    def __post_init__(self) -> None:
        self.lengths = [len(ids) for ids in self.prompt_ids]
        self.usage = [Usage() for _ in self.prompt_ids]

    @property
    def prompt_length(self) -> int:
        """How many tokens ``prompt_mean_nll`` are per."""
        return max(1, len(self.prompt_ids[0]) - 1)

    @property
    def previous(self) -> int:
        """Who wrote the last token; -1 if there is none."""
        return self.written[-1].writer if self.written else -1

    @property
    def n_tokens(self) -> int:
        """How many tokens were written; of a text of bytes, in the base model's tokens."""
        return len(self.written) if self.meter is None else len(self.meter.ids)

    @property
    def thinking_is_used_up(self) -> bool:
        """Whether it has to stop thinking."""
        budget = self.thinking_token_budget
        return (
            budget is not None
            and self.n_tokens >= budget
            and bool(self.end_of_thinking)
            and self.text.has_open_thoughts
        )

    @property
    def n_drafted(self) -> int:
        """How many drafted tokens follow the written ones."""
        return len(self.ids) - len(self.written)

    @property
    def deferral_ends_drafts(self) -> bool:
        """Whether deferral has meant another token in half of the cases or more, so far."""
        return 2 * (self.n_changed + 1) > self.n_deferred

    def writer(self, place: int) -> int:
        """Who wrote the token at a place; what is drafted is the drafter's."""
        return self.written[place].writer if place < len(self.written) else self.drafter

    def write(self, new: Written) -> None:
        """Add a token after the written ones; the draft must agree or be gone."""
        place = len(self.written)
        if place < len(self.ids):
            assert self.ids[place] == new.token, "a written token contradicts the draft"
        else:
            self.ids.append(new.token)
        self.written.append(new)
        self.base_run = self.base_run + 1 if new.writer == 0 else 0

    def drop_draft(self) -> None:
        """Forget the drafted tokens."""
        del self.ids[len(self.written) :]
