"""What one joint training is about: its settings, and all that can be checked before it begins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import save

from multicolm.config import EnsembleConfig, ModelConfig
from multicolm.config.wording import Strict
from multicolm.errors import CapabilityError
from multicolm.learning.networks import NetworkKind
from multicolm.policy.base import Policy
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.fixed import SinglePolicy
from multicolm.scoring.store import ROLLOUTS, Index, StoredTable, read_index
from multicolm.training.identities import identities
from multicolm.training.joint.loop import Schedule, open_accelerator
from multicolm.training.own_ensemble import How
from multicolm.training.provenance import check_identities, training_key
from multicolm.views import ModelNames

__all__ = ["Job", "JointSettings", "Progress", "check_base", "check_policy", "make_job"]

Progress = Callable[[float, float, str], None]

_LR = {"full": 2e-5, "lora": 1e-4}


class JointSettings(Strict):
    """How the base model is trained, with the head or alone.

    Attributes:
        lr: peak learning rate of AdamW for the base model; 2e-5 for ``full`` and 1e-4 for ``lora``
            if not given.
        head_lr: that of the head; 0.1 divided by the root of the hidden state's width if not
            given, as a step changes a score by about the rate times that root.
        epochs: passes over the texts, at most.
        batch_size: texts per step, over all processes.
        batch_tokens: the most tokens of one forward pass of one process, padding included; a batch
            is worked off in as many passes as it takes. A longer text is a pass of its own.
        warmup: part of the steps in which the learning rates rise; they fall in a line after it.
        weight_decay: of the base model.
        clip: the most that the norm of a gradient may be.
        max_length: texts are cut after this many tokens, the prompt included.
        held_out: part of the texts that is kept for measuring, and for choosing the best epoch.
        patience: epochs without a better held-out loss before training stops; 0 never stops.
        seed: of the order of the texts, of the adapter's first weights, and of dropout.
        ignore_rollouts: learn from the corpus alone where the table has labels from roll-outs.
        init: whether the head is first trained alone, with the base model frozen.
        network: kind of the head; ``linear`` is the published one.
        lora_rank: of the adapter's updates.
        lora_alpha: updates are scaled by lora_alpha / lora_rank.
        lora_dropout: part of an update's inputs that is dropped while training.
        lora_targets: names of the modules that are adapted, or ``all-linear``.
        gradient_checkpointing: work activations out twice instead of keeping them.
        mixed_precision: ``bf16`` computes in it and keeps trained weights in float32; what
            accelerate was launched with if not given.

    Source:
        Co-LLM, arXiv 2403.03870: its fine-tuning of all weights, as its code does it.
    """

    lr: float | None = Field(default=None, gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=128, ge=1)
    batch_tokens: int = Field(default=4096, ge=1)
    warmup: float = Field(default=0.04, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    max_length: int = Field(default=2048, ge=1)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    patience: int = Field(default=2, ge=0)
    seed: int = Field(default=0, ge=0)
    ignore_rollouts: bool = False
    init: bool = True
    network: NetworkKind = "linear"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: str | list[str] = "all-linear"
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] | None = None


@dataclass(frozen=True)
class Job:
    """What one call of :func:`multicolm.training.joint.train.train_joint` is about.

    Attributes:
        policy: to begin with.
        scores: folder of the score table.
        folder: of the checkpoint.
        config: of the ensemble.
        how: ``lora`` or ``full``.
        settings: of the training.
        options: what the user gave of them.
        license: of the checkpoint.
        on_progress: called with how far it has come.
        save_every: seconds between two states, at least.
        index: of the score table.
        names: of the models whose scores are used, the base model first.
        key: of policy, data and settings; equal for equal trainings.
        accelerator: of :func:`multicolm.training.joint.loop.open_accelerator`.
    """

    policy: CoLlmPolicy | SinglePolicy
    scores: Path
    folder: Path
    config: EnsembleConfig
    how: How
    settings: JointSettings
    options: Mapping[str, Any]
    license: str
    on_progress: Progress
    save_every: float
    index: Index
    names: tuple[str, ...]
    key: str
    accelerator: Any

    @property
    def base(self) -> ModelConfig:
        """The base model's settings."""
        return self.config.models[self.config.base_model]

    @property
    def scratch(self) -> Path:
        """What is of use to this training alone."""
        return self.folder / ".training" / self.key

    def table(self) -> StoredTable:
        """The scores, without labels from roll-outs, which are of the base model as it was.

        Raises:
            ArtefactError: if a file is missing or damaged.
        """
        return StoredTable(self.scores, self.names, rollouts=False)

    def schedule(self, width: int) -> Schedule:
        """How the loop goes, for hidden states of a width; 0 without a head."""
        shared = {f.name for f in fields(Schedule)} & set(JointSettings.model_fields)
        given = {name: getattr(self.settings, name) for name in shared}
        rates = {
            "lr": _LR[self.how] if self.settings.lr is None else self.settings.lr,
            "head_lr": self.settings.head_lr or 0.1 / max(1, width) ** 0.5,
        }
        return Schedule(**{**given, **rates, "save_every": self.save_every})


