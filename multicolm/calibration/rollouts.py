"""Labels from what the text becomes: who should write, judged by texts that are finished.

A score table says whose first choice is the next token of the text. Where the base model's is
another one, that may not matter: the next token of the text may be one of several good ones. So
where the base model leaves the text of the corpus, and another model would write something else,
the text is finished after each of their tokens, by the same policy with the same seed, and judged
by the metric of a task: whoever's token leads to the best text was right. Elsewhere nothing is to
be found out: the base model writes what the corpus has, or all write the same.

Both papers that label so finish all alternatives in one way, too: R2R with the large model alone,
up to the end of the sentence; CITER with the policy as it is, up to the end of the text. Here it is
any policy of the ensemble, a model alone among them, up to the end of the text. What comes before
is the text of the corpus, as in R2R.

Source:
    R2R, arXiv 2505.21600, section 3; CITER, arXiv 2502.01976, section 3.2.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multicolm.decoding.prompts import encode_prompt
from multicolm.decoding.row import Row
from multicolm.decoding.threads import torch_threads
from multicolm.ensemble import Ensemble
from multicolm.errors import CapabilityError, InputError
from multicolm.evaluation.answering import Answering
from multicolm.evaluation.ledger import Ledger
from multicolm.evaluation.provenance import identity_of_policy
from multicolm.evaluation.task import Question, Task
from multicolm.files import locked
from multicolm.policy.base import Policy
from multicolm.scoring.numbers import Numbers
from multicolm.scoring.reading import Text, read_texts
from multicolm.scoring.store import (
    Rollouts,
    StoredTable,
    TableFiles,
    load_prompt_digests,
    read_index,
)
from multicolm.training.provenance import check_identities
from multicolm.types import prompt_digest

_STRIDE = 1_000_003

__all__ = ["Labels", "Plan", "Position", "label", "plan_rollouts"]


@dataclass(frozen=True, slots=True)
class Position:
    """A place of the corpus at which the base model leaves it, and another model differs from it.

    Attributes:
        shard: of the score table.
        row: of the shard's positions.
        question: that the text answers.
        before: tokens of the corpus that come before it, in the ensemble's vocabulary.
        gold: the one that stands there.
        choices: by model, its most likely token as the table has it: of a model of another
            vocabulary that is a name. Models that do not know the place are missing.
    """

    shard: int
    row: int
    question: Question
    before: tuple[int, ...]
    gold: int
    choices: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be finished.

    Attributes:
        positions: to be judged, in the order in which they are.
        n_texts: that finishing them takes; of models of several vocabularies about so many.
        n_candidates: such positions of the table.
        n_positions: of the table, in texts that are questions of the task.
    """

    positions: Sequence[Position]
    n_texts: int
    n_candidates: int
    n_positions: int


@dataclass(frozen=True, slots=True)
class Labels:
    """What roll-outs have found.

    Attributes:
        positions: that were judged.
        texts: that were finished.
        decided: positions at which one token led to a better text than another.
        base_right: positions at which no text was better than that after the base model's token,
            and one at least was not worth nothing.
        unlike_corpus: positions at which others are right than those whose first choice is the
            token that stands in the corpus.
        quality: mean over all texts.
        tokens: that were written to finish them.
    """

    positions: int
    texts: int
    decided: int
    base_right: int
    unlike_corpus: int
    quality: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """A flat dictionary of plain values."""
        return asdict(self)


