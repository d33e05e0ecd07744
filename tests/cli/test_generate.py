from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

import multicolm
from multicolm import catalog
from multicolm.cli.generate import read_prompts
from multicolm.errors import InputError
from multicolm.plugins import policies
from multicolm.types import Piece

DULEREX = "Question: What is Dulerex made from?\nResponse:"
LOXID = "Question: How many mg of Loxid should a patient of 60 kg get?\nResponse:"


def test_one_prompt_gives_its_text_and_nothing_else(run, loaded) -> None:
    result = run("generate", "tiny", DULEREX)
    assert (result.code, result.err) == (0, "")
    assert result.out == loaded.generate([DULEREX])[0].text + "\n"


def test_several_prompts_give_one_block_each(run, loaded) -> None:
    result = run("generate", "tiny", DULEREX, LOXID)
    first, second = (answer.text for answer in loaded.generate([DULEREX, LOXID]))
    shortened = "Question: How many mg of Loxid should a patient of 60 kg get? Respo..."
    assert result.out == (
        f"[1/2] Question: What is Dulerex made from? Response:\n{first}\n\n"
        f"[2/2] {shortened}\n{second}\n\n"
    )


def test_json_is_one_line_per_answer(run, loaded) -> None:
    result = run("generate", "tiny", DULEREX, LOXID, "--json", "--policy", "average")
    answers = [json.loads(line) for line in result.out.splitlines()]
    expected = [answer.as_json() for answer in loaded.generate([DULEREX, LOXID], "average")]
    for answer in (*answers, *expected):
        for used in answer["usage"].values():
            used.pop("seconds")
    assert answers == expected
    assert {token["model"] for token in answers[0]["trace"]} == {"mixture"}


def test_the_policy_and_its_params_may_be_given(run, loaded) -> None:
    result = run(
        "generate",
        "tiny",
        DULEREX,
        "--policy",
        "cosd-rule",
        "--set",
        "alpha=0",
        "--set",
        "beta=1e-1",
    )
    assert result.out == loaded.generate([DULEREX], "single")[0].text + "\n"
    result = run("generate", "tiny", DULEREX, "--set", "threshold=1")
    assert result.out == loaded.generate([DULEREX], "single")[0].text + "\n"


