"""The command line with models in servers, and long runs whose server dies in the middle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm, Manners
from remote_worlds import PROMPTS, ensemble, local, remote

from multicolm import catalog
from multicolm.cli import main
from multicolm.errors import CapabilityError, ServerError
from multicolm.evaluation.compare import compare, named_policy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.likelihood import LikelihoodReader
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table

Serve = Callable[..., FakeVllm]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command; its exit code, and what it printed."""

    def run(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(args)
        return code, *capfd.readouterr()

    return run


def write(folder: Path, fake: FakeVllm, more: str = "") -> str:
    """An ensemble file whose expert is behind a server."""
    path = folder / "ensemble.yaml"
    path.write_text(
        f"""
base_model: generalist
models:
  generalist: {{model: tiny-generalist, dtype: float32}}
  facts: {{backend: vllm, url: {fake.url}/v1, model: tiny-facts, retries: 0{more}}}
policy: cosd-rule
"""
    )
    return str(path)


def test_validate_tells_what_the_server_was_found_to_do(
    serve: Serve, call: Any, tmp_path: Path
) -> None:
    fake = serve("facts", Manners(max_logprobs=20))
    path = write(tmp_path, fake)
    code, out, _ = call("validate", path)
    assert code == 0
    assert f"  checked  model facts: {fake.url}/v1 was not asked\n" in out
    assert fake.requests == []
    code, out, _ = call("validate", path, "--load")
    assert code == 0
    assert (
        f"  checked  model facts: server {fake.url}\n"
        "  checked  model facts: the server calls it 'facts'\n"
        "  checked  model facts: prompts are token ids, several at a time\n"
        "  checked  model facts: log-probabilities of the 20 likeliest tokens and of tokens that "
        "are named\n"
    ) in out
    fake.stop()
    code, out, _ = call("validate", path, "--load")
    assert code == 2
    assert f"  error  server {fake.url} of model 'facts': GET /v1/models " in out
    fake.restart()


# As outside of tests, where a warning is no error.
@pytest.mark.filterwarnings("always::multicolm.errors.MulticolmWarning")
def test_generate_counts_calls_and_says_how_a_policy_treats_what_is_unknown(
    serve: Serve, call: Any, tmp_path: Path
) -> None:
    fake = serve("facts", Manners(max_logprobs=20))
    path = write(tmp_path, fake)
    more = ("--max-new-tokens", "4", "--usage")
    code, _, err = call("generate", path, PROMPTS[0], "--policy", "average", *more)
    assert code == 0
    assert (
        f"Warning: policy 'average' knows only the 20 likeliest tokens of model 'facts' "
        f"({fake.url}): tokens outside a server's top k count with probability 0.\n"
    ) in err
    heading, *rows = [line.split() for line in err.splitlines() if "Warning" not in line]
    assert heading[-1] == "calls"
    calls = {row[0]: int(row[-1]) for row in rows if row[-1].isdigit()}
    assert calls["generalist"] == 0
    assert calls["facts"] == calls["all"] > 0
    code, _, err = call("generate", "tiny", PROMPTS[0], *more)
    assert "calls" not in err


def test_a_policy_that_needs_more_than_the_server_gives_is_one_sentence(
    serve: Serve, call: Any, tmp_path: Path
) -> None:
    fake = serve("facts", Manners(max_logprobs=20))
    path = write(tmp_path, fake)
    code, out, err = call("generate", path, PROMPTS[0], "--policy", "entropy")
    assert (code, out) == (1, "")
    assert err == (
        f"Error: policy 'entropy' needs logprobs of model 'facts' (server {fake.url}), which shows "
        "only text, token_logprobs, top1, topk; choose another policy, or another backend for that "
        "model.\n"
    )
    # A base model in a server has no hidden states, which is known before anything is asked.
    swapped = Path(path).read_text().replace("base_model: generalist", "base_model: facts")
    Path(path).write_text(swapped.replace("policy: cosd-rule", "policy: mlp-router"))
    n_before = len(fake.requests)
    assert call("generate", path, PROMPTS[0])[0] == 1
    assert len(fake.requests) == n_before


def test_what_was_finished_before_a_server_died_is_printed(
    serve: Serve, call: Any, tmp_path: Path
) -> None:
    fake = serve("facts")
    path = write(tmp_path, fake)
    policy = ("--policy", "single", "--set", "model=facts", "--max-new-tokens", "6")
    calls = iter(range(1000))
    n_probe = len(fake.requests)

    def die_later() -> None:
        # The first text takes three requests.
        if len(fake.requests) > n_probe and "stop" not in fake.requests[-1] and next(calls) > 20:
            fake.go_wrong("500")

    fake.before_answer = die_later
    args = (*policy, "--json", "--batch-size", "1")
    code, out, err = call("generate", path, *(PROMPTS[:2] * 8), *args)
    done = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert 0 < len(done) < 16
    assert f"Finished and kept: {len(done)} of 16 answers;" in err
    assert [answer["prompt"] for answer in done] == (PROMPTS[:2] * 8)[: len(done)]


# Long runs


def records(path: Path, n: int) -> Path:
    lines = (catalog.registry() / "tiny/questions/train.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines[:n]))
    return path


def test_scoring_goes_on_where_a_server_that_died_stopped_it(serve: Serve, tmp_path: Path) -> None:
    corpus = open_corpus(records(tmp_path / "some.jsonl", 12))
    want = score(ensemble(local("facts")), corpus, tmp_path / "here", shard_positions=20)
    fake = serve()
    together = ensemble(remote(fake, retries=0))
    fake.before_answer = lambda: fake.go_wrong("500") if len(fake.requests) % 3 == 0 else None
    rounds, done = 0, []
    while True:
        try:
            rounds += 1
            score(together, corpus, tmp_path / "there", shard_positions=20, batch_tokens=128)
            break
        except ServerError as error:
            assert f"server {fake.url} of model 'facts'" in str(error)
            done.append(len(list((tmp_path / "there").rglob("*.safetensors"))))
            assert rounds < 30
    assert rounds > 2
    assert done == sorted(done) and done[-1] > done[0]
    tables = [load_table(tmp_path / where) for where in ("here", "there")]
    for part in ("gold_logprobs", "top1_logprobs", "entropies"):
        got, seen = (torch.as_tensor(getattr(table, part)) for table in tables)
        assert torch.allclose(got, seen, atol=1e-4), part
    assert want.models[1].name == "facts"


def test_scores_of_one_model_are_not_kept_for_another_that_a_server_has_by_now(
    serve: Serve, tmp_path: Path
) -> None:
    corpus = open_corpus(records(tmp_path / "some.jsonl", 4))
    fake, out = serve(), tmp_path / "scores"
    score(ensemble(remote(fake)), corpus, out)
    before = torch.as_tensor(load_table(out).gold_logprobs)
    n_asked = len(fake.requests)
    again = remote(fake)
    n_probe = len(fake.requests) - n_asked
    score(ensemble(again), corpus, out)
    assert len(fake.requests) == n_asked + n_probe  # of the same model all is there
    fake.restart(model=local("math"))
    score(ensemble(remote(fake)), corpus, out)
    after = torch.as_tensor(load_table(out).gold_logprobs)
    assert not torch.allclose(before, after, atol=1e-2)


def test_scores_need_every_probability(serve: Serve, tmp_path: Path) -> None:
    fake = serve("facts", Manners(max_logprobs=20))
    corpus = open_corpus(records(tmp_path / "some.jsonl", 1))
    with pytest.raises(
        CapabilityError,
        match=f"model 'facts' cannot be scored: its server {fake.url} returns 20 tokens, and "
        "scores need every probability; set `logprobs: all`",
    ):
        score(ensemble(remote(fake)), corpus, tmp_path / "scores")


def test_likelihoods_need_every_probability_of_the_models_in_use(serve: Serve) -> None:
    fake = serve("facts", Manners(max_logprobs=20))
    partial = ensemble(remote(fake))
    with pytest.raises(CapabilityError, match=r"'facts' cannot be scored: .* returns 20 tokens"):
        LikelihoodReader(partial, partial.resolve("cosd-rule")).check()
    assert LikelihoodReader(partial, partial.resolve("single")).check()
    both = (ensemble(local("facts")), ensemble(remote(serve())))
    seen = []
    for world in both:
        reader = LikelihoodReader(world, world.resolve("average"))
        seen += reader.likelihoods([reader.passage(PROMPTS[0], " It treats typhus.")])
    assert seen[0].logprob == pytest.approx(seen[1].logprob, abs=1e-3)


def test_a_comparison_goes_on_where_a_server_that_died_stopped_it(
    serve: Serve, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "limit": 4,
        "batch_size": 2,
        "random": False,
        "oracle": False,
        "max_new_tokens": 12,
    }
    policies = [named_policy("cosd-rule")]
    want = compare(
        ensemble(local("facts")), policies, "tiny-world", out=tmp_path / "here", **settings
    )
    fake = serve("facts", Manners(max_logprobs=20))
    together = ensemble(remote(fake, retries=0))
    n_before = len(fake.requests)
    fake.before_answer = lambda: fake.go_wrong("500") if len(fake.requests) > n_before + 9 else None
    with pytest.raises(ServerError, match="HTTP 500"):
        compare(together, policies, "tiny-world", out=tmp_path / "there", **settings)
    n_kept = len((tmp_path / "there" / "ledger.jsonl").read_text().splitlines())
    fake.before_answer = lambda: None
    fake.faults.clear()
    got = compare(together, policies, "tiny-world", out=tmp_path / "there", **settings)
    assert n_kept > 1
    assert [row.name for row in got.rows] == [row.name for row in want.rows]
    assert [row.quality for row in got.rows] == [row.quality for row in want.rows]
    # What this server does not return, traces do not show.
    assert any("Traces do not show model 'facts'" in sentence for sentence in got.warnings)
    shutil.rmtree(tmp_path / "there")


def test_without_the_libraries_the_command_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["httpcore"] = None
from multicolm.cli import main
sys.exit(main(["generate", sys.argv[1], "x"]))
"""
    path = tmp_path / "ensemble.yaml"
    path.write_text(
        "base_model: a\nmodels:\n  a: {backend: vllm, url: 'http://127.0.0.1:1', model: tiny-facts}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    # On a slow machine a line before it says what takes so long.
    assert done.stderr.endswith(
        "Error: models in a server need httpcore and tenacity: pip install 'multicolm[remote]'.\n"
    )
