"""``multicolm score``: what it prints, what it refuses, and what several processes make of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from score_worlds import contents, inodes, records, write
from tables import TOKENS, random_table

import multicolm
from multicolm.cli.progress import MinuteLog
from multicolm.config import load_ensemble
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.plan import template_digests
from multicolm.scoring.store import load_prompt_digests, load_table, read_index
from multicolm.types import prompt_digest


@pytest.fixture
def ensemble(tmp_path) -> Path:
    """An ensemble file of two tables."""
    for seed, name in enumerate(("first", "second")):
        model = random_table(name, seed)
        table = {
            " ".join(TOKENS[i] for i in context): {
                token: float(p) for token, p in zip(TOKENS, row.exp().tolist(), strict=True)
            }
            for context, row in model._rows.items()
            if all(" " not in TOKENS[i] for i in context)
        }
        for row in table.values():
            total = sum(row.values())
            row.update({token: p / total for token, p in row.items()})
        data = {"tokens": list(TOKENS), "ends": ["."], "table": table}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    file = tmp_path / "pair.yaml"
    models = {n: {"backend": "table", "model": f"./{n}.yaml"} for n in ("first", "second")}
    models["second"]["cost"] = 2.5
    file.write_text(yaml.safe_dump({"base_model": "first", "models": models}))
    return file


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data.jsonl", records(30))


def test_the_help_tells_the_forms_of_data_and_every_option(run) -> None:
    result = run("score", "--help")
    assert result.code == 0
    for piece in (
        '{"prompt": ..., "completion": ...}',
        "--out",
        "--for",
        "--limit",
        "--hidden",
        "--topk",
        "--embedding",
        "--no-end",
        "--split",
        "--revision",
        "--shard-positions",
        "--batch-tokens",
        "--dry-run",
        "--json",
        "accelerate launch",
    ):
        assert piece in " ".join(result.out.split()), piece


def test_a_corpus_is_scored_and_what_was_done_is_one_line(run, tmp_path, ensemble, data) -> None:
    out = tmp_path / "scores"
    result = run("score", str(ensemble), str(data), "--out", str(out), "--shard-positions", "20")
    index = read_index(out)
    assert result.code == 0, result.err
    line = result.out.strip()
    assert line.startswith(
        f"{out}: {index.n_positions} tokens of 30 completions, scored by first, second "
        f"({len(index.shards)} shards, "
    )
    assert "\n" not in line and len(index.shards) > 3
    table = load_table(out)
    assert table.costs == (1.0, 2.5) and table.identities[0].startswith("table:")


def test_json_is_the_index_with_the_folder(run, tmp_path, ensemble, data) -> None:
    out = tmp_path / "scores"
    result = run("score", str(ensemble), str(data), "--out", str(out), "--json", "--topk", "3")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said.pop("out") == str(out)
    assert said == json.loads((out / "index.json").read_text())
    assert said["top_k"] == 3 and said["models"][0]["features"] == ["topk"]


def test_running_again_scores_nothing_again(run, tmp_path, ensemble, data) -> None:
    out = tmp_path / "scores"
    arguments = ("score", str(ensemble), str(data), "--out", str(out))
    assert run(*arguments).code == 0
    before = inodes(out)
    assert run(*arguments).code == 0
    assert inodes(out) == before


@pytest.fixture
def loads(monkeypatch) -> list[list[str]]:
    """The names of the models of each loading."""
    found: list[list[str]] = []
    plain = multicolm.load

    def load(config):
        found.append(list(config.models))
        return plain(config)

    monkeypatch.setattr(multicolm, "load", load)
    return found


def test_a_finished_table_is_reported_without_loading_a_model(
    run, tmp_path, ensemble, data, loads
) -> None:
    arguments = ("score", str(ensemble), str(data), "--out", str(tmp_path / "out"))
    first, again = run(*arguments), run(*arguments)
    assert loads == [["first", "second"]] and again.code == 0
    assert first.out.partition(", scored")[0] == again.out.partition(", scored")[0]


def test_only_models_that_have_something_to_read_are_loaded(
    run, tmp_path, ensemble, data, loads
) -> None:
    arguments = ("score", str(ensemble), str(data), "--out", str(tmp_path / "out"))
    assert run(*arguments).code == 0
    before = inodes(tmp_path / "out")
    assert run(*arguments, "--topk", "3").code == 0
    assert loads.pop() == ["first"]
    now = inodes(tmp_path / "out")
    assert {n.split("/")[0] for n in now if now[n] != before[n]} == {"first"}
    (tmp_path / "out/second/00000.safetensors").unlink()
    assert run(*arguments, "--topk", "2").code == 0
    assert loads.pop() == ["first", "second"], "the base model says which tokens they are"
    table = load_table(tmp_path / "out")
    assert table.models == ("first", "second") and table.base["topk"].shape[1] == 3


def test_a_dry_run_says_what_would_be_read_and_does_nothing(
    run, tmp_path, ensemble, data, loads
) -> None:
    arguments = ("score", str(ensemble), str(data), "--out", str(tmp_path / "out"))
    result = run(*arguments, "--dry-run", "--topk", "3")
    assert result.code == 0, result.err
    assert result.out.splitlines() == [
        f"{data}: 30 completions of an unknown number of tokens of first's",
        "to be read by first",
        "to be read by second",
        "to be kept besides the scores: first's topk",
    ]
    assert not (tmp_path / "out").exists() and loads == []
    assert run(*arguments).code == 0
    before = inodes(tmp_path / "out")
    said = json.loads(run(*arguments, "--dry-run", "--topk", "3", "--json").out)
    assert (said["examples"], said["to_read"], said["keeps"]) == (30, ["first"], ["first's topk"])
    assert "scored already" in run(*arguments, "--dry-run").out
    assert inodes(tmp_path / "out") == before and len(loads) == 1
    assert run("score", str(ensemble), "nowhere.jsonl", "--out", "x", "--dry-run").code != 0


def test_a_dry_run_counts_tokens_with_the_tokenizer_alone(run, tmp_path, loads) -> None:
    texts = [{"prompt": "What is Dulerex", "completion": " made from?"} for _ in range(3)]
    data = write(tmp_path / "d.jsonl", texts)
    arguments = ("score", "tiny", str(data), "--out", str(tmp_path / "out"))
    counted = json.loads(run(*arguments, "--dry-run", "--json").out)["tokens"]
    assert loads == []
    assert run(*arguments).code == 0
    assert counted == read_index(tmp_path / "out").n_positions > 9


def test_a_model_that_is_given_another_chat_template_reads_chats_anew(run, tmp_path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]}
    chats = write(tmp_path / "chats.jsonl", [chat])
    texts = write(tmp_path / "texts.jsonl", [{"prompt": "Hi", "completion": " a"}])
    files = {}
    for template in ("own", "plain"):
        models = {
            "talk": {"model": "tiny-generalist", "dtype": "float32"},
            "facts": {"model": "tiny-facts", "dtype": "float32"},
        }
        models["facts"] |= {"chat_template": "plain"} if template == "plain" else {}
        files[template] = tmp_path / f"{template}.yaml"
        files[template].write_text(yaml.safe_dump({"base_model": "talk", "models": models}))
    out = tmp_path / "out"

    def to_read(template: str) -> list[str]:
        result = run("score", str(files[template]), str(chats), "--out", str(out), "--dry-run",
                     "--json")  # fmt: skip
        found: list[str] = json.loads(result.out)["to_read"]
        return found

    assert to_read("own") == ["talk", "facts"]
    for template, other in (("own", "plain"), ("plain", "own")):
        before = inodes(out) if out.exists() else {}
        assert run("score", str(files[template]), str(chats), "--out", str(out)).code == 0
        written = {n.split("/")[0] for n, inode in inodes(out).items() if before.get(n) != inode}
        assert not before or written == {"facts"}
        assert (to_read(template), to_read(other)) == ([], ["facts"])
    for data, digests in ((chats, ["facts"]), (texts, [])):
        found = template_digests(load_ensemble(files["plain"]), open_corpus(data))
        assert sorted(found) == digests


def test_an_ensemble_file_whose_policy_is_not_trained_can_be_scored_for_it(
    run, tmp_path, ensemble, data
) -> None:
    file = yaml.safe_load(ensemble.read_text())
    params = {"features": ["topk"], "top_k": 4}
    file["policy"] = {"kind": "mlp-router", "params": params}
    ensemble.write_text(yaml.safe_dump(file))
    result = run("score", str(ensemble), str(data), "--out", str(tmp_path / "out"))
    assert result.code == 0, result.err
    assert "first's features: topk" in result.out
    assert load_table(tmp_path / "out").base["topk"].shape[1] == 4


def test_for_a_policy_its_features_are_kept(run, tmp_path, loaded) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "What is Dulerex", "completion": " made from?"}])
    arguments = ("score", "tiny", str(data), "--out", str(tmp_path / "out"))
    assert run(*arguments, "--for", "co-llm", "--for", "cosd-tree").code == 0
    assert set(load_table(tmp_path / "out").base) == {"hidden"}
    result = run(*arguments, "--for", "cosd-rule")
    assert result.code == 1 and "policy 'cosd-rule' has nothing to learn" in result.err


def test_a_limit_takes_examples_from_everywhere(run, tmp_path, ensemble) -> None:
    lines = records(30)
    data = write(tmp_path / "d.jsonl", lines)
    out = tmp_path / "out"
    assert run("score", str(ensemble), str(data), "--out", str(out), "--limit", "3").code == 0
    found = load_prompt_digests(out)
    assert found == [prompt_digest(lines[i]["prompt"]) for i in (0, 10, 20)]
    result = run("score", str(ensemble), str(data), "--out", str(out))
    assert result.code == 1 and "choose another folder" in result.err


@pytest.mark.parametrize(
    ("name", "content", "more", "said"),
    [
        ("d.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n', [], "d.jsonl:2"),
        ("d.jsonl", '{"prompt": "a", "completion": "b"}\n', ["--hidden"], "does not show 'hidden'"),
        ("d.jsonl", '{"prompt": "a", "completion": "b"}\n', ["--for", "nobody"], "'nobody'"),
    ],
)
def test_what_is_wrong_is_found_before_a_model_is_loaded(
    run, tmp_path, ensemble, loads, name, content, more, said
) -> None:
    (tmp_path / name).write_text(content)
    result = run(
        "score", str(ensemble), str(tmp_path / name), "--out", str(tmp_path / "out"), *more
    )
    assert result.code != 0 and said in result.err and "Traceback" not in result.err
    assert loads == []


def test_an_out_that_is_a_file_or_anothers_table_is_refused_before_a_model_is_loaded(
    run, tmp_path, ensemble, data, loads
) -> None:
    result = run("score", str(ensemble), str(data), "--out", str(data))
    assert result.code == 1 and "is a file; --out wants the folder" in result.err
    assert run("score", str(ensemble), str(data), "--out", str(tmp_path / "out")).code == 0
    loads.clear()
    other = write(tmp_path / "other.jsonl", records(3, seed=9))
    result = run("score", str(ensemble), str(other), "--out", str(tmp_path / "out"))
    assert result.code == 1 and result.err.count("digest") == 2 and loads == []


def test_in_a_file_progress_is_a_line_after_five_seconds_and_then_one_a_minute() -> None:
    now, lines = 0.0, []
    log = MinuteLog("tokens", lines.append, clock=lambda: now)
    for second in range(200):
        now = float(second)
        log(10 * second, 6000, "scoring with base")
    assert lines == [
        f"scoring with base: {n} of 6,000 tokens, 10 tokens/s, {left} min left"
        for n, left in (("50", 10), ("650", 9), ("1,250", 8), ("1,850", 7))
    ]
    lines.clear()
    for second in range(200, 270):  # the next piece of work begins anew
        now = float(second)
        log(0.5 * (second - 200), 60, "the next")
    assert lines == ["the next: 22 of 60 tokens, 0.5 tokens/s, 1 min left"]
    lines.clear()
    for _ in range(2):
        log(0, 0, "writing the report")
    assert lines == ["writing the report ..."]


def test_without_the_end_and_with_features_the_embedded_models_are_scored(
    run, tmp_path, loaded
) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "What is Dulerex", "completion": " made from?"}])
    out = tmp_path / "scores"
    flags = ("--hidden", "--embedding", "--topk", "5", "--no-end")
    result = run("score", "tiny", str(data), "--out", str(out), *flags)
    assert result.code == 0, result.err
    table = load_table(out)
    width = loaded.backends[0].hidden_size
    assert {name: f.shape[1] for name, f in table.base.items()} == {
        "hidden": width,
        "embedding": width,
        "topk": 5,
    }
    tokenizer = loaded.backends[0].tokenizer
    assert table.gold_ids.tolist() == tokenizer.encode_continuation(" made from?")
    assert table.identities == tuple(m.identity for m in loaded.backends)


def test_what_was_left_out_is_told_on_stderr(run, tmp_path, ensemble) -> None:
    first = yaml.safe_load((tmp_path / "first.yaml").read_text())
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({**first, "context_length": 5}))
    second = yaml.safe_load((tmp_path / "second.yaml").read_text())
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({**second, "context_length": 2}))
    lines = [{"prompt": "a", "completion": "abd"}, {"prompt": "abdfab", "completion": "a"}]
    data = write(tmp_path / "d.jsonl", lines)
    result = run("score", str(ensemble), str(data), "--out", str(tmp_path / "scores"))
    assert result.code == 0
    assert "1 examples were left out: the prompt is longer than the base model's" in result.err
    assert "second could not score 2 tokens: its context is too short." in result.err
    assert "left out" not in result.out


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ('{"prompt": "a"', 2, "d.jsonl:1: no JSON"),
        ('{"question": "a"}', 2, "d.jsonl:1: a record is"),
        ('{"prompt": "xyz", "completion": "a"}', 2, "d.jsonl:1: model 'first' has no token"),
        ("", 2, "d.jsonl holds no example"),
    ],
)
def test_odd_data_is_one_sentence(run, tmp_path, ensemble, line, code, said) -> None:
    (tmp_path / "d.jsonl").write_text(line + "\n")
    result = run("score", str(ensemble), str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "o"))
    assert result.code == code and result.out == ""
    assert result.err.startswith("Error: ") and said in result.err
    assert result.err.count("\n") == 1 and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{data}"], 2, "Missing option '--out'"),
        (["missing.jsonl", "--out", "{out}"], 2, "Error: there is no file missing.jsonl."),
        (["{folder}", "--out", "{out}"], 2, "is no data set; allowed are"),
        (["{data}", "--out", "{out}", "--hidden"], 1, "does not show 'hidden'; it shows topk"),
        (["{data}", "--out", "{out}", "--topk", "0"], 2, "topk must be 1 or more, got 0"),
        (
            ["{data}", "--out", "{out}", "--shard-positions", "0"],
            2,
            "shard_positions must be 1 or more, got 0",
        ),
        (["{data}", "--out", "{out}", "--hiden"], 2, "No such option '--hiden'"),
        (["{data}", "--out", "{data}"], 1, "Error: "),
    ],
)
def test_wrong_arguments_are_told_without_a_traceback(
    run, tmp_path, ensemble, data, arguments, code, said
) -> None:
    words = {"data": str(data), "out": str(tmp_path / "out"), "folder": str(tmp_path)}
    result = run("score", str(ensemble), *(a.format(**words) for a in arguments))
    assert result.code == code and said in result.err
    assert "Traceback" not in result.err and result.out == ""


def test_other_data_in_the_folder_is_refused_in_one_sentence(run, tmp_path, ensemble, data) -> None:
    out = tmp_path / "scores"
    assert run("score", str(ensemble), str(data), "--out", str(out)).code == 0
    other = write(tmp_path / "other.jsonl", records(3, seed=9))
    result = run("score", str(ensemble), str(other), "--out", str(out))
    assert result.code == 1 and result.err.count("digest") == 2 and result.err.count("\n") == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_ctrl_c_is_told_and_the_same_command_goes_on(tmp_path, ensemble) -> None:
    data = write(tmp_path / "big.jsonl", records(3000))
    scoring = command("multicolm", "score", str(ensemble), str(data), "--shard-positions", "40")
    out = tmp_path / "scores"
    process = subprocess.Popen(
        [*scoring, "--out", str(out)], stderr=subprocess.PIPE, text=True, env=environment()
    )
    while not (out / "second/00002.safetensors").exists():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().endswith("Interrupted.")
    assert "Traceback" not in err and not list(out.rglob("*.part"))
    done = inodes(out)
    subprocess.run([*scoring, "--out", str(out)], check=True, env=environment())
    assert done.items() <= inodes(out).items()


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(run, tmp_path, ensemble, data) -> None:
    arguments = ["score", str(ensemble), str(data), "--shard-positions", "20"]
    # `accelerate launch --cpu` starts one process, whatever it is told.
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launched = subprocess.run(
        [*command(*launch, "-m", "multicolm"), *arguments, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=Path(__file__).parents[2],
        timeout=250,
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert launched.stdout.count("scored by first, second") == 1, "one of them speaks"
    assert run(*arguments, "--out", str(tmp_path / "one")).code == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
