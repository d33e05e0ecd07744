"""Trains policies that choose once per prompt, on judged answers of every model alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.artefacts import Artefact
from multicolm.backend.checked import open_session
from multicolm.backend.passes import run_alone
from multicolm.decoding.prompts import encode_prompt
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Sampling
from multicolm.decoding.text import TextStream
from multicolm.decoding.token_reader import TokenReader
from multicolm.ensemble import Ensemble
from multicolm.errors import CapabilityError
from multicolm.evaluation.answering import Answering, Progress, plans_alone
from multicolm.evaluation.estimate import OnEstimate, announce
from multicolm.evaluation.ledger import Ledger
from multicolm.evaluation.task import Task
from multicolm.learning.queries import JudgedAnswers
from multicolm.learning.training import Training
from multicolm.policy.base import Policy
from multicolm.training.checkpoint import Checkpoint, made_once, unfinished
from multicolm.types import Pooling, Prompt
from multicolm.version import __version__

__all__ = ["prompt_states", "train_on_answers"]


def train_on_answers(
    ensemble: Ensemble,
    policy: Policy,
    task: Task,
    out: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    license: str = "",
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[Progress], None] = lambda _: None,
    on_progress: Callable[[float, float, str], None] = lambda done, total, label: None,
    on_estimate: OnEstimate | None = None,
) -> Checkpoint:
    """Let every model alone answer a task's questions, and train a policy on how well each did.

    Answers are kept as they are judged; the same call resumes where it was stopped.

    Args:
        ensemble: whose models answer.
        policy: of a kind that has a method ``fit_answers(answers, training)``, such as
            ``query-router``; see :class:`multicolm.learning.queries.JudgedAnswers`. Of its
            ``prompt_states`` the base model's are read, and without any no prompt is.
        task: questions and how answers are judged.
        out: folder of the checkpoint.
        split: which of the task's data; never ``test``.
        limit: only this many questions, spread evenly over the data.
        options: of the training; which there are is the policy's business.
        license: of the checkpoint, an SPDX name, for its card.
        seed: of everything random.
        batch_size: how many texts are written at a time.
        progress: called after every answer.
        on_progress: called with what is being done after that.
        on_estimate: called first, with what the answers take at most.

    Raises:
        CapabilityError: if the policy does not learn from answers, or the base model shows no
            hidden states.
        InputError: if the split is the test split or shares questions with it, or a question
            cannot be asked or judged.
        ArtefactError: if ``out`` holds another checkpoint.
        TrainingError: if there is too little to learn from.
    """
    fit = _learns_from_answers(policy, ensemble)
    folder = Path(out)
    questions = task.development(split, limit)
    run = Answering(ensemble, task, questions, seed=seed, batch_size=batch_size, progress=progress)
    run.n_rows = len(ensemble.models)
    announce(on_estimate, run, ((plan, 1) for plan in plans_alone(ensemble)))
    header = run.header("train", split, task.digest(split))
    key = _key(policy, header, ensemble.costs, limit, options or {})

    def make() -> Checkpoint:
        quality, lengths = _judged(run, unfinished(folder) / "ledger.jsonl", header)
        on_progress(0, 0, "prompts")
        answers = JudgedAnswers(
            tuple(ensemble.models),
            tuple(model.identity for model in ensemble.backends),
            tuple(ensemble.costs),
            _states(ensemble, policy, [q.asked for q in questions], batch_size),
            quality,
            lengths,
        )
        training = Training(options or {}, None, on_progress)
        fitted = fit(answers, training)
        facts = {
            "source": f"answers to {task.name} ({split})",
            "digest": header["digest"],
            "examples": len(questions),
            "key": key,
            "options": dict(options or {}),
            "report": training.report,
            "prompts": [question.fingerprint for question in questions],
        }
        summary = f"A {policy.name} policy, trained on answers to {task.name}."
        return Checkpoint(fitted, _provenance(ensemble, license, facts), summary)

    return made_once(folder, key, make)


def _learns_from_answers(
    policy: Policy, ensemble: Ensemble
) -> Callable[[JudgedAnswers, Training], Policy]:
    """The policy's method that learns; what would stop it later is refused now."""
    fit = getattr(policy, "fit_answers", None)
    if fit is None:
        raise CapabilityError(
            f"policy '{policy.name}' does not learn from judged answers: it has no method "
            "`fit_answers`. Score texts with `multicolm score`, and give that folder."
        )
    if policy.prompt_states(ensemble.models) and "hidden" not in ensemble.backends[0].shows:
        raise CapabilityError(
            f"policy '{policy.name}' reads the hidden state that base model "
            f"'{ensemble.models[0]}' has of the prompt, and its backend shows none."
        )
    return cast("Callable[[JudgedAnswers, Training], Policy]", fit)


