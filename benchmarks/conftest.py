"""Models to measure, and the table of ratios that a run ends with.

Seconds on a shared machine say little, so every comparison runs both sides in turn, round by round,
and reports the ratio of their medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import multicolm
from multicolm import Ensemble
from multicolm.backend.transformers import TransformersModel
from multicolm.catalog import registry

ROUNDS = 7


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The sides that call models directly run like multicolm does: one thread for small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Ensemble:
    """The embedded models: 0.3 to 0.4 million weights each."""
    return multicolm.load("tiny")


@pytest.fixture(scope="session")
def medium() -> Ensemble:
    """A random Llama of 5 million weights and one of 19 million, with the embedded tokenizer.

    At this size a forward pass is mostly arithmetic; at the size of the embedded models it is
    mostly Python. Outputs are scaled to be about as peaked as a trained model's. The assistant is
    the base model with twelve more layers that change little, so that the two agree on most tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(registry() / "tiny" / "generalist")

    def config(n_layers: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=768,
            hidden_size=320,
            intermediate_size=864,
            num_hidden_layers=n_layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=None,
        )

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config(4))
    base.get_output_embeddings().weight.data.mul_(12)
    assistant = AutoModelForCausalLM.from_config(config(16))
    assistant.load_state_dict(base.state_dict(), strict=False)
    for layer in assistant.model.layers[4:]:
        layer.self_attn.o_proj.weight.data.mul_(0.1)
        layer.mlp.down_proj.weight.data.mul_(0.1)
    return Ensemble(
        [
            TransformersModel(name, model, tokenizer)
            for name, model in (("base", base), ("assistant", assistant))
        ]
    )


@dataclass(frozen=True)
class Ratio:
    """One line of the final table."""

    what: str
    against: str
    ratio: float
    aim: str


_RATIOS: list[Ratio] = []


@pytest.fixture
def compare(benchmark: object) -> Callable[..., float]:
    """Run two callables in turn and note the ratio of their median times (first over second)."""

    def run(
        one: Callable[[], object],
        other: Callable[[], object],
        *,
        what: str,
        against: str,
        aim: str = "",
        per_one: float = 1.0,
        per_other: float = 1.0,
        one_seconds: Callable[[], float] | None = None,
    ) -> float:
        seconds: list[float] = []
        other_seconds: list[float] = []

        def baseline() -> None:
            start = time.perf_counter()
            given = other()
            spent = given if isinstance(given, float) else time.perf_counter() - start
            other_seconds.append(spent)

        def timed() -> object:
            start = time.perf_counter()
            result = one()
            spent = time.perf_counter() - start
            # A part of the run may be what counts.
            seconds.append(spent if one_seconds is None else one_seconds())
            return result

        benchmark.pedantic(timed, setup=baseline, rounds=ROUNDS, warmup_rounds=1)
        ratio = (statistics.median(seconds[1:]) / per_one) / (
            statistics.median(other_seconds[1:]) / per_other
        )
        benchmark.extra_info.update(against=against, ratio=ratio, aim=aim)
        _RATIOS.append(Ratio(what, against, ratio, aim))
        return ratio

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table that the README quotes."""
    if not _RATIOS:
        return
    terminalreporter.section("ratios of median times, both sides in turn in one run")
    terminalreporter.write_line(f"{'ratio':>6}  {'aim':<9} what / against")
    for line in _RATIOS:
        terminalreporter.write_line(
            f"{line.ratio:6.2f}  {line.aim:<9} {line.what} / {line.against}"
        )