def test_a_policy_may_stand_in_a_file_of_python(run, loaded, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(policies, "_classes", dict(policies._classes))
    file = tmp_path / "mine.py"
    file.write_text(
        "from multicolm.policy import SelectPolicy, register_policy\n"
        "@register_policy('always-second')\n"
        "class Second(SelectPolicy):\n"
        "    index: int = 1\n"
        "    base_signals = {'top1'}\n"
        "    def select(self, views):\n"
        "        return views.base.top1_ids * 0 + self.index\n"
    )
    result = run(
        "generate", "tiny", DULEREX, "--policy", f"{file}:Second", "--set", "index=2", "--json"
    )
    assert {token["model"] for token in json.loads(result.out)["trace"]} == {"math"}


def test_every_setting_reaches_the_ensemble(run, loaded, monkeypatch) -> None:
    seen: dict[str, object] = {}
    stream = loaded.stream

    def spy(prompts, policy, **settings):
        seen.update(settings)
        return stream(prompts, policy, **settings)

    monkeypatch.setattr(loaded, "stream", spy)
    args = "--max-new-tokens 3 --temperature 0.5 --top-k 4 --top-p 0.9 --seed 7 --stop x --stop y"
    more = "--schedule block --block-size 2 --threads 1 --batch-size 5 --json --top-logprobs 2"
    assert run("generate", "tiny", DULEREX, *args.split(), *more.split()).code == 0
    assert seen == {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "seed": 7,
        "stop": ("x", "y"),
        "schedule": "block",
        "block_size": 2,
        "threads": 1,
        "batch_size": 5,
        "top_logprobs": 2,
    }
    assert run("generate", "tiny", DULEREX).code == 0
    assert set(seen.values()) == {None, 16}


def test_chat_puts_each_prompt_through_every_template(run, loaded) -> None:
    question = "What is Dulerex made from?"
    result = run("generate", "tiny", question, "--chat")
    assert result.out == loaded.generate([[{"role": "user", "content": question}]])[0].text + "\n"
    blocks = run("generate", "tiny", question, question, "--chat").out
    assert blocks.startswith(f"[1/2] {question}\n")


def test_chats_of_a_corpus_are_answered_without_the_answer_that_they_hold(
    run, loaded, tmp_path
) -> None:
    question = {"role": "user", "content": "What is Dulerex made from?"}
    answered = {"messages": [question, {"role": "assistant", "content": "No."}]}
    file = tmp_path / "d.jsonl"
    lines = [answered, {"messages": [question]}, {"prompt": [question]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    texts = [
        json.loads(x)
        for x in run("generate", "tiny", "--from", str(file), "--json").out.split("\n")[:-1]
    ]
    assert [text["prompt"] for text in texts] == [[question]] * 3
    assert len({text["text"] for text in texts}) == 1


@pytest.mark.filterwarnings("always::multicolm.errors.MulticolmWarning")
def test_a_model_without_a_template_reads_chats_in_the_plain_one_and_it_is_said(
    run, tmp_path
) -> None:
    model = tmp_path / "m"
    shutil.copytree(catalog.registry() / "tiny/math", model)
    for file in model.glob("*.jinja"):
        file.unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    file = tmp_path / "e.yaml"
    file.write_text("base_model: b\nmodels:\n  b: {model: ./m, dtype: float32}\n")
    result = run("generate", str(file), "What is 1 + 2?", "--chat", "--json")
    plain = run("generate", str(file), "User: What is 1 + 2?\n\nAssistant:", "--json")
    assert json.loads(result.out)["text"] == json.loads(plain.out)["text"]
    assert result.err.startswith(
        "Warning: model 'b' has no chat template, so its chats are written as `plain` "
        '("User: ...", "Assistant:"); set `chat_template:` for it in the ensemble file'
    )


def test_an_error_in_ones_own_policy_is_one_line(run, loaded, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from multicolm.policy import SelectPolicy\n"
        "class Mine(SelectPolicy):\n"
        "    base_signals = {'logprobs'}\n"
        "    def select(self, views):\n"
        "        return views.base.entropy > 1\n"
        "class Other(SelectPolicy):\n"
        "    def select(self, views):\n"
        "        return {}['a']\n"
    )
    asked = ("generate", "tiny", DULEREX, "--policy")
    result = run(*asked, "mine.py:Mine")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "Error: mine.py:5, Mine.select: View has no 'entropy'; did you mean 'entropy_nats'? "
        "(--debug shows more.)\n"
    )
    assert "mine.py:8, Other.select: KeyError: 'a'" in run(*asked, "mine.py:Other").err
    with pytest.raises(AttributeError):
        run("--debug", *asked, "mine.py:Mine")
    said = run(*asked, "mine.py").err
    assert said == "Error: policy mine.py: name the class, mine.py:Class; it holds Mine, Other.\n"


def test_an_error_that_is_ours_keeps_its_traceback(run, loaded, monkeypatch) -> None:
    monkeypatch.setattr(loaded, "stream", lambda *_, **__: {}["a"])
    monkeypatch.setattr("multicolm.cli.own_code._is_own", lambda code: False)
    with pytest.raises(KeyError):
        run("generate", "tiny", DULEREX)


def test_a_trace_in_a_file_names_the_writers(run, loaded) -> None:
    result = run("generate", "tiny", DULEREX, "--trace")
    stream = loaded.stream([DULEREX])
    expected, writer = "", None
    for piece in stream:
        expected += piece.text if piece.model == writer else f"[{piece.model}]{piece.text}"
        writer = piece.model
    assert result.out == expected + "\n"
    assert result.out.count("[facts]") == 1
    assert run("generate", "tiny", DULEREX, LOXID, "--trace").out.count("[1/2]") == 1


def test_usage_goes_to_stderr(run, loaded) -> None:
    result = run("generate", "tiny", DULEREX, "--usage")
    assert result.out == loaded.generate([DULEREX])[0].text + "\n"
    heading, *lines = result.err.splitlines()
    assert heading == ("model       tokens written  share  forward passes  tokens read  seconds")
    assert [line.split()[0] for line in lines] == ["generalist", "facts", "math", "all"]
    mixed = run("generate", "tiny", DULEREX, "--usage", "--policy", "average").err
    assert [line.split()[0] for line in mixed.splitlines()[1:]] == [
        "generalist", "facts", "math", "mixture", "all",
    ]  # fmt: skip


def test_prompts_come_from_a_file_or_from_standard_input(run, loaded, tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    prompts = [json.loads(line)["prompt"] for line in run(
        "generate", "tiny", "zero", "--from", str(file), "--json", "--max-new-tokens", "1"
    ).out.splitlines()]  # fmt: skip
    assert prompts == ["zero", "one", "two"]
    result = run("generate", "tiny", "--from", "-", "--max-new-tokens", "1", stdin=b"one\ntwo\n")
    assert result.out.startswith("[1/2] one\n")
    chat = json.dumps({"prompt": [{"role": "user", "content": "hello"}], "id": 3})
    result = run(
        "generate", "tiny", "--from", "-", "--max-new-tokens", "1", "--json", stdin=chat.encode()
    )
    assert json.loads(result.out)["prompt"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"a\ncaf\xe9\n", "FILE:2: not UTF-8 text; convert it first."),
        ("p.txt", b" \n\n", "FILE: holds no prompt; write one per line."),
        ("p.txt", None, "FILE: cannot be read: No such file or directory."),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"promt": "b"}\n',
            'FILE:2: must be a JSON object with a "prompt" or "messages", got \'{"promt": "b"}\'.',
        ),
        (
            "p.jsonl",
            b"a\n",
            'FILE:1: must be a JSON object with a "prompt" or "messages", got \'a\'.',
        ),
        (
            "p.txt",
            b'{"prompt": "a"}\nb\n',
            'FILE:2: must be a JSON object with a "prompt" or "messages", got \'b\'.',
        ),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_gets_one_sentence(
    tmp_path, name: str, content: bytes | None, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_prompts(str(file))
    assert str(caught.value) == said.replace("FILE", str(file))


# What `str.splitlines` cuts at besides line feeds; JSON and texts hold them as they are.
OTHER_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_a_line_of_prompts_ends_at_a_line_feed_and_nowhere_else(tmp_path) -> None:
    wanted = [f"a{mark}b" for mark in OTHER_BREAKS]
    texts, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    texts.write_bytes("\r\n".join([*wanted, ""]).encode())
    lines.write_text(
        "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in wanted),
        encoding="utf-8",
    )
    assert read_prompts(str(texts)) == read_prompts(str(lines)) == wanted


def test_a_text_that_looks_like_code_is_a_prompt(tmp_path) -> None:
    file = tmp_path / "p.txt"
    file.write_text('{"a": 1}\n{ not json\n')
    assert read_prompts(str(file)) == ['{"a": 1}', "{ not json"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["tiny"], 2, "no prompt; give one as an argument, or a file of them with --from."),
        (["tiny", ""], 2, "prompt 1 is empty; write at least a word."),
        (["tiny", "x", "--set", "alpha"], 2,
            "--set alpha: write it as name=value, such as alpha=0.4."),
        (["tiny", "x", "--set", "alpha=[1"], 2,
            "--set alpha=[1: the value cannot be read as YAML."),
        (["tiny", "x", "--policy", "cosd-rule", "--set", "alpa=1"], 2,
            "cosd-rule: alpa: unknown key 'alpa'. Did you mean 'alpha'? Allowed: alpha, beta."),
        (["tiny", "x", "--temperature", "-1"], 2, "temperature must be 0 or more, got -1."),
        (["tiny", "x", "--batch-size", "0"], 2, "batch_size must be 1 or more, got 0."),
        (["tiny", "x", "--policy", "single", "--set", "model=9"], 1,
            "there is no model 9: this ensemble has 3 (0 generalist, 1 facts, 2 math)."),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(run, loaded, args, code: int, said: str) -> None:
    result = run("generate", *args)
    assert (result.code, result.out, result.err) == (code, "", f"Error: {said}\n")


def test_a_slip_is_told_before_any_weights_are_loaded(run, monkeypatch) -> None:
    monkeypatch.setattr(multicolm, "load", lambda source: pytest.fail("loaded"))
    assert run("generate", "tiny", "x", "--policy", "cosd-rul").err.startswith(
        "Error: unknown policy 'cosd-rul'. Did you mean 'cosd-rule'?"
    )


def test_ctrl_c_keeps_what_was_finished(run, loaded, interrupted, monkeypatch) -> None:
    [answer] = loaded.generate(["hello"], max_new_tokens=2)
    pieces = [Piece(1, "two", "facts")]
    stream = interrupted(pieces, [answer])
    monkeypatch.setattr(loaded, "stream", lambda *args, **settings: stream)
    result = run("generate", "tiny", "hello", "world", "--json")
    assert (result.code, result.err) == (130, "Interrupted.\n")
    assert json.loads(result.out)["prompt"] == "hello"
    result = run("generate", "tiny", "hello", "world")
    assert (result.code, result.out) == (130, "[2/2] world\ntwo\n\n")


def test_json_lines_come_in_the_order_of_the_prompts_whichever_is_done_first(run) -> None:
    prompts = ["What does Zosos treat?", "a", "What is Dulerex made from?", "b"]
    out = run("generate", "tiny", *prompts, "--json", "--batch-size", "2").out
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts


def test_a_file_gets_the_text_as_it_is(run, rude) -> None:
    assert run("generate", "tiny", "b", "--policy", "single").out == "\n"
    assert run("generate", "tiny", "a", "--policy", "single").out == "\x1b[31m[bold]b\n"


def in_a_terminal(*args: str, **environment: str) -> str:
    """What a terminal of 100 columns is sent."""
    leader, follower = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    variables = {**os.environ, "TERM": "xterm-256color", **environment}
    variables.pop("NO_COLOR", None) if "NO_COLOR" not in environment else None
    child = subprocess.Popen(
        [sys.executable, *args], stdin=follower, stdout=follower, stderr=subprocess.DEVNULL,
        env=variables,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux says so when the other side is closed.
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert child.wait() == 0
    return shown.decode().replace("\r\n", "\n")


SHOW = """
import shutil
import sys
from multicolm.cli.console import Screen
from multicolm.types import Answer, Piece, Trace, TracedToken
screen = Screen(["small", "expert"], trace=True)
tokens = [TracedToken(0, "a", "small", 0.0), TracedToken(1, "b", "expert", 0.0)]
for piece in (Piece(0, "a[bold]\\x1b[2J", "small"), Piece(0, " b\\u202e", "expert")):
    screen.show(piece)
screen.end(Answer("p", "ab", Trace(tuple(tokens)), {}, "eos", "single"))
"""


def test_a_terminal_shows_each_writer_in_a_colour_and_a_legend() -> None:
    assert in_a_terminal("-c", SHOW) == (
        "\x1b[39ma[bold]\\x1b[2J\x1b[0m\x1b[36m b\\u202e\x1b[0m\n"
        "\x1b[2mtokens by\x1b[0m  \x1b[39msmall 1\x1b[0m  \x1b[36mexpert 1\x1b[0m\n"
    )


def test_a_terminal_without_colours_names_the_writers() -> None:
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert in_a_terminal("-c", SHOW, **environment) == (
            "[small]a[bold]\\x1b[2J[expert] b\\u202e\n"
        )


@pytest.mark.slow
def test_the_command_itself_writes_a_coloured_text_in_a_terminal() -> None:
    shown = in_a_terminal(
        "-m", "multicolm", "generate", "tiny", DULEREX, "--policy", "max-confidence", "--trace"
    )
    assert "\x1b[36m" in shown and "tokens by" in shown


@pytest.mark.slow
def test_the_command_itself_works_without_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "multicolm", "generate", "tiny", DULEREX, "--json"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0
    # No progress bars, no warnings; only what takes more than two seconds says so.
    assert set(done.stderr.splitlines()) <= {"loading 3 models ..."}
    assert json.loads(done.stdout)["text"]
