"""Exact next-token distributions, written by hand; for tests and for thinking."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import yaml

from multicolm.backend.base import Model, ModelOutput, TokenSession
from multicolm.config import ModelConfig
from multicolm.errors import ConfigError, InputError, ModelError
from multicolm.tokenizer.literal import LiteralTokenizer
from multicolm.types import Signal

__all__ = ["TableModel"]

Context = str | tuple[str, ...]


class TableModel(Model):
    """A model that looks up what comes next by the last tokens of the text.

        TableModel("coin", ["a", "b", "."], {"": {"a": 0.5, "b": 0.5}, "b": {".": 1.0}}, ends=["."])

    Args:
        name: the model's name.
        tokens: its vocabulary, in the order of the ids.
        table: what comes next after a context: one token, or a tuple of the last few tokens. The
            longest context that fits counts; ``""`` fits always and has to be there. Tokens that
            are not named have probability 0.
        ends: tokens that end a text; they are special and stand for no text.
        context_length: maximum number of tokens a text may have.

    Raises:
        ModelError: if a distribution does not sum to 1 (within 1e-6), names an unknown token, or
            ``""`` is missing.
    """

    signals: ClassVar[frozenset[Signal]] = frozenset({"top1", "topk", "logprobs"})

    def __init__(
        self,
        name: str,
        tokens: Sequence[str],
        table: Mapping[Context, Mapping[str, float]],
        ends: Sequence[str] = (),
        context_length: int | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = LiteralTokenizer(tokens, ends=ends, name=name)
        self.context_length = context_length
        ids = {token: i for i, token in enumerate(tokens)}
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        for context, distribution in table.items():
            place = (context,) if isinstance(context, str) and context else tuple(context)
            missing = [token for token in (*place, *distribution) if token not in ids]
            if missing:
                raise ModelError(
                    f"table '{name}': after {context!r}: {missing[0]!r} is no token; "
                    f"known: {', '.join(tokens)}."
                )
            if abs(sum(distribution.values()) - 1) > 1e-6 or min(distribution.values()) < 0:
                raise ModelError(
                    f"table '{name}': after {context!r}: probabilities must be >= 0 and sum to 1, "
                    f"got {dict(distribution)}."
                )
            probs = torch.zeros(len(tokens), dtype=torch.float64)
            for token, prob in distribution.items():
                probs[ids[token]] = prob
            self._rows[tuple(ids[token] for token in place)] = probs.log().float()
        if () not in self._rows:
            raise ModelError(f"table '{name}' has no entry \"\" for contexts that are not listed.")
        self._longest = max(len(context) for context in self._rows)

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> TableModel:
        """Read a table from a YAML file: ``{tokens: [...], ends: [...], table: {...}}``.

        Contexts of several tokens are written as one string with blanks between the tokens.

        Raises:
            ConfigError: if the file is missing or has another form.
        """
        path = Path(config.location)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            table = {
                (key if key in data["tokens"] else tuple(key.split())): dict(value)
                for key, value in data["table"].items()
            }
            tokens, ends = list(data["tokens"]), list(data.get("ends", ()))
        except OSError as error:
            raise ConfigError(f"model '{name}': cannot read {path}: {error.strerror}.") from error
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"model '{name}': {path} is no table; its form is "
                "{tokens: [a, b], ends: [b], table: {'': {a: 0.5, b: 0.5}}}."
            ) from error
        model = cls(name, tokens, table, ends, data.get("context_length"))
        model.identity = f"table:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        return model

    def open(self, n_rows: int) -> TableSession:
        """A session of ``n_rows`` empty rows."""
        return TableSession(self, n_rows)

    def logits_after(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after a text, in nats: [vocab]."""
        for length in range(min(self._longest, len(ids)), -1, -1):
            row = self._rows.get(tuple(ids[len(ids) - length :]))
            if row is not None:
                return row
        raise AssertionError("the empty context fits always")


class TableSession(TokenSession):
    """Texts that a table follows; there is nothing to cache."""

    def __init__(self, model: TableModel, n_rows: int) -> None:
        super().__init__(n_rows)
        self._model = model

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`."""
        if hidden:
            raise InputError(f"table '{self._model.name}' has no hidden states.")
        looked: list[torch.Tensor] = []
        for row, new, count in zip(rows, tokens, n_last, strict=True):
            ids = self._ids[row]
            ids.extend(new)
            looked.extend(
                self._model.logits_after(ids[: len(ids) - back])
                for back in range(count - 1, -1, -1)
            )
        return ModelOutput(torch.stack(looked))
