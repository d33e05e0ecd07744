"""The embedded experts behind a real vLLM: what it shows, and what an ensemble writes with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import httpx
import pytest
from same_texts import POLICIES, QUESTIONS, check_drawn_texts, check_greedy_texts

from multicolm import Ensemble
from multicolm.backend.base import Model
from multicolm.backend.remote.model import RemoteModel, VllmModel
from multicolm.backend.transformers import TransformersModel
from multicolm.config import ModelConfig
from multicolm.errors import MulticolmWarning, ServerError
from multicolm.testing import check_against, check_model

Url = str

FACTS = {"kind": "single", "params": {"model": "facts"}}
# What the example of two servers asks.
EXAMPLE = (
    "Question: What is Dulerex made from?\nResponse:",
    "Question: What is 3 ^ 2 + 4?\nResponse:",
)
ROOT = Path(__file__).parents[2]
START = 300  # seconds; compiling nothing, with all cores busy
ONE_TOKEN_EACH = 48

pytestmark = pytest.mark.timeout(600)  # two servers on two cores


@pytest.fixture(scope="session")
def folders(two_servers: Any) -> Mapping[str, Path]:
    """The experts with attention heads that vLLM serves on CPUs; they say the same."""
    return two_servers.folders


@pytest.fixture(scope="session")
def served(two_servers: Any) -> Mapping[str, Url]:
    """Where the experts are served."""
    return two_servers.urls


@contextmanager
def vllm(python: str, port: int, name: str, folder: Path, log: Path, *more: str) -> Iterator[Url]:
    """A server that is starting; it and all of its processes end with the block."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    given = ["--model", str(folder), "--served-model-name", name, "--port", str(port)]
    small = ["--kv-cache-memory-bytes", "64M", "--max-num-seqs", "16", "--max-model-len", "512"]
    exact = ["--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1"]
    with log.open("wb") as output:
        server = "vllm.entrypoints.openai.api_server"
        process = subprocess.Popen(
            [python, "-m", server, "--host", "127.0.0.1", *given, *small, *exact, *more],
            env={**os.environ, **quiet, "VLLM_HOST_IP": "127.0.0.1", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                pass
            finally:
                kill_group(process.pid)
                process.wait(30)


def kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them ended by themselves


def wait_for(url: Url, log: Path) -> None:
    """Return when a server is ready; fail with what it said last if it is not in time."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url.removesuffix('/v1')}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"no server after {START} s: {log.read_text(errors='replace')[-2000:]}")


def behind(url: Url, name: str, **settings: Any) -> RemoteModel:
    config = ModelConfig(
        backend="vllm", url=url, served_model=name, model=f"tiny-{name}", **settings
    )
    return VllmModel.from_config(name, config)


@pytest.fixture(scope="module")
def experts(served: Mapping[str, Url]) -> list[Model]:
    return [behind(served[name], name) for name in ("facts", "math")]


@pytest.fixture(scope="module")
def together(references: dict[str, TransformersModel], experts: list[Model]) -> Ensemble:
    return Ensemble([references["generalist"], *experts])


def test_two_servers_answer_as_in_process(two_servers: Any) -> None:
    """That they are stopped, the end of the tests shows."""
    assert "prompts are token ids" in two_servers.printed
    alone = ["generate", "tiny", "--policy", "cosd-rule", "--temperature", "0", "--trace"]
    done = forked.command([*alone, *EXAMPLE], ROOT)
    assert done.returncode == 0, done.stderr
    assert two_servers.printed.endswith(done.stdout) and "[facts]" in done.stdout


def test_it_can_do_all_that_is_asked_of_it(experts: list[Model]) -> None:
    assert experts[0].abilities[1:] == [
        "the server calls it 'facts'",
        "prompts are token ids, several at a time",
        "log-probabilities of the whole vocabulary (768 tokens)",
        "prompts are scored by `prompt_logprobs`",
        "`max_tokens: 0` is refused",
        "its context takes 511 tokens",
    ]


@pytest.mark.parametrize("logprobs", ["all", 20])
@pytest.mark.parametrize("name", ["facts", "math"])
def test_it_shows_what_transformers_shows_in_single_precision(
    served: Mapping[str, Url], folders: Mapping[str, Path], name: str, logprobs: Any
) -> None:
    reference = TransformersModel.from_config(name, ModelConfig(model=str(folders[name])))
    assert reference.precision == "float32"
    model = behind(served[name], name, logprobs=logprobs)
    found = check_against(model, reference, tolerance=1e-5, texts=QUESTIONS)
    assert found.n_positions > 50
    assert (found.n_unknown == 0) == (logprobs == "all")
    print(f"{name}, {logprobs}: {found.greatest:.2g} over {found.n_positions} positions")


def test_it_keeps_the_laws_of_backends(experts: list[Model]) -> None:
    check_model(experts[0], tolerance=1e-4)


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_greedy_text_comes_as_in_process(
    together: Ensemble, at_home: Ensemble, co_llm: Path, policy: str, schedule: Any
) -> None:
    check_greedy_texts(together, at_home, policy, co_llm, schedule)


def test_average_of_the_twenty_likeliest_is_the_average_of_what_is_known(
    served: Mapping[str, Url], references: dict[str, TransformersModel], at_home: Ensemble
) -> None:
    partial = Ensemble(
        [references["generalist"], *(behind(served[n], n, logprobs=20) for n in served)]
    )
    with pytest.warns(MulticolmWarning, match="tokens outside a server's top k count with prob"):
        got = partial.generate(QUESTIONS, "average", max_new_tokens=ONE_TOKEN_EACH)
    want = at_home.generate(QUESTIONS, "average", max_new_tokens=ONE_TOKEN_EACH)
    # None of these texts hangs on a token that is less likely than the 20th.
    assert [answer.text for answer in got] == [answer.text for answer in want]


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
@pytest.mark.parametrize(
    "policy",
    ["unite", {"kind": "bild", "params": {"rollback": 1.0}}, "cool-fusion"],
    ids=["unite", "bild", "cool-fusion"],
)
def test_tokens_that_a_policy_names_are_told_beside_the_twenty_likeliest(
    served: Mapping[str, Url],
    references: dict[str, TransformersModel],
    at_home: Ensemble,
    policy: Any,
    schedule: Any,
) -> None:
    partial = Ensemble(
        [references["generalist"], *(behind(served[n], n, logprobs=20) for n in served)]
    )
    settings: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "schedule": schedule}
    got = partial.generate(QUESTIONS, policy, **settings)
    want = at_home.generate(QUESTIONS, policy, **settings)
    assert [a.text for a in got] == [a.text for a in want]
    assert [[t.model for t in a.trace] for a in got] == [[t.model for t in a.trace] for a in want]


def test_looking_ahead_takes_half_the_calls_on_a_span_of_one_expert_or_fewer(
    served: Mapping[str, Url], references: dict[str, TransformersModel]
) -> None:
    calls, texts = {}, {}
    for look_ahead in (1, 16):
        model = behind(served["facts"], "facts", look_ahead=look_ahead)
        [answer] = Ensemble([references["generalist"], model]).generate(
            QUESTIONS[0], FACTS, max_new_tokens=ONE_TOKEN_EACH
        )
        calls[look_ahead] = answer.usage["facts"].calls
        texts[look_ahead] = answer.text
    assert texts[16] == texts[1]
    assert calls[1] == ONE_TOKEN_EACH
    assert calls[16] <= calls[1] / 2


def test_drawn_texts_are_those_of_this_process(together: Ensemble, at_home: Ensemble) -> None:
    check_drawn_texts(together, at_home)


def test_over_two_processes_it_says_the_same_and_without_them_nobody_steps_in(
    vllm_python: str,
    free_port: Callable[[], int],
    folders: Mapping[str, Path],
    references: dict[str, TransformersModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if os.cpu_count() != 1 else "0|0")
    log = tmp_path / "facts.log"
    split = ["--tensor-parallel-size", "2"]
    with vllm(vllm_python, free_port(), "facts", folders["facts"], log, *split) as url:
        wait_for(url, log)
        model = behind(url, "facts", retries=0)
        reference = TransformersModel.from_config("facts", ModelConfig(model=str(folders["facts"])))
        check_against(model, reference, tolerance=1e-5, texts=QUESTIONS[:1])
        duo = Ensemble([references["generalist"], model])
        alone = Ensemble([references["generalist"], references["facts"]])
        short: dict[str, Any] = {"max_new_tokens": 24}
        got, want = (e.generate(QUESTIONS[0], "cosd-rule", **short) for e in (duo, alone))
        assert got[0].text == want[0].text
        assert [token.model for token in got[0].trace] == [t.model for t in want[0].trace]
        stream = duo.stream(QUESTIONS[0], FACTS, max_new_tokens=ONE_TOKEN_EACH)
        next(stream)
    with pytest.raises(
        ServerError, match=r"cannot be reached .* Finished and kept: 0 of 1 answers"
    ):
        list(stream)
