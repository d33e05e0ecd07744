"""Positions that are about to be decided, and what the models show there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from multicolm.backend.base import ModelOutput
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Noise, Sampling, Stream
from multicolm.types import Pooling
from multicolm.views import prompt_hidden_key

__all__ = ["Draft", "Positions", "Shown"]


@dataclass(frozen=True)
class Positions:
    """Some places of some rows, flat; and the random numbers that belong to them.

    Attributes:
        rows: per position, its row.
        places: per position, its place in the row's written text (0 is the first new token).
        noise: where random numbers come from.
    """

    rows: Sequence[Row]
    places: Sequence[int]
    noise: Noise

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, logits: Float[Tensor, "positions vocab"]) -> Int[Tensor, "positions"]:
        """Draw a token at every position, as its row wants.

        Whoever writes, a position has the same noise. So two models that agree draw the same
        token, and a schedule that asks in another order gets the same text.
        """
        if self._shared_sampling is not None:  # the usual case, and the cheap one
            return self._drawn(self._shared_sampling, range(len(self)), logits)
        tokens = torch.empty(len(self), dtype=torch.long, device=logits.device)
        for sampling, lines in self._by_sampling().items():
            tokens[lines] = self._drawn(sampling, lines, logits[lines])
        return tokens

    def _drawn(self, sampling: Sampling, lines: Sequence[int], logits: Tensor) -> Tensor:
        noise = None if sampling.greedy else self._gumbel(lines, logits.shape[-1], "token")
        return sampling.draw(logits, noise)

    def probs(self, logits: Float[Tensor, "positions vocab"]) -> Float[Tensor, "positions vocab"]:
        """The probabilities that tokens are drawn from, as each row wants."""
        if self._shared_sampling is not None:
            return self._shared_sampling.probs(logits)
        probs = torch.empty_like(logits, dtype=torch.float32)
        for sampling, lines in self._by_sampling().items():
            probs[lines] = sampling.probs(logits[lines])
        return probs

    def jittered(
        self, logits: Float[Tensor, "positions vocab"], stream: Stream
    ) -> Float[Tensor, "positions vocab"]:
        """Logits with Gumbel noise, except where the row is greedy."""
        random = [i for i, row in enumerate(self.rows) if not row.sampling.greedy]
        if not random:
            return logits
        noise = self._gumbel(random, logits.shape[-1], stream).to(logits)
        if len(random) == len(self):
            return logits + noise
        return logits.index_add(0, torch.tensor(random, device=logits.device), noise)

    def uniform(self, stream: Stream) -> Float[Tensor, "positions"]:
        """One number in [0, 1) per position."""
        return self.noise.uniform(self._keys(range(len(self))), self.places, stream)

    def at(self, which: Sequence[int]) -> Positions:
        """Some of these positions."""
        return Positions([self.rows[i] for i in which], [self.places[i] for i in which], self.noise)

    @property
    def _shared_sampling(self) -> Sampling | None:
        """How tokens are drawn, if it is known to be the same everywhere."""
        if not self.rows:
            return Sampling()
        first = self.rows[0].sampling
        for row in self.rows:
            if row.sampling is not first:
                return None
        return first

    def _by_sampling(self) -> dict[Sampling, list[int]]:
        """Positions by how tokens are drawn there."""
        lines: dict[Sampling, list[int]] = {}
        for i, row in enumerate(self.rows):
            lines.setdefault(row.sampling, []).append(i)
        return lines

    def _gumbel(
        self, lines: Sequence[int], vocab: int, stream: Stream
    ) -> Float[Tensor, "lines vocab"]:
        return self.noise.gumbel(self._keys(lines), [self.places[i] for i in lines], vocab, stream)

    def _keys(self, lines: Sequence[int]) -> list[int]:
        """What the rows' randomness depends on; they are marked, for it is about to have a part."""
        for i in lines:
            self.rows[i].noise_used = True
        return [self.rows[i].key for i in lines]

    def text_context(self, device: torch.device) -> dict[str, Callable[[], Tensor]]:
        """What policies see of each position's text, whatever its place."""
        known: dict[str, Callable[[], Tensor]] = {
            "greedy": lambda: torch.tensor(
                [row.sampling.greedy for row in self.rows], dtype=torch.bool, device=device
            ),
        }
        known["thinking"] = lambda: torch.tensor(
            [row.text.is_thinking for row in self.rows], dtype=torch.bool, device=device
        )
        if not self.rows:
            return known
        first = self.rows[0]
        if first.prompt_mean_nll:
            known["prompt_mean_nll"] = lambda: torch.tensor(
                [row.prompt_mean_nll for row in self.rows], device=device
            )
            known["prompt_length"] = lambda: torch.tensor(
                [row.prompt_length for row in self.rows], device=device
            )
        for of in first.prompt_hidden:
            known[prompt_hidden_key(*of)] = partial(self._prompt_hidden, of, device)
        if first.state is not None:
            known["state"] = partial(self._states, device)
        return known

    def _prompt_hidden(
        self, of: tuple[int, Pooling], device: torch.device
    ) -> Float[Tensor, "positions hidden"]:
        return torch.stack([row.prompt_hidden[of].to(device) for row in self.rows])

    def _states(self, device: torch.device) -> Shaped[Tensor, "positions width"]:
        # Begun where no model was seen, and updated where one was: not on one device.
        states = [row.state.to(device) for row in self.rows if row.state is not None]
        return torch.stack(states)

    def context(self, device: torch.device) -> dict[str, Callable[[], Tensor]]:
        """What policies see of what came before each position.

        After the first place the base model has written, since a draft is its own; where that
        does not come true, the position is thrown away.
        """

        def previous() -> Tensor:
            known = [
                row.previous if place == len(row.written) else 0
                for row, place in zip(self.rows, self.places, strict=True)
            ]
            return torch.tensor(known, device=device)

        def base_run() -> Tensor:
            runs = [
                row.base_run + place - len(row.written)
                for row, place in zip(self.rows, self.places, strict=True)
            ]
            return torch.tensor(runs, device=device)

        return {
            "previous": previous,
            "base_run": base_run,
            "place": lambda: torch.tensor(list(self.places), device=device),
            "uniform": lambda: self.uniform("policy").to(device),
            **self.text_context(device),
        }


