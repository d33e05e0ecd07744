"""Trains the base model together with the policy's head; the assistants are read from scores.

The joint model's loss is

    L = -mean_t log( pi_0 p_0(x_t) + sum_k pi_k p_k(x_t) )

over the weights of the base model (a LoRA adapter, or all of them) and of the head that gives pi.
The log-probabilities of the assistants are those of a score table, so none of them is loaded; the
base model's, and the hidden state that the head sees, are those of the step. The policy `single`
has no head: its base model is fine-tuned alone, on the same tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from multicolm.artefacts import Weights
from multicolm.config import EnsembleConfig
from multicolm.files import locked
from multicolm.learning.networks import fold
from multicolm.learning.positions import scores_in_memory
from multicolm.learning.snapshots import Snapshots
from multicolm.learning.training import Training
from multicolm.policy.base import Policy
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.fixed import SinglePolicy
from multicolm.score_table import ScoreTable
from multicolm.training.checkpoint import Checkpoint, finished_checkpoint
from multicolm.training.joint.data import Lessons, lessons
from multicolm.training.joint.job import (
    Job,
    JointSettings,
    Progress,
    check_base,
    check_policy,
    make_job,
)
from multicolm.training.joint.loop import Losses, Trainer
from multicolm.training.joint.model import Head, JointModel
from multicolm.training.joint.save import save_adapter, save_base
from multicolm.training.joint.start import Base, Router
from multicolm.training.own_ensemble import How, refuse_foreign, trained_base, write_ensemble
from multicolm.training.provenance import training_provenance

__all__ = ["JointSettings", "train_joint"]


def train_joint(
    policy: Policy,
    scores: str | Path,
    out: str | Path,
    *,
    config: EnsembleConfig,
    how: How,
    options: Mapping[str, Any] | None = None,
    license: str = "",
    on_progress: Progress = lambda done, total, label: None,
    save_every: float = 5.0,
) -> Checkpoint:
    """Train an ensemble's base model with the head of a policy, or alone.

    The checkpoint holds the trained base model and an ``ensemble.yaml``, so that it can be used
    like an ensemble. Of the ensemble's models only the base model is loaded. A stopped training
    resumes when called again with the same arguments; on one process with a CPU it ends with the
    same bytes. One that is finished is not done again. Under ``accelerate launch`` or ``torchrun``
    the processes share each batch.

    Args:
        policy: ``co-llm``, whose head is the one to begin with if it has one; or ``single`` with
            the base model, which fine-tunes that alone.
        scores: folder that ``multicolm score`` wrote, for ``co-llm`` with ``--hidden``.
        out: folder of the checkpoint.
        config: of the ensemble.
        how: ``full`` trains all weights, in float32, and saves them in the type that the ensemble
            computes in; ``lora`` trains a PEFT adapter.
        options: see :class:`JointSettings`.
        license: of the checkpoint, an SPDX name, for its card.
        on_progress: called with how much is done, of how much, and what is being done.
        save_every: the least number of seconds between two states that a stopped training can go
            on from; states that take long to write are written more rarely. 0 keeps every step's.

    Raises:
        ArtefactError: if the table is damaged, of other models or without hidden states, or ``out``
            holds something else.
        CapabilityError: if the policy or the base model cannot be trained in this way.
        ConfigError: if an option is unknown or out of range, or peft is missing.
        ModelError: if the base model cannot be loaded.
        TrainingError: if there is nothing to learn from, or training diverges.
    """
    settings = Training(options or {}).settings(JointSettings)
    trainable = check_policy(policy, config)
    check_base(config)
    job = make_job(
        trainable,
        settings,
        scores=Path(scores),
        folder=Path(out),
        config=config,
        how=how,
        options=dict(options or {}),
        license=license,
        on_progress=on_progress,
        save_every=save_every,
    )
    if not job.accelerator.is_main_process:
        _run(job)
        job.accelerator.wait_for_everyone()
        return Checkpoint.from_pretrained(job.folder)
    with locked(job.folder):
        checkpoint = _run(job)
        job.accelerator.wait_for_everyone()
    return checkpoint


def _run(job: Job) -> Checkpoint:
    """What every process does; the first of them writes."""
    finished = finished_checkpoint(job.folder, job.key)
    if finished is not None:
        shutil.rmtree(job.folder / ".training", ignore_errors=True)
        return finished
    if not job.scratch.exists():
        refuse_foreign(job.folder, job.how)
    job.scratch.mkdir(parents=True, exist_ok=True)
    data = lessons(
        job.scores,
        scores_in_memory(job.table()),
        max_length=job.settings.max_length,
        held_out=job.settings.held_out,
    )
    head = Router.first(job, data) if isinstance(job.policy, CoLlmPolicy) else None
    base = Base.load(job)
    model = JointModel(
        base.model,
        None if head is None else Head(head.tensors, head.mean, head.scale),
        n_tokens=base.n_tokens,
        ends=base.ends,
        ends_count=job.index.end_of_text,
    )
    # A state is of no use to another training, and its key says which one it is of.
    snapshots = Snapshots(job.scratch, job.key)
    schedule = job.schedule(0 if head is None else len(head.mean))
    trainer = Trainer(model, data, schedule, job.accelerator, snapshots, job.on_progress)
    course = trainer.run()
    base.restore_dtype()
    report = _report(job, data, trainer, course)
    if head is not None:
        assert model.head is not None
        head = replace(head, tensors=fold(model.head.network.cpu(), head.mean, head.scale))
    if not job.accelerator.is_main_process:
        return Checkpoint(job.policy)  # The caller reads what the first process has written.
    return _write(job, base, head, data.table, report)


def _report(job: Job, data: Lessons, trainer: Trainer, course: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth knowing of the result, in nats per token, on held-out texts if there are."""
    before: Losses = course["before"]
    after = trainer.measure(data.judged)
    report: dict[str, Any] = {
        "positions": sum(len(text.rows) for text in data.learnt),
        "held_out_positions": sum(len(text.rows) for text in data.held_out),
        "trained_weights": trainer.n_trained,
        "epochs": course["epoch"],
    }
    if isinstance(job.policy, CoLlmPolicy):
        report |= {"nll_nats": after.joint, "nll_nats_before": before.joint}
    return report | {
        "base_nll_nats": after.base,
        "base_nll_nats_before": before.base,
        "history": course["history"],
    }


