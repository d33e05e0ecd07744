"""Reads written texts with all models once more, to show what each thought of every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multicolm.decoding.prompts import encode_prompt
from multicolm.decoding.sampling import Sampling
from multicolm.ensemble import Ensemble
from multicolm.errors import InputError, PolicyError
from multicolm.evaluation.results import ShownToken, TracedAnswer
from multicolm.evaluation.task import Question
from multicolm.policy.base import Policy
from multicolm.scoring.reading import Seen, Text, read_all
from multicolm.types import MIXTURE, finite
from multicolm.views import View, Views

__all__ = ["Explainer"]

_N_TOP = 3
# The most numbers that all models' logits may hold while written texts are read; 256 MiB.
_MAX_LOGITS = 1 << 26


class Explainer:
    """Reads written texts with all models, teacher forced.

    Attributes:
        warnings: what a reader of the traces has to know.
    """

    def __init__(self, ensemble: Ensemble, sampling: Sampling) -> None:
        self.warnings: list[str] = []
        self._ensemble = ensemble
        self._sampling = sampling

    def explain(
        self, row: str, policy: Policy, asked: Sequence[tuple[Question, Mapping[str, Any]]]
    ) -> Iterator[TracedAnswer]:
        """Traces of some answers of one row.

        Args:
            row: its name.
            policy: that wrote them.
            asked: questions and what the ledger holds of their answers.
        """
        for batch in self._batches(asked):
            seen = self._see(batch, policy)
            flat = [token for _, record in batch for token in record["tokens"]]
            models = self._models(seen, [token[0] for token in flat])
            probs = self._probs(policy, seen, batch)
            shown = [
                ShownToken(text, model, _rounded(logprob), _rounded(score), models[i], probs[i])
                for i, (_, text, model, logprob, score) in enumerate(flat)
            ]
            start = 0
            for question, record in batch:
                end = start + len(record["tokens"])
                yield TracedAnswer(
                    row=row,
                    question=question.id,
                    prompt=question.prompt,
                    gold=question.gold,
                    text=record["text"],
                    quality=record["quality"],
                    finish_reason=record["finish_reason"],
                    tokens=tuple(shown[start:end]),
                )
                start = end

    def _batches(
        self, asked: Sequence[tuple[Question, Mapping[str, Any]]]
    ) -> Iterator[list[tuple[Question, Mapping[str, Any]]]]:
        """Answers whose logits fit into memory together; one at least."""
        budget = _MAX_LOGITS // (self._ensemble.vocabulary.size * len(self._ensemble.models))
        batch: list[tuple[Question, Mapping[str, Any]]] = []
        n_tokens = 0
        for question, record in asked:
            n_tokens += len(record["tokens"])
            if batch and n_tokens > budget:
                yield batch
                batch, n_tokens = [], len(record["tokens"])
            batch.append((question, record))
        if batch:
            yield batch

    def _see(
        self, batch: Sequence[tuple[Question, Mapping[str, Any]]], policy: Policy
    ) -> dict[int, Seen]:
        """What every model that can read these prompts predicts."""
        needs = policy.needs(self._ensemble.models)
        names = [*self._ensemble.models, MIXTURE]
        seen = {}
        for k, model in enumerate(self._ensemble.backends):
            if model.max_top_logprobs is not None:
                self._warn(
                    f"Traces do not show model '{model.name}': its server returns its likeliest "
                    "tokens only."
                )
                continue
            try:
                texts = [
                    Text(
                        encode_prompt(question.asked, k, model, self._ensemble.vocabulary),
                        [token[0] for token in record["tokens"]],
                        [names.index(token[2]) for token in record["tokens"]],
                    )
                    for question, record in batch
                ]
            except InputError as error:
                self._warn(f"Traces do not show model '{model.name}': {error}")
                continue
            hidden = "hidden" in needs.of(k)
            seen[k] = read_all(model, k, self._ensemble.vocabulary, texts, hidden=hidden)
        return seen

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def _models(self, seen: Mapping[int, Seen], ids: Sequence[int]) -> list[dict[str, Any]]:
        """Per position and model: the written token's log-probability, and the likeliest tokens."""
        vocabulary = self._ensemble.vocabulary
        shown: list[dict[str, Any]] = [{} for _ in ids]
        for k, model in seen.items():
            logprobs = model.logits.log_softmax(-1)
            written = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
            top = logprobs.topk(min(_N_TOP, vocabulary.size), dim=-1)
            lines = zip(top.values.exp().tolist(), top.indices.tolist(), strict=True)
            for i, (probs, tokens) in enumerate(lines):
                if model.known[i]:
                    shown[i][self._ensemble.models[k]] = {
                        "logprob": _rounded(finite(written[i])),
                        "top": [
                            [vocabulary.name(token), round(prob, 6)]
                            for token, prob in zip(tokens, probs, strict=True)
                        ],
                    }
        return shown

    def _probs(
        self,
        policy: Policy,
        seen: Mapping[int, Seen],
        batch: Sequence[tuple[Question, Mapping[str, Any]]],
    ) -> list[dict[str, float]]:
        """Per position, with what probability the policy lets each model write."""
        ensemble = self._ensemble
        n_positions = sum(len(record["tokens"]) for _, record in batch)
        found: list[dict[str, float]] = [{} for _ in range(n_positions)]
        always = policy.needs(ensemble.models).always
        # What it knows of a text beside its tokens is not kept with the answers.
        by_text = policy.keeps_state or policy.prompts or policy.likelihoods
        by_text = by_text or bool(policy.prompt_states(ensemble.models))
        none = type(policy).model_probs is Policy.model_probs
        if none or by_text or not set(always) <= set(seen):
            return found
        known = torch.ones(n_positions, dtype=torch.bool)
        for k in always:
            known &= seen[k].known
        which = known.nonzero()[:, 0]
        probs = policy.model_probs(self._views(policy, seen, batch, which))
        if probs is None:
            return found
        if probs.shape != (len(which), len(self._ensemble.models)):
            raise PolicyError(
                f"policy '{policy.name}': `model_probs` gave {tuple(probs.shape)} numbers; "
                f"expected [positions, models], here "
                f"{(len(which), len(self._ensemble.models))}."
            )
        for i, line in zip(which.tolist(), probs.tolist(), strict=True):
            found[i] = {
                name: round(prob, 6) for name, prob in zip(self._ensemble.models, line, strict=True)
            }
        return found

    def _views(
        self,
        policy: Policy,
        seen: Mapping[int, Seen],
        batch: Sequence[tuple[Question, Mapping[str, Any]]],
        which: Tensor,
    ) -> Views:
        """What the policy was shown at the positions numbered ``which``."""
        ensemble, needs = self._ensemble, policy.needs(self._ensemble.models)
        views = {}
        for k in needs.always:
            states = seen[k].hidden
            views[k] = View(
                seen[k].logits[which],
                None if states is None else states[which],
                signals=needs.of(k),
                name=ensemble.models[k],
                embed=self._embed(k),
            )
        names = [*ensemble.models, MIXTURE]
        past = [
            place
            for _, record in batch
            for place in _past([names.index(token[2]) for token in record["tokens"]])
        ]
        columns = torch.tensor(past)[which].unbind(-1)
        return Views(
            ensemble.models,
            views,
            n_positions=len(which),
            context={
                name: lambda column=column: column  # type: ignore[misc]
                for name, column in zip(("previous", "base_run", "place"), columns, strict=True)
            },
            drawn=self._sampling.probs,
            starts_word=ensemble.vocabulary.starts_word,
            costs=ensemble.costs,
        )

    def _embed(self, k: int) -> Callable[[Tensor], Tensor]:
        model, vocabulary = self._ensemble.backends[k], self._ensemble.vocabulary
        return lambda ids: model.embed(vocabulary.own_ids(k, ids)).cpu()


def _past(writers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Per place of a text: who wrote the token before, the base model's run up to it, the place."""
    previous, run = -1, 0
    for place, writer in enumerate(writers):
        yield previous, run, place
        previous, run = writer, run + 1 if writer == 0 else 0


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
