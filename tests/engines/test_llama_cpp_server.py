"""A real server that is not vLLM: what llama-cpp-python's own server is found to do, and not to."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from multicolm import Ensemble
from multicolm.backend.remote.model import LlamaCppServerModel, RemoteModel
from multicolm.backend.transformers import TransformersModel
from multicolm.config import ModelConfig
from multicolm.errors import CapabilityError

QUESTIONS = [
    "Question: What does Dulerex treat?\nResponse:",
    "Question: Which illness does Loxid help with?\nResponse:",
]
NEEDED = ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"llama-cpp-python[server] is not here: no {', '.join(MISSING)}"
)


@pytest.fixture(scope="module")
def model(
    gguf_models: dict[str, Path],
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RemoteModel]:
    port, log = free_port(), tmp_path_factory.mktemp("logs") / "facts.log"
    given = ["--model", str(gguf_models["facts"]), "--model_alias", "facts", "--port", str(port)]
    small = ["--n_ctx", "512", "--n_threads", "1", "--logits_all", "true"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "llama_cpp.server", "--host", "127.0.0.1", *given, *small],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/v1/models", log)
        config = ModelConfig(backend="llama-cpp-server", url=url, model="tiny-facts")
        yield LlamaCppServerModel.from_config("facts", config)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"no server: {log.read_text(errors='replace')[-2000:]}")


def test_it_is_a_server_of_text_that_takes_one_prompt_at_a_time(model: RemoteModel) -> None:
    assert model.shows == {"text"}
    assert model.abilities[1:] == [
        "the server calls it 'facts'",
        "prompts are text, one at a time",
        "text only, no log-probabilities by token id",
        "prompts are not scored by the server",
        "`max_tokens: 0` writes on without a limit",
        "its context takes an unknown number of tokens",
    ]


def test_as_a_nudger_it_writes_what_the_model_writes_in_process(
    model: RemoteModel, references: dict[str, TransformersModel]
) -> None:
    nudging = {"kind": "nudging", "params": {"threshold": 0.9, "nudger": "facts"}}
    behind, alone = (
        Ensemble([references["generalist"], facts]).generate(QUESTIONS, nudging, max_new_tokens=32)
        for facts in (model, references["facts"])
    )
    # llama.cpp's cache is in half precision, and none of these tokens hangs on that.
    assert [answer.text for answer in behind] == [answer.text for answer in alone]
    assert behind.usage["facts"].tokens_written > 0


@pytest.mark.filterwarnings(
    "ignore:policy 'cool-fusion' lets model 'facts' .*propose and not judge"
)
def test_it_proposes_words_that_a_model_of_this_process_judges(
    model: RemoteModel, references: dict[str, TransformersModel]
) -> None:
    silent = copy.copy(references["facts"])
    vars(silent)["signals"] = frozenset({"text"})
    behind, alone = (
        Ensemble([references["generalist"], facts]).generate(
            QUESTIONS, "cool-fusion", max_new_tokens=32
        )
        for facts in (model, silent)
    )
    assert [answer.text for answer in behind] == [answer.text for answer in alone]
    assert behind.usage["facts"].calls > 0


def test_policies_that_need_numbers_are_refused(
    model: RemoteModel, references: dict[str, TransformersModel]
) -> None:
    with pytest.raises(
        CapabilityError, match=f"needs top1 of model 'facts' .server {model.server}"
    ):
        Ensemble([references["generalist"], model]).generate(QUESTIONS, "cosd-rule")
