"""The base model and the head as one network: what it gives to the tokens of the text."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from multicolm.errors import CapabilityError, ConfigError
from multicolm.learning.losses import marginal_loss
from multicolm.learning.networks import from_tensors, router_scores
from multicolm.training.joint.data import Batch

__all__ = ["Head", "JointModel", "LoraSettings", "add_lora", "joint_loss"]


class Head(nn.Module):
    """A router that sees standardised hidden states, so that its learning rate fits any model.

    Args:
        tensors: of a router for raw ones.
        mean: of each component of the hidden state.
        scale: of each component.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        mean: Float[Tensor, "hidden"],
        scale: Float[Tensor, "hidden"],
    ) -> None:
        super().__init__()
        raw = tensors["0.weight"]
        standardised = {
            **tensors,
            "0.weight": raw * scale,
            "0.bias": tensors["0.bias"] + raw @ mean,
        }
        self.network = from_tensors(standardised).requires_grad_(True)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(
        self, hidden: Float[Tensor, "positions hidden"]
    ) -> Float[Tensor, "positions models"]:
        """One score per model, the base model's fixed at zero; always in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return router_scores(self.network, (hidden.float() - self.mean) / self.scale)


class JointModel(nn.Module):
    """A base model, and the head on its hidden states.

    Args:
        base: a causal language model of transformers.
        head: of the base model's hidden states; without one the base model writes alone.
        n_tokens: how many tokens it has; columns of its output layer after these are padding.
        ends: the tokens with which it ends a text, in its own ids.
        ends_count: whether the end of a text, ``min(ends)`` in the score table, has the summed
            probability of all of them.

    Raises:
        CapabilityError: if it has no output layer whose input could be the hidden state.
    """

    def __init__(
        self,
        base: Any,
        head: Head | None,
        *,
        n_tokens: int,
        ends: Sequence[int],
        ends_count: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.head = head
        self._output = [base.get_output_embeddings()]  # in a list: it is the base model's part
        self._n_tokens = n_tokens
        self._ends = sorted(ends) if ends_count else []
        self._takes_mask = "attention_mask" in inspect.signature(base.forward).parameters
        if self._output[0] is None:
            raise CapabilityError(
                f"a {type(base).__name__} has no output layer whose input could serve as hidden "
                "state, so it cannot be trained here; choose another base model."
            )

    def forward(
        self,
        input_ids: Int[Tensor, "lines time"],
        attention_mask: Int[Tensor, "lines time"],
        lines: Int[Tensor, "positions"],
        columns: Int[Tensor, "positions"],
        gold: Int[Tensor, "positions"],
    ) -> tuple[Float[Tensor, "positions"], Float[Tensor, "positions models"]]:
        """The base model's log-probability of each token, in nats, and the head's scores."""
        caught: list[Tensor] = []

        def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # The output layer is the dearest one: it works on the places that count alone.
            caught.append(inputs[0][lines, columns])
            return (caught[0][None], *inputs[1:])

        arguments = {"attention_mask": attention_mask} if self._takes_mask else {}
        hook = self._output[0].register_forward_pre_hook(pick)
        try:
            logits = self.base(input_ids=input_ids, use_cache=False, **arguments).logits[0]
        finally:
            hook.remove()
        logprobs = self._logprobs(logits[:, : self._n_tokens].float(), gold)
        if self.head is None:
            return logprobs, torch.zeros_like(logprobs)[:, None]
        return logprobs, self.head(caught[0])

    def _logprobs(
        self, logits: Float[Tensor, "positions vocab"], gold: Int[Tensor, "positions"]
    ) -> Float[Tensor, "positions"]:
        """As scoring does it: every end token means the end, and what it lacks is impossible."""
        own = gold.clamp(max=logits.shape[-1] - 1)
        found = logits.gather(-1, own[:, None])[:, 0]
        if self._ends:
            found = torch.where(gold == self._ends[0], logits[:, self._ends].logsumexp(-1), found)
        return (found - logits.logsumexp(-1)).masked_fill(own != gold, float("-inf"))


def joint_loss(
    logprobs: Float[Tensor, "positions"],
    scores: Float[Tensor, "positions models"],
    batch: Batch,
) -> Float[Tensor, "positions"]:
    """Negative log-likelihood of each token under the joint model, in nats.

    Args:
        logprobs: of the token under the base model as it is now.
        scores: of the head as it is now.
        batch: what the assistants gave to the tokens.

    Source:
        Co-LLM, arXiv 2403.03870, section 3.1, for any number of models.
    """
    every = torch.cat([logprobs[:, None], batch.logprobs[:, 1:]], dim=-1)
    return marginal_loss(scores, every, batch.known)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Of a LoRA adapter.

    Attributes:
        rank: of each update.
        alpha: updates are scaled by alpha / rank.
        dropout: part of the inputs that is dropped while training.
        targets: names of the modules, or ``all-linear``.
        seed: of the weights that it begins with.
    """

    rank: int
    alpha: int
    dropout: float
    targets: str | list[str]
    seed: int


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """Freeze a model and put a LoRA adapter into its layers; it changes nothing at first.

    Args:
        model: a causal language model of transformers; its layers are replaced in place.
        settings: of the adapter.

    Returns:
        peft's view of the model.

    Raises:
        ConfigError: if peft is missing, or no module has one of the names.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "--train-base lora needs the library peft: pip install 'multicolm[peft]'."
        ) from error
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks transformers by a name that newer versions frown upon.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            torch.manual_seed(settings.seed)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        named = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        leaves = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in named})) or "none"
        raise ConfigError(
            f"lora_targets: no adapter can be put at {settings.targets}; linear modules of this "
            f"model are called {leaves}, and all-linear takes all but the output layer."
        ) from error
