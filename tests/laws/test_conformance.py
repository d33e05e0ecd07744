"""One comparison for every way of serving a model; and proof that each of its laws bites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_models import PROMPTS, Uncached, model, network, shared_tokenizer, uncached

from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.testing import LawBroken, check_against
from multicolm.tokenizer.base import TokenizerAdapter


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "lfm2", "bloom", "mamba"])
def test_caches_of_every_kind_give_what_whole_texts_give(kind: str) -> None:
    seen = check_against(model(kind), uncached(kind), texts=PROMPTS[:4], tolerance=1e-4)
    assert seen.n_positions > 150 and seen.n_unknown == 0


@pytest.mark.parametrize("name", ["generalist", "facts", "math"])
def test_the_embedded_models_write_their_answers_to_the_end_alike(
    name: str, embedded: dict[str, TransformersModel]
) -> None:
    one = embedded[name]
    whole = Uncached(name, one.model, one.tokenizer._tokenizer)
    texts = ["What is Dulerex made from?", "Question: What is 3 + 4?\nResponse:"]
    assert check_against(one, whole, texts=texts).greatest <= 1e-5


@pytest.fixture(scope="module")
def embedded() -> dict[str, TransformersModel]:
    from multicolm import load

    return {m.name: m for m in load("tiny").backends if isinstance(m, TransformersModel)}


def without_attention() -> Any:
    """A network in which a token knows nothing but the token before it."""
    import copy

    changed: Any = copy.deepcopy(network("llama"))
    for layer in changed.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return changed


def test_a_table_read_off_a_network_that_sees_one_token_is_that_network() -> None:
    tokenizer = shared_tokenizer()
    reference = TransformersModel("network", without_attention(), tokenizer)
    names = [f"t{i}" for i in range(len(tokenizer))]
    session = reference.open(len(names))
    every = session.feed(range(len(names)), [[i] for i in range(len(names))], [1] * len(names))
    # A table is of numbers that sum to 1 in double precision.
    rows = every.logits[:, : len(names)].double().softmax(-1).tolist()
    table: dict[Any, Any] = {
        name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)
    }
    table[""] = dict.fromkeys(names, 1 / len(names))
    exact = TableModel("table", names, table)
    # The names of a table's tokens are its own; what follows which is compared.
    exact.tokenizer = reference.tokenizer
    assert check_against(exact, reference, texts=()).greatest <= 1e-5


@dataclass
class Bent(Session):
    """A session that does what it should, but for one thing."""

    inner: Session
    fault: str
    n_looks: int = 0

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        return self.inner.lengths

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        output = self.inner.feed(rows, tokens, n_last, hidden=hidden)
        self.n_looks += 1
        if self.fault == "warm" and self.n_looks > 1 and len(rows) == 1 and n_last == [1]:
            return replace(output, logits=output.logits / 1.1)
        if self.fault == "inner positions" and max(n_last) > 1:
            return replace(output, logits=output.logits.roll(1, 0))
        if self.fault == "rows" and len(rows) > 1:
            return replace(output, logits=output.logits.flip(0))
        if self.fault.startswith("top 5"):
            top = output.logits.log_softmax(-1).topk(6)
            kept = slice(1, 6) if self.fault == "top 5 but the first" else slice(0, 5)
            told = top.values[:, kept]
            if self.fault == "top 5 made to sum to 1":
                told = told.log_softmax(-1)
            nothing = torch.full_like(output.logits, float("-inf"))
            return replace(output, logits=nothing.scatter(1, top.indices[:, kept], told))
        if self.fault == "last only":
            return replace(output, logits=output.logits[-1:])
        if self.fault == "nan":
            return replace(output, logits=output.logits * float("nan"))
        return output

    def truncate(self, row: int, length: int) -> None:
        if self.fault == "stale" and 0 < length < self.inner.lengths[row]:
            # The place is right, and what stands there is not.
            self.inner.truncate(row, length - 1)
            self.inner.feed([row], [[0]], [1])
            return
        self.inner.truncate(row, length)


class Faulty(Model):
    def __init__(self, fault: str) -> None:
        self._inner = model("llama")
        self._fault = fault
        self.name = "faulty"
        self.tokenizer: TokenizerAdapter = self._inner.tokenizer
        self.context_length = self._inner.context_length
        self.max_top_logprobs = 5 if fault.startswith("top 5") else None

    def open(self, n_rows: int) -> Session:
        return Bent(self._inner.open(n_rows), self._fault)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("warm", "as likely"),
        ("inner positions", "score the same"),
        ("rows", "do not touch each other"),
        ("stale", "after a roll-back"),
        ("last only", "shows the positions that were asked for"),
        ("nan", "as likely"),
        ("top 5 but the first", "shows the likeliest"),
        ("top 5 made to sum to 1", "as likely"),
    ],
)
def test_a_model_that_differs_in_one_thing_is_caught_by_that_law(fault: str, law: str) -> None:
    with pytest.raises(LawBroken, match=law):
        check_against(Faulty(fault), model("llama"), texts=PROMPTS[:1])
    check_against(Faulty("none"), model("llama"), texts=PROMPTS[:1])


def test_of_a_model_that_tells_of_its_likeliest_tokens_these_are_compared() -> None:
    seen = check_against(Faulty("top 5"), model("llama"), texts=PROMPTS[:1])
    n_tokens = model("llama").tokenizer.n_tokens
    assert seen.n_unknown == seen.n_positions * (n_tokens - 5)


def test_other_weights_are_caught() -> None:
    with pytest.raises(LawBroken, match="as likely"):
        check_against(model("llama", seed=1), model("llama"))


class OtherTokens:
    """A tokenizer adapter that differs in one thing."""

    def __init__(self, inner: TokenizerAdapter, **replaced: Any) -> None:
        self._inner, self._replaced = inner, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name, getattr(self._inner, name))


@pytest.mark.parametrize(
    ("replaced", "law"),
    [
        ({"token_bytes": lambda i: b"?"}, "same ids are the same tokens"),
        ({"encode": lambda text: [1, 2]}, "cut into the same tokens"),
        ({"encode_continuation": lambda text: [1, 2]}, "cut into the same tokens"),
    ],
)
def test_another_tokenizer_is_caught(replaced: dict[str, Any], law: str) -> None:
    faulty: Any = Faulty("none")
    faulty.tokenizer = OtherTokens(faulty.tokenizer, **replaced)
    with pytest.raises(LawBroken, match=law):
        check_against(faulty, model("llama"), texts=PROMPTS[:2])


def test_a_model_that_does_not_know_the_end_of_a_text_is_caught(
    embedded: dict[str, TransformersModel],
) -> None:
    reference: Any = embedded["generalist"]
    faulty: Any = Faulty("none")
    faulty._inner = reference
    faulty.tokenizer = OtherTokens(reference.tokenizer, end_ids=frozenset({5}))
    with pytest.raises(LawBroken, match="ends where the reference ends it"):
        check_against(faulty, reference, texts=["What is Dulerex made from?"])


def test_every_number_counts_down_to_the_least_likely_token() -> None:
    class Floored(Bent):
        def feed(self, *args: Any, **kwargs: Any) -> ModelOutput:
            output = self.inner.feed(*args, **kwargs)
            logprobs = output.logits.log_softmax(-1)
            return replace(output, logits=logprobs.clamp_min(-9.0))

    faulty: Any = Faulty("none")
    faulty.open = lambda n: Floored(model("llama").open(n), "none")
    assert float(torch.tensor(-9.0).exp()) < 2e-4
    with pytest.raises(LawBroken, match="as likely"):
        check_against(faulty, model("llama"), texts=PROMPTS[:1])
