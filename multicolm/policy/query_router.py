"""One model per prompt, chosen before the first token: what routing tokens has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.artefacts import Weights
from multicolm.errors import CapabilityError
from multicolm.policy.base import ModelFacts, Needs, SelectPolicy, register_policy
from multicolm.policy.learned import check_count, check_made_for, check_width
from multicolm.types import Pooling, Tensor
from multicolm.views import ModelNames, Views

if TYPE_CHECKING:
    from multicolm.learning.queries import JudgedAnswers
    from multicolm.learning.training import Training

__all__ = ["QueryRouterPolicy"]


@register_policy("query-router")
class QueryRouterPolicy(SelectPolicy):
    """The model writes the whole text of which the best answer to the prompt is expected.

    Expected is a quality of 0 to 1, predicted from the base model's hidden state of the prompt and
    learned from judged answers of every model alone. Only the chosen model runs; the base model
    reads the prompt.

    Attributes:
        router: what was learned; nothing yet if not given.
        method: how quality is predicted: by a ``linear`` head, by the nearest prompts that were
            seen (``knn``), or by a matrix factorisation (``mf``).
        pooling: the state of the prompt's ``last`` token, or the ``mean`` over all of them.
        cost_weight: quality that one unit of cost per token is worth: written is by the model with
            the greatest predicted quality minus ``cost_weight`` times its cost. 0 counts no cost;
            greater weights of one checkpoint give the frontier of quality and cost.
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Source:
        RouteLLM, arXiv 2406.18665, and EmbedLLM, arXiv 2410.02223, sections 3: kNN and matrix
        factorisation over prompts; here over the base model's states in the place of a sentence
        encoder's, and for any number of models.
    """

    router: Weights | None = None
    method: Literal["linear", "knn", "mf"] = "linear"
    pooling: Pooling = "last"
    cost_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    made_for: dict[str, str] | None = None

    tunable: ClassVar[dict[str, Sequence[float]]] = {
        "cost_weight": (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    }

    def needs(self, models: ModelNames) -> Needs:
        """Nothing of any token: who writes is known before the first one.

        Raises:
            CapabilityError: if it is not trained, or for another number of models.
        """
        if self.router is None:
            raise CapabilityError(
                f"policy '{self.name}' has not learned anything yet; train one with `multicolm "
                f"train ENSEMBLE --task TASK --policy {self.name} --out CHECKPOINT` and use "
                "`policy: ./CHECKPOINT`."
            )
        check_count(self.name, self._n_models, models)
        return Needs({}, {})

    def prompt_states(self, models: ModelNames) -> Mapping[int, frozenset[Pooling]]:
        """The base model's."""
        return {0: frozenset({self.pooling})}

    def check_models(self, models: Sequence[ModelFacts]) -> None:
        """Refuse models that it was not trained with.

        Raises:
            CapabilityError: naming both.
        """
        check_made_for(self.name, self.made_for, models)
        check_width(self.name, self._width, models[0])

    @property
    def _tensors(self) -> Mapping[str, Tensor]:
        assert self.router is not None
        return self.router.content

    @property
    def _n_models(self) -> int:
        tensors = self._tensors
        if "models" in tensors:
            return int(tensors["models"].shape[0])
        return int(tensors["quality" if "quality" in tensors else "bias"].shape[-1])

    @property
    def _width(self) -> int:
        tensors = self._tensors
        return int(tensors["prompts" if "prompts" in tensors else "weight"].shape[-1])

    def initial_state(self, views: Views) -> Float[Tensor, "positions 2"]:
        """Who writes the text, and the quality that is expected of it."""
        import torch

        from multicolm.learning.queries import predicted_quality

        states = views.prompt_hidden("base", self.pooling)
        quality = predicted_quality(self._tensors, states)
        chosen = (quality - self.cost_weight * views.costs.to(quality)).argmax(-1)
        return torch.stack([chosen.float(), quality.gather(1, chosen[:, None])[:, 0]], -1)

    def text_uses(self, views: Views) -> Bool[Tensor, "positions models"]:
        """The chosen model alone."""
        import torch

        chosen = views.state[:, 0].long()
        return torch.nn.functional.one_hot(chosen, len(views.models)).bool()

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """Who was chosen for the text."""
        return views.state[:, 0].long()

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """The quality that is expected of the text."""
        return views.state[:, 1]

    def fit_answers(self, answers: JudgedAnswers, training: Training) -> QueryRouterPolicy:
        """The same policy with what was learned from judged answers.

        Args:
            answers: of every model alone.
            training: takes no options; what was measured goes into its report.

        Raises:
            ConfigError: if the training has options.
            TrainingError: if there is too little to learn from.
        """
        from multicolm.config.wording import Strict
        from multicolm.learning.queries import fit_queries

        training.settings(Strict)
        tensors, report = fit_queries(
            answers, self.method, lambda label: training.on_progress(0, 0, label)
        )
        training.report |= report
        made_for = dict(zip(answers.models, answers.identities, strict=True))
        return replace(self, router=Weights(tensors), made_for=made_for)
