"""A backend that needs vLLM here says so where it is not."""

from __future__ import annotations

import sys

import pytest

from multicolm.config import ModelConfig, parse_ensemble
from multicolm.errors import ConfigError, ModelError
from multicolm.plugins import backends


def test_without_vllm_the_sentence_names_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # set anyway, and unset again
    model = backends.get("vllm-engine")
    with pytest.raises(ModelError, match=r"needs vllm, .* use backend 'vllm'\.$"):
        model.from_config("m", ModelConfig(backend="vllm-engine", model="tiny-facts"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("setting", ["url: http://x", "device: cpu", "cache_type: f32"])
def test_what_means_nothing_to_it_is_refused(setting: str) -> None:
    text = f"base_model: a\nmodels:\n  a: {{backend: vllm-engine, model: tiny-math, {setting}}}\n"
    with pytest.raises(ConfigError, match=r"belongs to backends? .*'vllm-engine'; leave it out"):
        parse_ensemble(text, "e.yaml")


def test_options_of_vllm_are_plain_values() -> None:
    text = "base_model: a\nmodels:\n  a: {backend: vllm-engine, model: tiny-math, "
    read = parse_ensemble(text + "engine_options: {tensor_parallel_size: 2}}\n", "e.yaml")
    assert read.models["a"].engine_options == {"tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match="engine_options"):
        parse_ensemble(text + "engine_options: {a: [1]}}\n", "e.yaml")
