"""SpecFuse, also SpecEM: models draft segments and vote; who drafts well counts more and more."""

from __future__ import annotations

from jaxtyping import Float, Int
from pydantic import Field, PositiveInt

from multicolm.policy.base import SegmentPolicy, Segments, register_policy
from multicolm.types import Tensor
from multicolm.views import Views

__all__ = ["SpecFusePolicy"]

_LEAST = -1e6  # nats per token; -inf everywhere would leave a judge without an opinion


@register_policy("spec-fuse")
class SpecFusePolicy(SegmentPolicy):
    """Every model drafts the next segment, and the one with most weighted votes is written.

    Judge i gives draft j the score s_i(j): the geometric mean of the probabilities of its tokens,
    divided by the sum of those of all drafts. The reward r_j of a model is how often its draft
    beats another one before a judge that is neither's: the share of pairs of a judge i != j and a
    draft k != j with s_i(j) >= s_i(k), one of them at least. In the t-th round the weights become

        w_j <- w_j exp(eta_t r_j) / sum_k w_k exp(eta_t r_k),   eta_t = learning_rate / (t sqrt(K))

    and the draft with the greatest sum_i w_i s_i(j) is written. Weights are a text's own and begin
    equal. Where all models draft the same it is written, nobody scores it, and no round is counted.

    Attributes:
        shortest: tokens of a draft after which it ends with the word.
        longest: tokens after which it may end within a word, as it must where a script has no
            spaces.
        learning_rate: 0 leaves all models the same vote (SpecFuse as first published).

    Source:
        SpecFuse, arXiv 2412.07380 (version 3 and NeurIPS 2025: SpecEM); the reward, the steps and
        segments of 10 tokens as in the authors' code. That code takes mean logits, which another
        offset would change, for mean log-probabilities, and cuts drafts back to their last whole
        word, where ours finish it. There each model draws its draft by itself; see
        :class:`multicolm.SegmentPolicy` for how it is drawn here.
    """

    shortest: PositiveInt = 10
    longest: PositiveInt = 26
    learning_rate: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    def initial_state(self, views: Views) -> Float[Tensor, "positions width"]:
        """Logarithm of each model's weight, by its place among those in use; then the round."""
        import torch

        return torch.zeros(views.n_positions, len(self.uses(views.models)) + 1, dtype=torch.float64)

    def rate(self, segments: Segments) -> Float[Tensor, "rows writers"]:
        """Weighted votes, with the weights that this round leads to."""
        import torch

        log_w = self._updated(segments)[:, :-1]
        votes = self._scores(segments)
        # Who cannot judge has no vote.
        judges = ~segments.nats.isnan().any(1)
        weights = torch.where(judges, log_w, -torch.inf).softmax(-1)
        return (weights[:, None, :] * votes).sum(-1)

    def feedback(
        self, segments: Segments, chosen: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows width"]:
        """The weights after this round, whichever draft was written."""
        return self._updated(segments)

    def _scores(self, segments: Segments) -> Float[Tensor, "rows writers judges"]:
        """Each judge's votes, which sum to 1; 0 of a model that cannot judge."""
        logprobs = -segments.nats.double() / segments.n_tokens.clamp_min(1)
        return logprobs.clamp_min(_LEAST).softmax(1).nan_to_num(0.0)

    def _updated(self, segments: Segments) -> Float[Tensor, "rows width"]:
        import torch

        assert segments.state is not None
        log_w, rounds = segments.state[:, :-1], segments.state[:, -1] + 1
        eta = self.learning_rate / (rounds * log_w.shape[1] ** 0.5)
        log_w = (log_w + eta[:, None] * self._rewards(segments)).log_softmax(-1)
        return torch.cat([log_w, rounds[:, None]], dim=1)

    def _rewards(self, segments: Segments) -> Float[Tensor, "rows writers"]:
        """How often each draft beats another one before a judge that is not its writer."""
        import torch

        scores = self._scores(segments)
        judges = ~segments.nats.isnan().any(1)
        n = scores.shape[1]
        other = ~torch.eye(n, dtype=torch.bool, device=scores.device)
        wins = scores[:, :, None, :] >= scores[:, None, :, :]  # rows, drafts, rivals, judges
        counted = other[:, :, None] & other[:, None, :] & judges[:, None, None, :]
        won = (wins & counted).sum((2, 3)).double()
        return won.clamp_min(1) / counted.sum((2, 3)).clamp_min(1)