def check_policy(policy: Policy, config: EnsembleConfig) -> CoLlmPolicy | SinglePolicy:
    """The policy, if its base model can be trained with it.

    Raises:
        CapabilityError: if it cannot.
    """
    if isinstance(policy, SinglePolicy):
        if ModelNames(config.names).role(policy.model) != 0:
            raise CapabilityError(
                f"policy 'single' has model '{policy.model}' write, and it is the base model "
                f"'{config.base_model}' that is trained; leave its param `model` out."
            )
        return policy
    if not isinstance(policy, CoLlmPolicy):
        raise CapabilityError(
            f"the base model cannot be trained with policy '{policy.name}'; allowed are co-llm, "
            "and single for the base model alone. Without --train-base a policy is trained for "
            "the base model as it is."
        )
    if len(config.names) < 2:
        raise CapabilityError(
            f"policy 'co-llm' chooses between models, and '{config.base_model}' is the only one; "
            "add an assistant, or train with --policy single."
        )
    return policy


def check_base(config: EnsembleConfig) -> None:
    """Refuse a base model that cannot be trained.

    Raises:
        CapabilityError: if another backend runs it, or it has an adapter already.
    """
    base = config.models[config.base_model]
    if base.backend != "transformers":
        raise CapabilityError(
            f"base model '{config.base_model}' runs on backend '{base.backend}'; only models of "
            "backend 'transformers' can be trained."
        )
    if base.adapter is not None:
        raise CapabilityError(
            f"base model '{config.base_model}' has an adapter already ({base.adapter}); merge it "
            "into the weights (peft's `merge_and_unload`) and score the corpus with the result."
        )


def make_job(
    policy: CoLlmPolicy | SinglePolicy, settings: JointSettings, *, scores: Path, **rest: Any
) -> Job:
    """Everything that can be checked before anything is loaded.

    Raises:
        ArtefactError: if the table is of other models.
        CapabilityError: if an assistant has another vocabulary than the base model, or the table
            has labels from roll-outs.
        ConfigError: if accelerate is set up for something else.
    """
    config: EnsembleConfig = rest["config"]
    # Alone the base model needs no scores but its own.
    names = config.names if isinstance(policy, CoLlmPolicy) else (config.base_model,)
    index = read_index(scores)
    known = identities(config)
    scored = {model.name: model.identity for model in index.models}
    check_identities({name: known[name] for name in names}, scored, str(scores))
    for model in index.models:
        if model.name in names and model.bridge != "shared":
            raise CapabilityError(
                f"model '{model.name}' has another vocabulary than the base model "
                f"'{config.base_model}', which is trained token by token; train the head alone "
                "(without --train-base), or the base model alone with --policy single."
            )
    if ROLLOUTS in index.files and len(names) > 1 and not settings.ignore_rollouts:
        raise CapabilityError(
            f"{scores} has labels from roll-outs, which say what becomes of the text after a "
            f"token of '{config.base_model}' as it is, and not as training will make it; train the "
            "head alone (without --train-base), or learn from the corpus alone with --option "
            "ignore_rollouts=true."
        )
    accelerator = open_accelerator(settings.mixed_precision)
    facts = {
        **settings.model_dump(),
        "train_base": rest["how"],
        "base": config.models[config.base_model].model_dump(mode="json"),
        "precision": accelerator.mixed_precision,
        "head": _digest(policy),
    }
    return Job(
        policy=policy,
        scores=scores,
        settings=settings,
        index=index,
        names=names,
        key=training_key(policy, index.files, names, facts),
        accelerator=accelerator,
        **rest,
    )


def _digest(policy: CoLlmPolicy | SinglePolicy) -> str:
    """Of the head that a policy begins with; empty if it has none."""
    if isinstance(policy, SinglePolicy) or policy.head is None:
        return ""
    plain = {name: tensor.contiguous() for name, tensor in policy.head.content.items()}
    return hashlib.sha256(save(plain)).hexdigest()
