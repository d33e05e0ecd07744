"""What can be said of a GGUF model before llama.cpp has seen it, or where it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from multicolm.backend.identity import identity_of_file
from multicolm.backend.llama_cpp.library import Weights, _log_callback, library
from multicolm.config import EnsembleConfig, ModelConfig, parse_ensemble, validate
from multicolm.ensemble import load
from multicolm.errors import ConfigError, ModelError, UnknownNameError
from multicolm.plugins import backends


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file that begins as GGUF files do."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    return path


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    yield
    library.cache_clear()


def parsed(settings: str, folder: Path) -> EnsembleConfig:
    text = f"base_model: a\nmodels:\n  a: {{backend: llama-cpp, {settings}}}\n"
    return parse_ensemble(text, folder / "e.yaml")


def refused(settings: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(settings, folder)
    return str(caught.value)


def test_a_missing_extra_is_one_sentence_with_the_command(
    gguf: Path, without_llama_cpp: None
) -> None:
    with pytest.raises(ModelError, match=r"pip install 'multicolm\[llama-cpp\]'\.$"):
        load(parsed("model: model.gguf", gguf.parent))


class FakeLibrary:
    """llama.cpp as far as a file that it refuses goes: its log, in ggml's levels."""

    LOG: ClassVar[list[tuple[int, bytes]]] = [
        (2, b"llama_model_loader: an INFO line\n"),
        (3, b"a WARN line\n"),
        (4, b"gguf_init_from_file: invalid magic "),
        (5, b"characters: 'vers'\n"),
        (1, b"a DEBUG line\n"),
        (4, b"failed to load model\n"),
        (2, b"an INFO line"),
        (5, b" that goes on\n"),
    ]

    def __getattr__(self, name: str) -> Any:
        if name == "llama_log_callback":
            return lambda function: function
        if name == "llama_model_default_params":
            return lambda: SimpleNamespace()
        if name == "llama_print_system_info":
            return lambda: b"CPU : AVX2 = 1 | "
        return lambda *_: None

    def llama_log_set(self, keep: Any, _: Any) -> None:
        self.keep = keep

    def llama_model_load_from_file(self, *_: Any) -> None:
        for level, text in self.LOG:
            self.keep(level, text, None)


def test_what_llama_cpp_says_of_a_file_that_it_refuses_is_what_the_user_reads(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cached in (library, _log_callback):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", FakeLibrary())  # type: ignore[arg-type]
    try:
        with pytest.raises(ModelError) as caught:
            Weights("a", gguf)
    finally:
        for cached in (library, _log_callback):
            cached.cache_clear()
    assert (
        f"llama.cpp cannot load {gguf}: gguf_init_from_file: invalid magic characters: 'vers'; "
        "failed to load model. Is it a whole GGUF file"
    ) in str(caught.value)
    assert "INFO" not in str(caught.value) and "WARN" not in str(caught.value)


def test_the_backend_is_known_and_shows_what_a_policy_may_ask_of_it() -> None:
    assert "llama-cpp" in backends
    signals = backends.get("llama-cpp").signals  # type: ignore[attr-defined]
    assert signals == {"top1", "topk", "logprobs", "hidden"}


def test_a_file_is_found_from_the_folder_of_the_ensemble(gguf: Path) -> None:
    model = parsed("model: model.gguf, cache_type: f32, context_length: 100", gguf.parent).models
    assert model["a"].location == str(gguf)
    assert (model["a"].cache_type, model["a"].context_length) == ("f32", 100)


def test_a_missing_file_and_a_folder_are_refused_by_name(gguf: Path) -> None:
    assert f"there is no file {gguf.parent / 'mdel.gguf'}" in refused(
        "model: mdel.gguf", gguf.parent
    )
    assert "is a folder; backend 'llama-cpp' loads a GGUF file: it holds model.gguf." in refused(
        "model: .", gguf.parent
    )
    (gguf.parent / "empty").mkdir()
    assert "loads a GGUF file: it holds none." in refused("model: empty", gguf.parent)


@pytest.mark.parametrize(
    "settings",
    ["dtype: float32", "device: cpu", "adapter: ./x", "revision: main", "trust_remote_code: true"],
)
def test_what_means_nothing_to_llama_cpp_is_refused(settings: str, gguf: Path) -> None:
    complaint = refused(f"model: model.gguf, {settings}", gguf.parent)
    key = settings.partition(":")[0]
    assert f"`{key}` belongs to backend" in complaint
    assert "and this model has backend 'llama-cpp'; leave it out." in complaint


@pytest.mark.parametrize(
    "settings",
    ["cache_type: f32", "context_length: 9", "gpu_layers: 1", "tokenizer: tiny-math"],
)
def test_what_only_llama_cpp_knows_is_refused_elsewhere(settings: str, tmp_path: Path) -> None:
    text = f"base_model: a\nmodels:\n  a: {{model: tiny-math, {settings}}}\n"
    with pytest.raises(ConfigError) as caught:
        parse_ensemble(text, tmp_path / "e.yaml")
    key = settings.partition(":")[0]
    complaint = str(caught.value)
    assert f"`{key}` belongs to backend" in complaint
    assert "llama-cpp" in complaint
    assert "and this model has backend 'transformers'; leave it out." in complaint


def test_settings_out_of_range_are_refused(gguf: Path) -> None:
    assert "must be 'f16' or 'f32', got 'q8'" in refused(
        "model: model.gguf, cache_type: q8", gguf.parent
    )
    assert "must be 1 or more, got 0" in refused(
        "model: model.gguf, context_length: 0", gguf.parent
    )


def test_a_tokenizer_is_a_name_a_folder_or_an_id_of_the_hub(gguf: Path) -> None:
    def found(tokenizer: str) -> str:
        [model] = parsed(f"model: model.gguf, tokenizer: {tokenizer}", gguf.parent).models.values()
        return model.tokenizer_location

    assert Path(found("tiny-facts"), "tokenizer.json").is_file()
    (gguf.parent / "own").mkdir()
    (gguf.parent / "own" / "tokenizer.json").write_text("{}")
    assert found("./own") == str(gguf.parent / "own")
    assert found("organisation/name") == "organisation/name"
    with pytest.raises(ConfigError, match=r"Did you mean 'tiny-facts'\?"):
        found("tiny-fact")
    (gguf.parent / "none").mkdir()
    with pytest.raises(ConfigError, match=r"none holds no tokenizer\.json"):
        found("./none")
    config = ModelConfig(backend="llama-cpp", model=str(gguf), tokenizer="tiny-fact")
    assert [problem.place for problem in config.resolve(gguf.parent)] == [("tokenizer",)]
    assert issubclass(UnknownNameError, ConfigError)


def test_validate_looks_at_the_first_bytes(gguf: Path) -> None:
    file = gguf.parent / "e.yaml"
    file.write_text("base_model: a\nmodels:\n  a: {backend: llama-cpp, model: model.gguf}\n")
    assert f"model a: {gguf} is a GGUF file" in validate(str(file)).checked
    gguf.write_bytes(b"PK\x03\x04")
    [error] = validate(str(file)).errors
    assert error.startswith(f"models.a: {gguf} is no GGUF file; convert")


def test_a_model_in_several_files_is_all_of_them(tmp_path: Path) -> None:
    parts = [tmp_path / f"big-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF one")
    before = identity_of_file("gguf", parts[0])
    assert before == identity_of_file("gguf", parts[0])
    parts[1].write_bytes(b"GGUF two")
    assert identity_of_file("gguf", parts[0]) != before