@dataclass
class Shown:
    """What one model shows at some of the positions.

    Attributes:
        output: its predictions, one after another.
        line_of: per position at which it was run, its line in ``output``.
        mid_token: positions at which the model cannot continue, for they lie within a token of its
            own or no tokens of its own spell the text; there it shows that it knows nothing: all
            tokens are equally likely.
    """

    output: ModelOutput
    line_of: dict[int, int]
    mid_token: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, output: ModelOutput, numbers: Sequence[int], mid_token: Collection[int] = ()
    ) -> Shown:
        """What a model shows at positions of these numbers, in the order of its lines."""
        unspelled = {numbers[line] for line in output.unspelled}
        line_of = {i: line for line, i in enumerate(numbers) if i not in unspelled}
        return cls(output, line_of, frozenset(mid_token) | unspelled)

    def knows(self, which: Sequence[int]) -> bool:
        """Whether it shows something at all positions numbered ``which``."""
        return all(i in self.line_of or i in self.mid_token for i in which)

    def at(self, which: Sequence[int]) -> ModelOutput:
        """The predictions at the positions numbered ``which``, in their order."""
        if not self.mid_token:
            lines = [self.line_of[i] for i in which]
            return self.output if lines == list(range(len(self.output))) else self.output.at(lines)
        logits, states = self.output.logits, self.output.hidden
        even = -math.log(logits.shape[-1])
        blank = replace(
            self.output,
            logits=logits.new_full((1, logits.shape[-1]), even),
            hidden=None if states is None else states.new_zeros(1, states.shape[-1]),
            unspelled=(),
        )
        lines = [len(self.output) if i in self.mid_token else self.line_of[i] for i in which]
        return ModelOutput.joined([self.output, blank]).at(lines)

    def joined(self, other: Shown) -> Shown:
        """What it shows at these positions and at others."""
        n_lines = len(self.output)
        moved = {i: n_lines + line for i, line in other.line_of.items()}
        output = ModelOutput.joined([self.output, other.output])
        return Shown(output, {**self.line_of, **moved}, self.mid_token | other.mid_token)


@dataclass
class Draft:
    """What the base model wrote ahead, position by position.

    Without a base model that is run always, a draft is one empty position per row.

    Attributes:
        positions: row by row at the first step of the draft, then at the second, and so on.
        shown: per model index, what was shown so far.
        tokens: per position, the token that the base model would write; empty if it was not run.
        deferring: per position, whether the policy may want another writer.
        scores: per position, the number the policy decides on, as far as it is known.
        predicted: per position without a drafted token, who continues there if nobody else does,
            and with which token; absent at the start of a text.
        mid_token: per model index, positions at which the model was found unable to continue.
        candidates: per model index, at the positions that are decided now, tokens that its server
            was asked about besides its likeliest: [positions, n].
        seen: per position number, the models that the policy sees there; empty if it sees all
            that were run.
        forced: per position, the token of a text that is known; ``None`` where texts are written.
    """

    positions: Positions
    shown: dict[int, Shown] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    deferring: list[bool] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    predicted: dict[int, tuple[int, int]] = field(default_factory=dict)
    mid_token: dict[int, set[int]] = field(default_factory=dict)
    candidates: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, tuple[int, ...]] = field(default_factory=dict)
    forced: Sequence[int] | None = None

    def draw(self, which: Sequence[int], logits: Tensor) -> Tensor:
        """Tokens at the positions numbered ``which``: drawn from ``logits`` there, or known."""
        if self.forced is None:
            return self.positions.at(which).draw(logits)
        return torch.tensor([self.forced[i] for i in which], device=logits.device)

    def continuation(self, i: int) -> tuple[int, int] | None:
        """Who continues at position ``i`` if nobody else does, and with which token, if known."""
        return (0, self.tokens[i]) if self.tokens else self.predicted.get(i)

    def fallback_writer(self, k: int, i: int) -> int:
        """Model ``k``, or who continues at position ``i`` if ``k`` cannot."""
        continuation = self.continuation(i)
        return k if continuation is None or i not in self.mid_token.get(k, ()) else continuation[0]

    @cached_property
    def by_row(self) -> dict[Row, list[int]]:
        """Per row, the numbers of its positions by ascending place."""
        numbers: dict[Row, list[int]] = {}
        for i, row in enumerate(self.positions.rows):
            numbers.setdefault(row, []).append(i)
        return numbers