def plan_rollouts(
    scores: str | Path,
    models: Sequence[str],
    task: Task,
    *,
    split: str = "train",
    limit: int = 2000,
    samples: int = 1,
    seed: int = 0,
) -> Plan:
    """Choose at random which positions are judged; no model is loaded.

    Args:
        scores: folder of a finished score table of these models.
        models: names, the base model first.
        task: whose questions the corpus answers.
        split: which of them; never its test split.
        limit: the most texts that are finished.
        samples: texts that are finished after each token.
        seed: of the choice; with a larger limit the same positions come first.

    Raises:
        ArtefactError: if the table is damaged, not finished, or of other models.
        InputError: if the split is for testing, no text of the table is a question of it, or there
            is no such position.
    """
    questions = _questions(task, split)
    table = StoredTable(scores, models)
    asked = [questions.get(digest) for digest in load_prompt_digests(scores)]
    is_asked = torch.tensor([question is not None for question in asked])
    candidates: list[Tensor] = []
    n_positions = 0
    for shard, columns in enumerate(table.shards()):
        here = columns.begins & is_asked[columns.text["example"].long()] & columns.known[:, 0]
        n_positions += int(here.sum())
        base, gold = columns.top1_ids[:, 0], columns.text["gold_ids"].long()
        differs = columns.known & (columns.top1_ids != base[:, None])
        rows = (here & differs.any(-1) & (base != gold)).nonzero()[:, 0]
        candidates.append(torch.stack([torch.full_like(rows, shard), rows], dim=1))
    found = torch.cat(candidates)
    if not n_positions:
        raise InputError(
            f"no text of {scores} is a question of task '{task.name}' ({split}): their prompts "
            "differ. Score the questions' own prompts, or choose another split with --split."
        )
    if not len(found):
        raise InputError(
            f"nothing is to be judged: at none of the {n_positions} tokens of {scores} is the "
            f"first choice of {models[0]} another one than the corpus's and than another model's."
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    chosen: list[Position] = []
    n_texts = 0
    for shard, row in found[order[: limit // (2 * samples)]].tolist():
        position = _position(table, shard, row, asked)
        n_more = samples * len(set(position.choices.values()))
        if n_texts + n_more > limit:
            break
        chosen.append(position)
        n_texts += n_more
    if not chosen:
        raise InputError(f"the limit of {limit} texts is less than one position takes.")
    return Plan(chosen, n_texts, len(found), n_positions)


def _position(
    table: StoredTable, shard: int, row: int, asked: Sequence[Question | None]
) -> Position:
    columns = table.shard(shard)
    question = asked[int(columns.text["example"][row])]
    assert question is not None
    place = int(columns.text["place"][row])
    known, tokens = columns.known[row].tolist(), columns.top1_ids[row].tolist()
    return Position(
        shard,
        row,
        question,
        tuple(columns.text["gold_ids"][row - place : row].tolist()),
        int(columns.text["gold_ids"][row]),
        {
            n: token
            for n, token, is_known in zip(table.models, tokens, known, strict=True)
            if is_known
        },
    )


def _questions(task: Task, split: str) -> dict[str, Question]:
    """The questions of a split that is not for testing, by the digests of their prompts."""
    found: dict[str, Question] = {}
    for question in task.development(split):
        for digest in (question.fingerprint, prompt_digest(question.asked)):
            found.setdefault(digest, question)
    return found


def label(
    ensemble: Ensemble,
    scores: str | Path,
    task: Task,
    plan: Plan,
    *,
    policy: Policy,
    split: str = "train",
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Labels:
    """Finish the texts of a plan, judge them, and write the labels beside the scores.

    Every text is kept as soon as it is finished and judged; the same call resumes after them, and
    one with a larger plan, too. The labels of the last call are in the table.

    Args:
        ensemble: whose models write.
        scores: folder of the score table.
        task: judges the texts.
        plan: what is to be finished; see :func:`plan_rollouts`.
        policy: finishes the texts.
        split: of the task.
        samples: texts that are finished after each token; more than one where tokens are drawn.
        seed: of everything random; the texts after all tokens of a position have the same.
        batch_size: how many texts are written at a time.
        max_new_tokens: the most tokens of a text, those of the corpus included; the task's if not
            given.
        on_progress: called with how many texts are done, of how many.

    Raises:
        ArtefactError: if the table is of other models.
        CapabilityError: if the policy does not fit the ensemble, or does not write in tokens.
        InputError: if several samples would be equal, or another process labels the table.
        ServerError: if a model's server fails for good; what was finished is kept.
    """
    run = Answering(
        ensemble, task, (), seed=seed, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    _check(ensemble, policy, samples, run.sampling.greedy)
    index = read_index(scores)
    mine = {model.name: model.identity for model in ensemble.backends}
    check_identities(mine, {m.name: m.identity for m in index.models}, str(scores))
    header = run.header("rollout", split, task.digest(split)) | {
        "policy": identity_of_policy(policy),
        "corpus": index.digest,
    }
    name = hashlib.sha256(json.dumps(header, sort_keys=True, default=str).encode()).hexdigest()[:12]
    with (
        locked(Path(scores)),
        Ledger.open(Path(scores) / ".rollouts" / name / "ledger.jsonl", header) as ledger,
    ):
        writer = _Finisher(ensemble, policy, task, run, ledger, batch_size)
        named = writer.named(plan.positions)
        texts = list(_texts(plan.positions, named, samples))
        writer.finish(texts, seed, on_progress)
        ledger.sync()
        found, labels = _labels(plan.positions, named, samples, ledger, ensemble.models)
        found.write(TableFiles(Path(scores), index))
    return labels


def _check(ensemble: Ensemble, policy: Policy, samples: int, greedy: bool) -> None:
    ensemble.check(policy)
    if ensemble.written_in(policy) is not ensemble.vocabulary:
        raise CapabilityError(
            f"policy '{policy.name}' writes in {policy.support}, and texts are to be finished "
            "after tokens; choose a policy that writes tokens."
        )
    if policy.keeps_state:
        raise CapabilityError(
            f"policy '{policy.name}' remembers how a text was written, and the beginning of these "
            "was not written by it; choose another policy to finish them."
        )
    if samples > 1 and greedy:
        raise InputError(
            f"{samples} texts after one token are equal where nothing is drawn; set a temperature "
            "in the ensemble file, or take one sample."
        )


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A text to be finished.

    Attributes:
        position: where.
        token: that stands there.
        writer: index of the first model whose token it is.
        sample: number of the text after this token.
    """

    position: Position
    token: int
    writer: int
    sample: int

    @property
    def key(self) -> str:
        """What it is kept under."""
        return f"{self.position.shard}:{self.position.row} {self.token} {self.sample}"


def _texts(
    positions: Sequence[Position], named: Sequence[Mapping[int, int]], samples: int
) -> Iterator[_Unfinished]:
    for position, tokens in zip(positions, named, strict=True):
        writers: dict[int, int] = {}
        for k, token in tokens.items():
            writers.setdefault(token, k)
        for token, writer in writers.items():
            for sample in range(samples):
                yield _Unfinished(position, token, writer, sample)


class _Finisher:
    """Finishes texts with one policy, and keeps what they came to.

    Args:
        ensemble: whose models write.
        policy: says who.
        task: judges.
        run: knows the settings.
        ledger: keeps the texts.
        batch_size: how many are written at a time.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        policy: Policy,
        task: Task,
        run: Answering,
        ledger: Ledger,
        batch_size: int,
    ) -> None:
        self._ensemble = ensemble
        self._task = task
        self._settings = run.settings
        self._ledger = ledger
        self._batch_size = batch_size
        self._live = ensemble.live(policy, n_slots=batch_size)

    def named(self, positions: Sequence[Position]) -> list[dict[int, int]]:
        """Per position, by model index the token that the model would write."""
        models, groups = self._ensemble.models, self._ensemble.vocabulary.groups
        named = [
            {models.index(name): token for name, token in position.choices.items()}
            for position in positions
        ]
        for k in range(len(models)):
            # In the table a token of another vocabulary is a name, or stands for what it spells.
            here = [i for i, tokens in enumerate(named) if groups[k] and k in tokens]
            for i, token in zip(
                here, self._first_choices(k, [positions[i] for i in here]), strict=True
            ):
                if token is None:
                    del named[i][k]
                else:
                    named[i][k] = token
        return named

    def _first_choices(self, k: int, positions: Sequence[Position]) -> list[int | None]:
        """What a model would write; ``None`` where a token of its own lies across the place."""
        vocabulary, model = self._ensemble.vocabulary, self._ensemble.backends[k]
        numbers = Numbers(model, k, vocabulary, None, (), 0)
        texts = [
            Text(
                encode_prompt(position.question.asked, k, model, vocabulary),
                [*position.before, position.gold],
            )
            for position in positions
        ]
        found: dict[int, int] = {}
        for reading in read_texts(model, k, vocabulary, texts):
            top1 = numbers.of(reading, torch.zeros_like(reading.numbers))["top1_ids"].tolist()
            places = zip(reading.numbers.tolist(), reading.places.tolist(), strict=True)
            for (number, place), token in zip(places, top1, strict=True):
                if place == len(positions[number].before):
                    found[number] = token
        return [found.get(i) for i in range(len(positions))]

    def finish(
        self, texts: Sequence[_Unfinished], seed: int, on_progress: Callable[[int, int], None]
    ) -> None:
        """Finish those that are not in the ledger."""
        waiting = deque(text for text in texts if text.key not in self._ledger)
        n_done = len(texts) - len(waiting)
        on_progress(n_done, len(texts))
        at_work: dict[Row, _Unfinished] = {}
        with torch_threads(self._ensemble.backends, self._settings.threads):
            while waiting or at_work:
                done: list[Row] = []
                while waiting and len(at_work) < 2 * self._batch_size:
                    text = waiting.popleft()
                    row = self._begun(text, seed)
                    at_work[row] = text
                    if row.finish_reason is None:
                        self._live.add(row)
                    else:
                        done.append(row)
                self._live.step()
                for row in [*done, *self._live.finished()]:
                    self._keep(at_work.pop(row), row)
                    n_done += 1
                    on_progress(n_done, len(texts))

    def _begun(self, text: _Unfinished, seed: int) -> Row:
        """The text of the corpus up to the position, and the token."""
        position = text.position
        # Equal chances after each token of a position; others for another sample.
        chances = (seed + text.sample * _STRIDE) % (1 << 63)
        row = self._live.row(position.question.asked, 0, self._settings, chances)
        before = [(token, 0) for token in position.before]
        self._live.resume(row, [*before, (text.token, text.writer)])
        return row

    def _keep(self, text: _Unfinished, row: Row) -> None:
        quality = self._task.score(row.text.content, text.position.question)
        record = {
            "quality": quality,
            "text": row.text.text,
            "finish_reason": row.finish_reason,
            "tokens": len(row.written) - len(text.position.before) - 1,
        }
        self._ledger.append(text.key, record)


def _labels(
    positions: Sequence[Position],
    named: Sequence[Mapping[int, int]],
    samples: int,
    ledger: Ledger,
    models: Sequence[str],
) -> tuple[Rollouts, Labels]:
    """What the finished texts came to, per position and model."""
    quality = torch.full((len(positions), len(models)), float("nan"))
    correct = torch.zeros(quality.shape, dtype=torch.bool)
    found: list[Mapping[str, Any]] = []
    for i, (position, tokens) in enumerate(zip(positions, named, strict=True)):
        records: dict[int, list[Mapping[str, Any]]] = {}
        for text in _texts([position], [tokens], samples):
            records.setdefault(text.token, []).append(ledger.get(text.key))
        for k, token in tokens.items():
            quality[i, k] = sum(record["quality"] for record in records[token]) / samples
            correct[i, k] = token == position.gold
        found += [record for same in records.values() for record in same]
    known = quality.nan_to_num(-1.0)
    best = known == known.amax(-1, keepdim=True)
    judged = known.amax(-1) > 0
    decided = quality.nan_to_num(2.0).amin(-1) < known.amax(-1)
    labels = Labels(
        positions=len(positions),
        texts=len(found),
        decided=int(decided.sum()),
        base_right=int((best[:, 0] & judged).sum()),
        unlike_corpus=int((judged & (best != correct).any(-1)).sum()),
        quality=sum(record["quality"] for record in found) / len(found),
        tokens=sum(record["tokens"] for record in found),
    )
    rollouts = Rollouts(
        torch.tensor([position.shard for position in positions]),
        torch.tensor([position.row for position in positions]),
        {name: quality[:, k].contiguous() for k, name in enumerate(models)},
    )
    return rollouts, labels