def _judged(
    run: Answering, path: Path, header: Mapping[str, Any]
) -> tuple[Float[Tensor, "prompts models"], Int[Tensor, "prompts models"]]:
    """How good and how long every model's answers are; they are kept in a ledger."""
    plans = plans_alone(run.ensemble)
    run.check(plans)
    with Ledger.open(path, header) as ledger:
        run.ledger = ledger
        quality = torch.tensor([run.row(plan).qualities for plan in plans])
        lengths = [[len(answer["text"]) for answer in run.answers(plan)] for plan in plans]
        return quality.T.contiguous(), torch.tensor(lengths).T.contiguous()


def _states(
    ensemble: Ensemble, policy: Policy, prompts: Sequence[Prompt], batch_size: int
) -> Float[Tensor, "prompts hidden"]:
    """The base model's states that a policy reads; of width 0 if it reads none."""
    wanted = policy.prompt_states(ensemble.models).get(0)
    if not wanted:
        return torch.zeros(len(prompts), 0)
    return prompt_states(ensemble, prompts, min(wanted), batch_size)


def prompt_states(
    ensemble: Ensemble, prompts: Sequence[Prompt], pooling: Pooling, batch_size: int = 16
) -> Float[Tensor, "prompts hidden"]:
    """The base model's last hidden states of some prompts, as a policy sees them.

    Args:
        ensemble: whose base model reads.
        prompts: as they are asked.
        pooling: how the states of a prompt's tokens become one.
        batch_size: how many are read at a time.
    """
    model, vocabulary = ensemble.backends[0], ensemble.vocabulary
    found: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        rows = [
            Row(
                number=slot,
                prompt=prompt,
                prompt_ids=[encode_prompt(prompt, 0, model, vocabulary)],
                key=0,
                seed=None,
                max_new_tokens=1,
                text=TextStream(()),
                draft_length=1,
                sampling=Sampling(),
                slot=slot,
                models=(0,),
            )
            for slot, prompt in enumerate(prompts[start : start + batch_size])
        ]
        reader = TokenReader(model, 0, vocabulary, open_session(model, len(rows)))
        for row in rows:
            reader.start(row)
        found.append(run_alone(reader.prompt_hidden(rows, {pooling}))[pooling].cpu())
    return torch.cat(found)


def _key(
    policy: Policy,
    header: Mapping[str, Any],
    costs: Sequence[float],
    limit: int | None,
    options: Mapping[str, Any],
) -> str:
    """What decides the checkpoint; neither versions nor the size of batches do."""
    config = policy.as_config()
    params = {k: v for k, v in config["params"].items() if not isinstance(v, Artefact)}
    shared = {k: v for k, v in header.items() if k not in ("versions", "batch_size")}
    facts = [config["kind"], params, shared, list(costs), limit, dict(options)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _provenance(ensemble: Ensemble, license: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    models = [{"name": m.name, "identity": m.identity} for m in ensemble.backends]
    return {
        "multicolm": __version__,
        "models": models,
        "license": license,
        "train": dict(facts),
    }
