"""How a token is drawn, and where the randomness comes from.

Randomness is a function of (seed, prompt, place in the text), not of the order in which things
happen to be computed. So a text does not depend on the batch that it was in, nor on the schedule.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Likeliest", "Noise", "Sampling", "Stream", "likeliest", "row_key"]

Likeliest: TypeAlias = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities in nats, the likeliest first, of equal ones the lowest id."""

Stream = Literal["token", "policy", "accept", "residual", "text"]
"""What a random number is for."""

_STREAMS: dict[Stream, int] = {"token": 0, "policy": 1, "accept": 2, "residual": 3, "text": 4}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a distribution is sharpened and cut before a token is drawn.

    Attributes:
        temperature: 0 is greedy: always the most likely token, the lowest id of equal ones.
        top_k: only the k most likely tokens; ``None`` for all.
        top_p: only the fewest tokens whose probabilities sum to at least this, after temperature
            (Holtzman et al. 2020, arXiv 1904.09751); ``None`` for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0

    def warp(self, logits: Float[Tensor, "positions vocab"]) -> Float[Tensor, "positions vocab"]:
        """Logits after temperature, top-k and top-p, in that order; -inf for what was cut."""
        # From the greatest down: dividing by a tiny temperature must not make two tokens infinite.
        logits = logits.float()
        warped = (logits - logits.max(-1, keepdim=True).values) / self.temperature
        if self.top_k is not None and self.top_k < warped.shape[-1]:
            kth = warped.topk(self.top_k, dim=-1).values[:, -1:]
            warped = warped.masked_fill(warped < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = warped.sort(dim=-1, descending=True, stable=True)
            probs = ordered.softmax(-1)
            # A token stays as long as those before it do not reach top_p; the first always stays.
            cut = probs.cumsum(-1) - probs >= self.top_p
            warped = warped.masked_fill(cut.scatter(-1, order, cut), float("-inf"))
        return warped

    def probs(self, logits: Float[Tensor, "positions vocab"]) -> Float[Tensor, "positions vocab"]:
        """The probabilities that tokens are drawn from."""
        if self.greedy:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
        return self.warp(logits).softmax(-1)

    def draw(
        self,
        logits: Float[Tensor, "positions vocab"],
        gumbel: Float[Tensor, "positions vocab"] | None,
    ) -> Int[Tensor, "positions"]:
        """One token per position: the greatest of log-probability plus Gumbel noise.

        Args:
            logits: before temperature.
            gumbel: standard Gumbel noise; ``None`` when greedy.
        """
        if self.greedy:
            return logits.argmax(-1)
        assert gumbel is not None, "drawing at random needs noise"
        return (self.warp(logits) + gumbel.to(logits.device)).argmax(-1)


def likeliest(logprobs: Float[Tensor, "vocab"], n: int) -> Likeliest:
    """The ``n`` likeliest tokens, or fewer if no more are possible and known.

    Args:
        logprobs: in nats; -inf for what cannot be, +inf and NaN for what is not known.
        n: how many.
    """
    if not n:
        return ()
    known = logprobs.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    least = known.topk(min(n, len(known))).values[-1]
    # topk does not say which of equal ones it takes.
    ids = ((known >= least) & (known != -math.inf)).nonzero()[:, 0]
    pairs = zip(ids.tolist(), known[ids].tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:n])


def row_key(seed: int, prompt_ids: Sequence[int]) -> int:
    """What the randomness of one text depends on: its seed and its prompt for the base model."""
    digest = hashlib.blake2b(digest_size=8, key=b"multicolm row")
    digest.update(repr((seed, list(prompt_ids))).encode())
    return int.from_bytes(digest.digest(), "little")


class Noise:
    """Random numbers by (row key, place, stream); equal arguments give equal numbers."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def _seed(self, key: int, place: int, stream: Stream) -> torch.Generator:
        message = (
            key.to_bytes(8, "little") + place.to_bytes(8, "little") + bytes([_STREAMS[stream]])
        )
        digest = hashlib.blake2b(message, digest_size=8).digest()
        # manual_seed takes 64 bits as a signed number.
        return self._generator.manual_seed(int.from_bytes(digest, "little", signed=True))

    def gumbel(
        self, keys: Sequence[int], places: Sequence[int], vocab: int, stream: Stream = "token"
    ) -> Float[Tensor, "positions vocab"]:
        """Standard Gumbel noise for every token at every position."""
        noise = torch.empty(len(keys), vocab)
        for line, key, place in zip(noise, keys, places, strict=True):
            line.exponential_(generator=self._seed(key, place, stream))
        return noise.log_().neg_()

    def uniform(
        self, keys: Sequence[int], places: Sequence[int], stream: Stream = "policy"
    ) -> Float[Tensor, "positions"]:
        """One number in [0, 1) per position."""
        noise = torch.empty(len(keys), 1)
        for line, key, place in zip(noise, keys, places, strict=True):
            line.uniform_(generator=self._seed(key, place, stream))
        return noise[:, 0]
