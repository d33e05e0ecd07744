"""llama.cpp's own server, the one in C++: what it shows, and what an ensemble writes with it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
import transformers as hf
from same_texts import POLICIES, QUESTIONS, check_drawn_texts, check_greedy_texts
from tokenizers import processors

from multicolm import Ensemble
from multicolm.backend.base import Model
from multicolm.backend.remote.model import LlamaCppServerModel, RemoteModel
from multicolm.backend.remote.probe import RequestedModel
from multicolm.backend.remote.transport import Server
from multicolm.backend.transformers import TransformersModel
from multicolm.config import ModelConfig
from multicolm.errors import CapabilityError, ServerError
from multicolm.testing import check_against, check_model

Url = str
Start = Callable[..., AbstractContextManager[Url]]

# What it has read is in half precision if it is not told otherwise.
F32 = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
START = 60  # seconds
EXPERTS = ("facts", "math")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def start(
    llama_server_program: str,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Start:
    """Starts a server; it ends with the block."""
    logs = tmp_path_factory.mktemp("logs")

    @contextmanager
    def started(path: Path, *more: str, name: str = "m", port: int | None = None) -> Iterator[Url]:
        port = port or free_port()
        log = logs / f"{port}.log"
        given = ["--model", str(path), "--alias", name, "--host", "127.0.0.1", "--port", str(port)]
        small = ["--threads", "1", "--threads-batch", "1", "--ctx-size", "512", "--offline"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [llama_server_program, *given, *small, *more],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            url = f"http://127.0.0.1:{port}"
            try:
                wait_for(f"{url}/health", process, log)
                yield url
            finally:
                process.terminate()
                process.wait(30)

    return started


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"no server: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="module")
def served(start: Start, gguf_models: Mapping[str, Path]) -> Iterator[dict[str, Url]]:
    """Servers of the experts, in single precision."""
    with ExitStack() as stack:
        yield {n: stack.enter_context(start(gguf_models[n], *F32, name=n)) for n in EXPERTS}


def behind(url: Url, name: str, **settings: Any) -> RemoteModel:
    config = ModelConfig(backend="llama-cpp-server", url=url, model=f"tiny-{name}", **settings)
    return LlamaCppServerModel.from_config(name, config)


def random_model(url: Url, reference: Model) -> RemoteModel:
    """Of a model whose tokenizer is nowhere but in the reference."""
    return LlamaCppServerModel("m", Server(url, "m"), reference.tokenizer, RequestedModel())


@pytest.fixture(scope="module")
def experts(served: dict[str, Url]) -> list[Model]:
    return [behind(url, name) for name, url in served.items()]


@pytest.fixture(scope="module")
def together(references: dict[str, TransformersModel], experts: list[Model]) -> Ensemble:
    return Ensemble([references["generalist"], *experts])


def test_it_tells_the_whole_vocabulary_by_id_and_scores_no_prompt(experts: list[Model]) -> None:
    assert experts[0].abilities[1:] == [
        "the server calls it 'facts'",
        "prompts are token ids, several at a time",
        "log-probabilities of the whole vocabulary (768 tokens)",
        "prompts are not scored by the server",
        "`max_tokens: 0` writes one token",
        "its context takes 511 tokens",
    ]


@pytest.mark.parametrize("logprobs", ["all", 20])
@pytest.mark.parametrize(("cache", "tolerance"), [((), 1e-2), (F32, 1e-4)], ids=["f16", "f32"])
@pytest.mark.parametrize("name", ["generalist", *EXPERTS])
def test_it_shows_what_transformers_shows(
    start: Start,
    gguf_models: Mapping[str, Path],
    references: dict[str, TransformersModel],
    name: str,
    cache: tuple[str, ...],
    tolerance: float,
    logprobs: Any,
) -> None:
    with start(gguf_models[name], *cache) as url:
        model = behind(url, name, logprobs=logprobs)
        seen = check_against(model, references[name], tolerance=tolerance, texts=QUESTIONS)
    assert seen.n_positions > 50
    assert (seen.n_unknown == 0) == (logprobs == "all")
    kind = "f32" if cache else "f16"
    print(f"{name}, {kind}, {logprobs}: {seen.greatest:.2g} over {seen.n_positions} positions")


def test_it_keeps_the_laws_of_backends(experts: list[Model]) -> None:
    for seed in range(4):
        check_model(experts[0], tolerance=1e-4, seed=seed)


@pytest.mark.parametrize(
    "slots",
    [("--parallel", "1"), ("--parallel", "3", "--ctx-size", "1536"), ("--no-cache-prompt",)],
    ids=["one slot", "three slots", "no cache"],
)
def test_how_many_texts_it_holds_and_what_it_keeps_of_them_make_no_difference(
    start: Start,
    gguf_models: Mapping[str, Path],
    references: dict[str, TransformersModel],
    slots: tuple[str, ...],
) -> None:
    with start(gguf_models["facts"], *F32, *slots) as url:
        check_against(
            behind(url, "facts"), references["facts"], tolerance=1e-4, texts=QUESTIONS[:2]
        )


def test_texts_that_do_not_fit_its_context_together_go_one_after_the_other(
    served: dict[str, Url], references: dict[str, TransformersModel]
) -> None:
    texts = [[(7 * i + row) % 700 + 1 for i in range(400)] for row in range(4)]
    model = behind(served["facts"], "facts", retries=0)
    got = model.open(4).feed(range(4), texts, [1] * 4)
    want = references["facts"].open(4).feed(range(4), texts, [1] * 4)
    assert got.n_calls == 4
    difference = got.logits.log_softmax(-1) - want.logits.log_softmax(-1)
    assert difference.abs().max() < 1e-4
    # Its answer to all of them at once, which is why.
    body = {"prompt": texts, "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{served['facts']}/v1/completions", json=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        500,
        "Context size has been exceeded.",
    )


def test_what_could_come_instead_of_a_part_of_a_character_is_shown_too(
    start: Start, write: Callable[..., Path]
) -> None:
    network, tokenizer = tiny_models.network("llama"), tiny_models.shared_tokenizer()
    reference = TransformersModel("m", network, tokenizer)
    with start(write(network, tokenizer), *F32) as url:
        model = random_model(url, reference)
        check_against(model, reference, texts=tiny_models.PROMPTS, tolerance=1e-4)
        first = next(
            i for i in model._abilities.unreported if reference.tokenizer.token_bytes(i)[0] > 0xC1
        )
        body = {"prompt": [5, 6], "max_tokens": 1, "logprobs": 1, "logit_bias": {str(first): 100}}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()
    assert answer["choices"][0]["logprobs"] is None, "what the server shows if it is let"


def test_a_sentencepiece_model_is_shown_with_its_bytes(
    start: Start, write: Callable[..., Path]
) -> None:
    tokenizer = tiny_models.sentencepiece(prefix=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    settings = {**tiny_models._common(), "vocab_size": len(tokenizer), "eos_token_id": 2}
    network = tiny_models.fresh_network(hf.LlamaConfig(**settings))
    reference = TransformersModel("m", network, tokenizer)
    header = {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": True,
    }
    with start(write(network, tokenizer, header), *F32) as url:
        texts = ("the thin inn", "a  the\n\nthé 😀 x")
        check_against(random_model(url, reference), reference, texts=texts, tolerance=1e-4)


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_greedy_text_comes_as_in_process(
    together: Ensemble, at_home: Ensemble, co_llm: Path, policy: str, schedule: Any
) -> None:
    check_greedy_texts(together, at_home, policy, co_llm, schedule)


def test_drawn_texts_are_those_of_this_process(together: Ensemble, at_home: Ensemble) -> None:
    check_drawn_texts(together, at_home)


def test_of_its_twenty_likeliest_tokens_a_policy_that_names_others_cannot_be_served(
    served: dict[str, Url], references: dict[str, TransformersModel]
) -> None:
    model = behind(served["facts"], "facts", logprobs=20)
    assert model.shows == {"text", "top1", "topk"}
    duo = Ensemble([references["generalist"], model])
    with pytest.raises(CapabilityError, match=f"of model 'facts' .server {model.server}"):
        duo.generate(QUESTIONS, {"kind": "bild", "params": {"rollback": 1.0}})


def test_another_model_at_its_address_is_found_out(
    start: Start,
    gguf_models: Mapping[str, Path],
    references: dict[str, TransformersModel],
    free_port: Callable[[], int],
) -> None:
    port = free_port()
    single = {"kind": "single", "params": {"model": "facts"}}
    with start(gguf_models["facts"], name="facts", port=port) as url:
        duo = Ensemble([references["generalist"], behind(url, "facts", retries=1)])
        duo.generate(QUESTIONS[0], single, max_new_tokens=4)
    with (
        start(gguf_models["math"], name="facts", port=port),
        pytest.raises(ServerError, match="'facts' is another model now than when the ensemble"),
    ):
        duo.generate(QUESTIONS[1], single, max_new_tokens=4)
