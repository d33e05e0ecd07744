"""What a joint training begins with: the head, and the base model with what is trained of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multicolm.errors import ConfigError
from multicolm.learning.lbfgs import usual_penalty
from multicolm.learning.networks import build, fold
from multicolm.learning.positions import divide
from multicolm.learning.problem import standardise
from multicolm.learning.router import fit_marginal
from multicolm.learning.training import Training
from multicolm.policy.base import ModelFacts
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.score_table import ScoreTable
from multicolm.scoring.store import StoredTable
from multicolm.training.joint.data import Lessons, rows_of
from multicolm.training.joint.job import Job
from multicolm.training.joint.model import LoraSettings, add_lora
from multicolm.training.provenance import check_identities

__all__ = ["Base", "Router"]


@dataclass(frozen=True)
class Router:
    """A head for raw hidden states.

    Attributes:
        tensors: see :mod:`multicolm.learning.networks`.
        mean: of each component of the hidden states, as the table holds them.
        scale: of each component.
    """

    tensors: Mapping[str, Tensor]
    mean: Tensor
    scale: Tensor

    @classmethod
    def first(cls, job: Job, data: Lessons) -> Router:
        """The head to begin with: the policy's own, one trained on the table, or a blank one."""
        assert isinstance(job.policy, CoLlmPolicy)
        stored = job.table()
        wanted = rows_of(data.table, data.learnt)
        mean, scale = standardise(divide(stored, wanted, held_out=0.0).learnt, _hidden)
        if job.policy.head is not None:
            names, sizes = data.table.models, [len(mean), *(None for _ in data.table.models[1:])]
            job.policy.needs(names)
            identified = zip(names, data.table.identities, sizes, strict=True)
            job.policy.check_models([ModelFacts(*facts) for facts in identified])
            return cls(job.policy.head.content, mean, scale)
        if job.settings.init:
            return cls(_trained_alone(job, stored, wanted, len(mean)), mean, scale)
        generator = torch.Generator().manual_seed(job.settings.seed)
        n_outputs = data.table.n_models - 1
        blank = build(job.settings.network, len(mean), n_outputs, generator=generator)
        return cls(fold(blank, mean, scale), mean, scale)


def _hidden(part: ScoreTable) -> Tensor:
    return part.feature("hidden")


def _trained_alone(
    job: Job, stored: StoredTable, wanted: Callable[[ScoreTable], Tensor], width: int
) -> dict[str, Tensor]:
    """A head for the base model as it was, which never sees the texts that are held out."""
    options: dict[str, Any] = {
        "network": job.settings.network,
        "device": str(job.accelerator.device),
    }
    if job.settings.network != "linear":
        options["seeds"] = (job.settings.seed,)
    else:
        # No weaker one, whatever held-out texts say: the hidden states are about to move, and a
        # head that goes by small differences between them would be sure of itself by accident.
        options["l2"] = usual_penalty(width, len(divide(stored, wanted, 0.0).learnt))
    training = Training(
        options,
        job.scratch / "head" if job.accelerator.is_main_process else None,
        job.on_progress,
        job.save_every,
    )
    return fit_marginal(stored, _hidden, training, wanted=wanted)


@dataclass(frozen=True)
class Base:
    """The base model, ready to be trained.

    Attributes:
        model: of transformers.
        peft_model: peft's view of it, if an adapter is trained.
        tokenizer: of transformers.
        n_tokens: that it has.
        ends: with which of them it ends a text.
        commit: that the Hub served, if it did.
        dtype: that the ensemble computes in.
    """

    model: Any
    peft_model: Any
    tokenizer: Any
    n_tokens: int
    ends: tuple[int, ...]
    commit: str | None
    dtype: torch.dtype

    @classmethod
    def load(cls, job: Job) -> Base:
        """Load it where accelerate will have it.

        Raises:
            ArtefactError: if it is another model than the one that was scored.
            ConfigError: if peft is missing, or a setting does not suit the model.
            ModelError: if it cannot be loaded.
        """
        from multicolm.backend.identity import identity_of
        from multicolm.backend.loading import load_model, load_tokenizer
        from multicolm.backend.transformers import TransformersModel

        name, settings = job.config.base_model, job.settings
        config = job.base.model_copy(update={"device": None, "device_map": None})
        tokenizer = load_tokenizer(name, config)
        served = TransformersModel(name, load_model(name, config), tokenizer)
        model: Any = served.model
        commit = getattr(model.config, "_commit_hash", None)
        scored = job.index.models[0]
        check_identities(
            {name: identity_of(config, commit)}, {scored.name: scored.identity}, str(job.scores)
        )
        dtype = served.dtype
        peft_model = None
        if job.how == "lora":
            peft_model = add_lora(
                model,
                LoraSettings(
                    settings.lora_rank,
                    settings.lora_alpha,
                    settings.lora_dropout,
                    settings.lora_targets,
                    settings.seed,
                ),
            )
        else:
            # Steps as small as these are lost when weights are in half precision.
            model.float().requires_grad_(True)
        if settings.gradient_checkpointing:
            _checkpoint_gradients(name, model)
        ends = tuple(sorted(served.tokenizer.end_ids))
        n_tokens = served.tokenizer.n_tokens
        return cls(model, peft_model, tokenizer, n_tokens, ends, commit, dtype)

    def restore_dtype(self) -> None:
        """What is measured and saved is what the ensemble computes with."""
        if self.peft_model is None:
            self.model.to(self.dtype)


def _checkpoint_gradients(name: str, model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing: model '{name}' ({type(model).__name__}) does not know how; "
            "leave it off."
        )
    with warnings.catch_warnings():
        # The name that all supported versions of transformers know; newer ones prefer another.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
