"""Branch-Train-Merge: experts weighed by how well each explains the prompt and the text so far."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Bool, Float
from pydantic import PositiveInt

from multicolm.policy.base import Needs, Schedule, Support, register_policy
from multicolm.policy.mixture import WeightedPolicy
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Views

__all__ = ["BtmPolicy"]

_NEVER = float("-inf")


@register_policy("btm")
class BtmPolicy(WeightedPolicy):
    """Every token is drawn from sum_j w_j p_j, where w is the posterior over the models.

        w_j is proportional to P(j) prod_s p_j(x_s | x_<s)

    over the tokens x_s of the prompt and of the text so far: the model that explains them best
    weighs most. Each model reads its own prompt, with its own chat template, and the text in its
    own tokens. Where every model rules the text out, the prior is left.

    Attributes:
        weights: the prior P(j), as a list or by name; equal if not given. A model of prior 0 is
            never run. The paper averages the posteriors of 100 development sequences, later ones
            with exponentially smaller weights (factor 0.3).
        top_k: only so many models take part in a text: those of the greatest posterior once the
            prompt is read. The others read the prompt and are not run again. All if not given.
        prompt: whether the prompt counts; if not, weights begin at the prior.

    Source:
        Branch-Train-Merge, arXiv 2208.03306, section 3 (the domain posterior, its cached prior and
        the sparse ensemble of the top k experts). There the top k belong to a test domain; here to
        a prompt.
    """

    weights: list[float] | dict[str, float] | None = None
    top_k: PositiveInt | None = None
    prompt: bool = True

    likelihoods: ClassVar[bool] = True
    partial: ClassVar[str] = "tokens outside a server's top k count with probability 0"
    support: ClassVar[Support] = "union"

    def __post_init__(self) -> None:
        """What is read of a prompt, and when models are run, depends on the params."""
        object.__setattr__(self, "prompts", self.prompt)
        schedule: Schedule = "block" if self.top_k is None else "stepwise"
        object.__setattr__(self, "schedule", schedule)

    @property
    def narrows(self) -> bool:
        """Whether a text is written by some of the models only."""
        return self.top_k is not None

    def needs(self, models: ModelNames) -> Needs:
        """Every model with a prior; with ``top_k`` none always runs, the base included."""
        signals: frozenset[Signal] = frozenset(self.base_signals)
        used = dict.fromkeys(sorted(self.uses(models)), signals)
        return Needs(used, {}) if self.top_k is None else Needs({}, used)

    def text_uses(self, views: Views) -> Bool[Tensor, "positions models"]:
        """The models of the greatest posterior once the prompt is read, the first of equal ones."""
        import torch

        used = sorted(self.uses(views.models))
        flags = torch.zeros(views.n_positions, len(views.models), dtype=torch.bool)
        posterior = self._log_posterior(views, used, before_text=True)
        order = posterior.sort(dim=-1, descending=True, stable=True).indices
        best = torch.tensor(used)[order[:, : self.top_k]]
        return flags.scatter(1, best, True)

    def _log_posterior(
        self, views: Views, models: list[int], *, before_text: bool = False
    ) -> Float[Tensor, "positions experts"]:
        """Logarithm of the posterior over some models, in nats."""
        import torch

        prior = torch.tensor(views.models.weights(self.weights))[models].log()
        logits = prior.expand(views.n_positions, -1)
        if self.prompt:
            logits = logits - views.prompt_nll[:, models].cpu()
        if not before_text:
            logits = logits - views.text_nll[:, models].cpu()
        ruled_out = (logits == _NEVER).all(-1, keepdim=True)
        return torch.where(ruled_out, prior, logits).log_softmax(-1)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Logarithm of the posterior mixture."""
        logprobs = views.stack(lambda view: view.logprobs)
        log_w = self._log_posterior(views, list(views)).to(logprobs.device)
        return (logprobs + log_w.T[:, :, None]).logsumexp(0)