def _write(
    job: Job, base: Base, head: Router | None, table: ScoreTable, report: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint's files, ``policy.yaml`` the last of them."""
    from multicolm.backend.identity import identity_of

    scratch = job.scratch / "weights"
    if job.how == "full":
        save_base(job.folder, base.model, base.tokenizer, scratch)
    else:
        save_adapter(job.folder, base.peft_model, job.base, scratch)
    trained = trained_base(job.base, job.how, job.folder)
    write_ensemble(job.folder, job.config, trained)
    was = table.identities[0]
    known = dict(zip(table.models, table.identities, strict=True))
    known[job.config.base_model] = identity_of(trained, base.commit)
    policy: Policy = job.policy
    if isinstance(job.policy, CoLlmPolicy):
        assert head is not None
        policy = replace(job.policy, head=Weights(head.tensors), made_for=known)
    provenance = training_provenance(
        job.scores,
        known,
        job.license,
        key=job.key,
        train_base=job.how,
        processes=job.accelerator.num_processes,
        base_model_was=was,
        base_model_is=trained.adapter or trained.model,
        options=dict(job.options),
        report=dict(report),
    )
    checkpoint = Checkpoint(policy, provenance, _summary(job))
    checkpoint.save_pretrained(job.folder)
    shutil.rmtree(job.folder / ".training", ignore_errors=True)
    return checkpoint.bound_to(job.folder)


def _summary(job: Job) -> str:
    base, source = job.config.base_model, Path(job.index.source).name
    what = "a LoRA adapter" if job.how == "lora" else "all weights"
    if isinstance(job.policy, SinglePolicy):
        who = f"Base model {base} alone, fine-tuned ({what}) on {source}"
    else:
        who = f"A co-llm policy and base model {base}, trained together ({what}) on {source}"
    return f"{who}; the folder is an ensemble, as in `multicolm generate ./FOLDER`."
