"""What was decided at the positions of a draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from multicolm.decoding.draft import Draft
from multicolm.decoding.sampling import Likeliest, likeliest

__all__ = ["Decision"]


@dataclass
class Decision:
    """What was decided at the positions of a draft; absent where it must be asked later.

    Attributes:
        writers: per position number, the index of the writer.
        tokens: per position number, the token.
        logprobs: per position number, its log-probability in nats.
        alternatives: per position number, the likeliest tokens there, where they are wanted.
        wanted: per position number, how many of these.
        greedy: per position number where the token was known beforehand, whether it is the
            likeliest one.
        is_forced: whether all tokens were known beforehand.
    """

    writers: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, float] = field(default_factory=dict)
    alternatives: dict[int, Likeliest] = field(default_factory=dict)
    wanted: Mapping[int, int] = field(default_factory=dict)
    greedy: dict[int, bool] = field(default_factory=dict)
    is_forced: bool = False

    @classmethod
    def on(cls, draft: Draft) -> Decision:
        """Nothing is decided yet."""
        rows = draft.positions.rows
        wanted = {i: row.n_alternatives for i, row in enumerate(rows)}
        return cls(wanted=wanted, is_forced=draft.forced is not None)

    def enter(
        self,
        which: Sequence[int],
        writers: Sequence[int],
        tokens: Tensor,
        logprobs: Tensor,
    ) -> None:
        """Note tokens and their log-probabilities.

        Args:
            which: position numbers.
            writers: of these positions.
            tokens: of these positions.
            logprobs: of all tokens at these positions, in nats; +inf is one that is not known.
        """
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        chosen = chosen.masked_fill(chosen == float("inf"), float("nan"))
        self.writers.update(zip(which, writers, strict=True))
        self.tokens.update(zip(which, tokens.tolist(), strict=True))
        self.logprobs.update(zip(which, chosen.tolist(), strict=True))
        if self.is_forced:
            best = logprobs.argmax(-1) == tokens
            self.greedy.update(zip(which, best.tolist(), strict=True))
        for line, i in enumerate(which):
            if n := self.wanted.get(i):
                self.alternatives[i] = likeliest(logprobs[line], n)
