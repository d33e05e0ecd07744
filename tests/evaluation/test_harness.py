"""``multicolm eval``: the harness's own model agrees, what was finished is kept, refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_results import fake_comparison, fake_traces
from harness_worlds import Request, records, without_times, write_tasks
from tiny_models import CONFIGS, byte_level, fresh_network, sentencepiece
from tokenizers.processors import TemplateProcessing

import multicolm
from multicolm import Ensemble
from multicolm.backend.transformers import TransformersModel
from multicolm.cli import main
from multicolm.cli.eval import _generation
from multicolm.config import load_ensemble
from multicolm.errors import (
    CapabilityError,
    ConfigError,
    InputError,
    UnknownNameError,
)
from multicolm.evaluation.harness import evaluate_tasks
from multicolm.evaluation.harness_results import HarnessFigure, read_harness_results
from multicolm.evaluation.report import write_report

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from multicolm.evaluation.harness_model import generation_settings

ROOT = Path(__file__).parents[2]
MODELS = ("generalist", "facts", "math")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), records())


@pytest.fixture(scope="module")
def tiny() -> Ensemble:
    return multicolm.load("tiny")


def by_row(figures: Sequence[HarnessFigure], metric: str) -> dict[str, float]:
    return {f.row: f.value for f in figures if f.metric == metric and f.value is not None}


def hf_model(pretrained: Any, **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=pretrained, device="cpu", batch_size=4, **settings)


def of_the_harness(lm: Any, tasks: Path, name: str, **settings: Any) -> dict[str, Any]:
    """What the harness finds of one of its own models, samples included."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=settings.pop("num_fewshot", 0))
        task.set_fewshot_seed(seed=1234)
    found: dict[str, Any] = evaluate(lm=lm, task_dict=loaded, **settings)
    return found


# --- the harness's own model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_rows(tiny: Ensemble, tasks: Path) -> Sequence[HarnessFigure]:
    names = ["tiny_choice", "tiny_answer", "tiny_rolling"]
    return evaluate_tasks(tiny, ["cosd-rule", "average"], names, include_path=[tasks]).figures


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_one_model_is_that_of_the_harness_for_its_folder(
    name: str, all_rows: Sequence[HarnessFigure], tasks: Path
) -> None:
    lm = hf_model(str(ROOT / "registry/tiny" / name), dtype="float32")
    for task, metrics in (
        ("tiny_choice", ("acc", "acc_norm")),
        ("tiny_answer", ("chars",)),
        ("tiny_rolling", ("byte_perplexity",)),
    ):
        found = of_the_harness(lm, tasks, task)["results"][task]
        mine = {f.metric: f for f in all_rows if f.task == task and f.row == f"{name} alone"}
        for metric in metrics:
            assert mine[metric].value == pytest.approx(found[f"{metric},none"], rel=1e-5)
            stderr = found[f"{metric}_stderr,none"]
            if stderr != "N/A":
                assert mine[metric].stderr == pytest.approx(stderr, rel=1e-5)


def test_rows_differ_from_each_other(all_rows: Sequence[HarnessFigure]) -> None:
    for metric in ("acc", "chars", "byte_perplexity"):
        values = by_row(all_rows, metric)
        assert list(values) == [*(f"{name} alone" for name in MODELS), "cosd-rule", "average"]
        assert len(set(values.values())) > 2, metric


def test_a_row_says_by_which_likelihood_a_policy_is_judged(
    all_rows: Sequence[HarnessFigure],
) -> None:
    said = {(f.row, f.metric): f.likelihood for f in all_rows}
    assert said["cosd-rule", "acc"] == "routed"
    assert said["average", "acc"] == "joint"
    assert said["average", "chars"] == ""
    assert said["facts alone", "acc"] == ""


def test_each_request_is_answered_as_by_the_harness(tiny: Ensemble) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    theirs = hf_model(str(ROOT / "registry/tiny/generalist"), dtype="float32")
    mine = EnsembleLM(tiny, "single")
    record = records(1)[0]
    asked = [
        Request(record["prompt"], record["completion"]),
        Request(record["prompt"] + " ", "Answer: colic."),  # the blank belongs to the answer
        Request("", " Zosos treats colic."),
        Request("word " * 600, " word"),  # longer than the context
    ]
    for a, b in zip(mine.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        assert a[1] == b[1]
    assert mine.n_cut == 1
    long = [Request("Zosos is prescribed for palsy. " * 100), Request("12 * 13 = 156.")]
    expected = theirs.loglikelihood_rolling(long)
    assert mine.loglikelihood_rolling(long) == pytest.approx(expected, rel=1e-5)
    settings = {"until": ["."], "max_gen_toks": 16, "do_sample": False}
    texts = [Request(record["prompt"], settings), Request("word " * 600, settings)]
    assert mine.generate_until(texts) == theirs.generate_until(texts)
    assert mine.n_cut == 2


@pytest.mark.parametrize("name", ["generalist", "math"])
def test_special_tokens_of_a_context_and_long_contexts_are_read_as_by_the_harness(
    name: str,
) -> None:
    """By every model in its own tokens, the base model's or not."""
    from multicolm.evaluation.harness_model import EnsembleLM

    mixed = load_ensemble("tiny-mixed")
    theirs = hf_model(mixed.models[name].location, dtype="float32")
    mine = EnsembleLM(multicolm.load(mixed), {"kind": "single", "params": {"model": name}})
    end = theirs.tokenizer.eos_token
    asked = [
        Request(f"What is 2 + 3?{end}\n{end}Answer:", " 5"),
        Request(f"{end}What is 2 + 3?", " Zosos"),
        Request(f"{'12 * 13 = 156. ' * 200}{end}\n", "Answer: 5."),
    ]
    for a, b in zip(mine.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-5)
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    texts = [Request(request.args[0], settings) for request in asked]
    assert mine.generate_until(texts) == theirs.generate_until(texts)
    assert mine.n_cut == 2


def test_the_token_that_begins_a_text_is_not_scored() -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    tokenizer = sentencepiece(prefix=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.pad_token = "</s>"
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokenizer)
    network = fresh_network(config)
    mine = EnsembleLM(Ensemble([TransformersModel("m", network, tokenizer)]))
    asked = [Request("the cat sat in a hat")]
    [found] = mine.loglikelihood_rolling(asked)
    [plain] = hf_model(network, tokenizer=tokenizer, add_bos_token=False).loglikelihood_rolling(
        asked
    )
    [scored] = hf_model(network, tokenizer=tokenizer).loglikelihood_rolling(asked)
    assert found == pytest.approx(plain, rel=1e-5)
    # By itself the harness reads <s> twice: once to begin with, once as a word of the text.
    ids = tokenizer("the cat sat in a hat")["input_ids"]
    with torch.inference_mode():
        logprobs = network(torch.tensor([[1, *ids]])).logits[0].log_softmax(-1)
    assert scored == pytest.approx(float(sum(logprobs[i, t] for i, t in enumerate(ids))), rel=1e-4)
    assert scored != pytest.approx(found, rel=1e-3)
    # With a context both begin with one <s>, and it is not scored.
    pair = [Request("the cat", " sat in")]
    [mine_pair] = mine.loglikelihood(pair)
    [their_pair] = hf_model(network, tokenizer=tokenizer).loglikelihood(pair)
    assert mine_pair[0] == pytest.approx(their_pair[0], rel=1e-5)


def test_few_shot_examples_are_those_of_the_harness(tiny: Ensemble, tasks: Path) -> None:
    lm = hf_model(str(ROOT / "registry/tiny/facts"), dtype="float32")
    found = of_the_harness(lm, tasks, "tiny_choice", num_fewshot=2)["results"]["tiny_choice"]
    results = evaluate_tasks(tiny, [], ["tiny_choice"], include_path=[tasks], num_fewshot=2)
    assert by_row(results.figures, "acc")["facts alone"] == found["acc,none"]
    assert {figure.n_shot for figure in results.figures} == {2}


# --- chats ---------------------------------------------------------------------------------------


def test_chats_are_those_of_the_harness(tiny: Ensemble, tasks: Path) -> None:
    lm = hf_model(str(ROOT / "registry/tiny/facts"), dtype="float32")
    settings = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    results = evaluate_tasks(
        tiny, [], ["tiny_choice", "tiny_answer"], include_path=[tasks], apply_chat_template=True
    )
    for task, metric in (("tiny_choice", "acc_norm"), ("tiny_answer", "chars")):
        found = of_the_harness(lm, tasks, task, **settings)["results"][task]
        mine = by_row([f for f in results.figures if f.task == task], metric)
        assert mine["facts alone"] == pytest.approx(found[f"{metric},none"], rel=1e-5)


def test_each_model_reads_a_chat_in_its_own_template() -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    models = []
    for name, begin in (("one", "Q:"), ("two", "ask ")):
        tokenizer = byte_level()
        tokenizer.chat_template = (
            "{% for m in messages %}" + begin + "{{ m['content'] }}\n{% endfor %}A:"
        )
        config = CONFIGS["llama"]()
        models.append(TransformersModel(name, fresh_network(config, len(models)), tokenizer))
    lm = EnsembleLM(Ensemble(models), "average")
    chat = [{"role": "user", "content": "why"}]
    text = lm.apply_chat_template(chat)
    assert text == "Q:why\nA:"
    [(found, _)] = lm.loglikelihood([Request(text, " so")])
    gold = models[0].tokenizer.encode_continuation(" so")
    total = 0.0
    for i in range(len(gold)):
        mixed = 0.0
        for model in models:
            prompt = model.tokenizer.encode_chat(chat)  # type: ignore[arg-type]
            ids = torch.tensor([[*prompt, *gold[:i]]])
            with torch.inference_mode():
                mixed += float(model.model(ids).logits[0, -1].softmax(-1)[gold[i]]) / 2
        total += math.log(mixed)
    assert found == pytest.approx(total, rel=1e-4)
    begun = lm.apply_chat_template(
        [*chat, {"role": "assistant", "content": " and"}], add_generation_prompt=False
    )
    assert begun == "Q:why\nA: and"
    together = lm.loglikelihood([Request(text, " and so")])[0][0]
    first = lm.loglikelihood([Request(text, " and")])[0][0]
    assert lm.loglikelihood([Request(begun, " so")])[0][0] == pytest.approx(together - first)
    with pytest.raises(InputError, match="gen_prefix"):
        lm.generate_until([Request(begun, {"until": [], "max_gen_toks": 4})])


# --- texts ---------------------------------------------------------------------------------------


def test_texts_are_those_of_generate(tiny: Ensemble) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    lm = EnsembleLM(tiny, "cosd-rule", batch_size=2)
    prompts = [record["prompt"] for record in records(5)]
    settings = {"until": [" is", "."], "max_gen_toks": 20}
    answers = tiny.generate(prompts, "cosd-rule", max_new_tokens=20, stop=[" is", "."])
    texts = lm.generate_until([Request(prompt, settings) for prompt in prompts])
    assert texts == [answer.text for answer in answers]
    assert any(texts)


def test_a_request_that_is_repeated_is_drawn_anew_and_equally_in_every_run(tiny: Ensemble) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    settings = {"max_gen_toks": 20, "do_sample": True, "temperature": 2.0}
    asked = [Request("Question: What", settings)] * 3
    once = EnsembleLM(tiny, "single", seed=5).generate_until(asked)
    assert len(set(once)) == 3
    assert EnsembleLM(tiny, "single", seed=5).generate_until(asked) == once


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_beams": 4, "max_gen_toks": 4}, "the task asks for num_beams = 4"),
        ({"max_gen_toks": 600}, "answers of up to 600 tokens are wanted, and the context of model"),
    ],
)
def test_settings_that_an_ensemble_does_not_have_are_refused(
    settings: dict[str, Any], complaint: str, tiny: Ensemble
) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    with pytest.raises(InputError, match=complaint):
        EnsembleLM(tiny, "single").generate_until([Request("a", {"until": [], **settings})])


def test_settings_that_change_nothing_are_taken(tiny: Ensemble) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    settings = {"until": ".", "max_gen_toks": 4, "num_beams": 1, "top_p": 1.0, "top_k": 0}
    assert EnsembleLM(tiny, "single").generate_until([Request("a", settings)])


# --- runs ----------------------------------------------------------------------------------------


def test_what_was_finished_is_not_run_again(
    tiny: Ensemble, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator

    names = ["tiny_choice", "tiny_answer"]
    settings: dict[str, Any] = {"include_path": [tasks], "out": tmp_path, "limit": 4}
    real, judged = lm_eval.evaluator.evaluate, []

    def evaluate(**arguments: Any) -> Any:
        judged.append(list(arguments["task_dict"]["tasks"]))
        if len(judged) == 4:
            raise KeyboardInterrupt
        return real(**arguments)

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(tiny, ["cosd-rule"], names, **settings)
    assert not (tmp_path / "lm_eval.json").exists()
    whole = evaluate_tasks(tiny, ["cosd-rule"], names, **settings)
    assert len(judged) == 3 + 1 + 5  # eight rows of tasks, one of them twice
    again = evaluate_tasks(tiny, ["cosd-rule"], names, **settings)
    assert len(judged) == 9
    assert again.figures == whole.figures
    assert read_harness_results(tmp_path) == again
    monkeypatch.undo()
    fresh = evaluate_tasks(
        tiny, ["cosd-rule"], names, **{**settings, "out": tmp_path / "fresh"}
    ).figures
    assert without_times(fresh) == without_times(whole.figures)


def test_a_policy_of_other_params_and_a_task_of_other_data_are_judged_anew(
    tiny: Ensemble, tmp_path: Path
) -> None:
    folder = write_tasks(tmp_path / "tasks", records(4))
    settings: dict[str, Any] = {"include_path": [folder], "out": tmp_path / "out", "alone": False}

    def rows() -> int:
        return len((tmp_path / "out/lm_eval.jsonl").read_text().splitlines()) - 1

    policy = tmp_path / "mine.yaml"
    policy.write_text("kind: cosd-rule\nparams: {alpha: 0.5}\n")
    evaluate_tasks(tiny, [policy], ["tiny_choice"], **settings)
    assert rows() == 1
    policy.write_text("kind: cosd-rule\nparams: {alpha: 0.4}\n")
    evaluate_tasks(tiny, [policy], ["tiny_choice"], **settings)
    assert rows() == 2
    write_tasks(folder, records(3))
    results = evaluate_tasks(tiny, [policy], ["tiny_choice"], **settings)
    assert rows() == 3
    assert results.figures[0].n_questions == 3
    with pytest.raises(InputError, match=r"holds another run \(settings"):
        evaluate_tasks(tiny, [policy], ["tiny_choice"], limit=2, **settings)
    other = Ensemble(tiny.backends, generation=tiny.generation.updated({"top_k": 5}))
    with pytest.raises(InputError, match=r"holds another run \(drawing"):
        evaluate_tasks(other, [policy], ["tiny_choice"], **settings)


def test_a_policy_can_be_judged_by_both_likelihoods(tiny: Ensemble, tasks: Path) -> None:
    results = evaluate_tasks(
        tiny,
        ["random", "cosd-rule"],
        ["tiny_choice", "tiny_answer"],
        include_path=[tasks],
        likelihood="both",
        alone=False,
        limit=2,
    )
    said = [(f.row, f.likelihood) for f in results.figures if f.metric == "acc"]
    assert said == [("random", "joint"), ("random", "routed"), ("cosd-rule", "routed")]
    # Texts are written once: it is no question of likelihoods.
    assert [f.row for f in results.figures if f.metric == "chars"] == ["random", "cosd-rule"]


def test_a_policy_without_likelihoods_is_judged_by_its_texts(tiny: Ensemble, tasks: Path) -> None:
    settings: dict[str, Any] = {"include_path": [tasks], "alone": False, "limit": 2}
    results = evaluate_tasks(tiny, ["cool-fusion"], ["tiny_answer"], **settings)
    assert [f.row for f in results.figures] == ["cool-fusion"]
    with pytest.raises(CapabilityError, match="'cool-fusion' gives no likelihood to a text"):
        evaluate_tasks(tiny, ["average", "cool-fusion"], ["tiny_choice"], **settings)


def test_choices_that_a_policy_never_writes_are_counted_and_warned_of(
    tiny: Ensemble, tasks: Path
) -> None:
    greedy = tiny.resolve({"kind": "unite", "params": {"top_k": 1}})
    found = evaluate_tasks(
        tiny, [greedy, "average"], ["tiny_choice"], include_path=[tasks], alone=False
    )
    # The first choice is the right one here: the figure is no merit.
    assert by_row(found.figures, "acc")["unite"] == 1
    assert {f.row: f.n_impossible for f in found.figures} == {"unite": 32, "average": 0}
    [warning] = found.warnings
    assert "Of 'unite' on tiny_choice, 32 texts were impossible" in warning


def test_groups_and_tags_have_rows_too(tiny: Ensemble, tasks: Path) -> None:
    settings: dict[str, Any] = {"include_path": [tasks], "alone": False, "limit": 3}
    grouped = evaluate_tasks(tiny, ["average"], ["tiny_group"], **settings)
    values = {f.task: f.value for f in grouped.figures if f.metric == "acc"}
    assert set(values) == {"tiny_choice", "tiny_other_choice", "tiny_group"}
    assert values["tiny_group"] == pytest.approx(values["tiny_choice"])
    tagged = evaluate_tasks(tiny, ["average"], ["tiny_t*"], **settings)
    assert {figure.task for figure in tagged.figures} == {"tiny_choice"}
    assert tagged.figures[0].version == "1.5"


# --- refusals ------------------------------------------------------------------------------------


def test_an_unknown_task_gets_the_nearest_known_one(tiny: Ensemble, tasks: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task 'hellaswagg'.*Did you mean 'hella"):
        evaluate_tasks(tiny, [], ["tiny_choice", "hellaswagg"], include_path=[tasks])


def test_a_missing_extra_gets_the_command_that_installs_it(
    tiny: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(ConfigError, match=r"need lm-eval: pip install 'multicolm\[eval\]'"):
        evaluate_tasks(tiny, [], ["tiny_choice"])


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"limit": 0}, InputError, "limit must be 1 or more, got 0"),
        ({"seed": 2**63}, InputError, "seed must be less than 9223372036854775808, got"),
        ({"batch_size": 0}, InputError, "batch_size must be 1 or more, got 0"),
        (
            {"gen_kwargs": {"max_gen_toks": "abc"}},
            InputError,
            "max_gen_toks must be a whole number",
        ),
        ({"gen_kwargs": {"max_tokens": 0}}, InputError, "max_tokens must be 1 or more, got 0"),
        ({"gen_kwargs": {"temperature": "hot"}}, InputError, "temperature must be a finite number"),
        ({"gen_kwargs": {"temperature": -1}}, InputError, "temperature must be 0 or more, got -1"),
        ({"gen_kwargs": {"top_p": 1.5}}, InputError, "top_p must be at most 1, got 1.5"),
        ({"gen_kwargs": {"top_k": 1.5}}, InputError, "top_k must be a whole number"),
        ({"gen_kwargs": {"do_sample": "maybe"}}, InputError, "do_sample must be true or false"),
        ({"gen_kwargs": {"until": [1]}}, InputError, "until must be a text or a list of texts"),
        ({"gen_kwargs": {"num_beams": 4}}, InputError, "asks for num_beams = 4"),
        ({"num_fewshot": -1}, InputError, "num_fewshot must be 0 or more, got -1"),
        ({"policies": ["average", "average"]}, InputError, "two rows of the table are called"),
        ({"policies": [], "alone": False}, InputError, "there is nothing to judge"),
        ({"likelihood": "joint"}, CapabilityError, "'cosd-rule' has no joint likelihood"),
        ({"include_path": ["nowhere"]}, ConfigError, "there is no folder nowhere"),
        ({"tasks": []}, ConfigError, "no task; name one"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_model_runs(
    arguments: dict[str, Any],
    error: type[Exception],
    complaint: str,
    tiny: Ensemble,
    tasks: Path,
) -> None:
    given: dict[str, Any] = {
        "policies": ["cosd-rule"],
        "tasks": ["tiny_choice"],
        "include_path": [tasks],
        **arguments,
    }
    with pytest.raises(error, match=complaint):
        evaluate_tasks(tiny, given.pop("policies"), given.pop("tasks"), **given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"max_new_tokens": 256, "temperature": 0.0, "stop": []}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"max_gen_toks": "64", "temperature": "0.5"}, {"max_new_tokens": 64, "temperature": 0.5}),
        ({"max_tokens": np.int64(8), "top_k": -1}, {"max_new_tokens": 8}),
        ({"temperature": 1, "top_k": 4, "top_p": "0.5"}, {"top_k": 4, "top_p": 0.5}),
        ({"until": ["a", ""], "top_k": None, "top_p": "None"}, {"stop": ["a"]}),
        ({"repetition_penalty": 1, "min_p": 0, "num_beams": 1}, {"temperature": 0.0}),
    ],
)
def test_settings_of_the_harness_are_those_of_generate(
    given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    found = generation_settings(given)
    assert {name: found[name] for name in wanted} == wanted
    assert set(found) <= {"max_new_tokens", "temperature", "stop"} | set(wanted)


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        (("temperature=0,do_sample=false",), {"temperature": 0, "do_sample": False}),
        (("max_gen_toks=8, top_p=1", "top_k=3"), {"max_gen_toks": 8, "top_p": 1, "top_k": 3}),
        (('until=["a, b=c", "d"]',), {"until": ["a, b=c", "d"]}),
        (('until=["a"],temperature=0',), {"until": ["a"], "temperature": 0}),
        (("until=a,b",), {"until": "a,b"}),
        (('until="a,b=c"',), {"until": "a,b=c"}),
    ],
)  # fmt: skip
def test_gen_kwargs_are_written_one_by_one_or_in_the_harness_own_form(
    pairs: tuple[str, ...], wanted: dict[str, Any]
) -> None:
    assert _generation(pairs) == wanted


def test_what_goes_wrong_in_a_row_says_where(tiny: Ensemble, tmp_path: Path) -> None:
    write_tasks(tmp_path, records(2))
    file = tmp_path / "answer.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 24", "max_gen_toks: 24, num_beams: 3"))
    complaint = "task 'tiny_answer', row 'average': the task asks for num_beams = 3"
    with pytest.raises(InputError, match=complaint):
        evaluate_tasks(tiny, ["average"], ["tiny_answer"], include_path=[tmp_path], alone=False)


def test_code_that_models_write_is_run_only_if_that_is_said(tiny: Ensemble, tmp_path: Path) -> None:
    write_tasks(tmp_path, records(2))
    file = tmp_path / "rolling.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    settings: dict[str, Any] = {"include_path": [tmp_path], "alone": False}
    with pytest.raises(InputError, match="task 'tiny_rolling' runs code that the models write"):
        evaluate_tasks(tiny, ["average"], ["tiny_rolling"], **settings)
    settings["confirm_run_unsafe_code"] = True
    assert evaluate_tasks(tiny, ["average"], ["tiny_rolling"], **settings).figures


def test_a_task_that_cannot_be_loaded_is_named(tiny: Ensemble, tmp_path: Path) -> None:
    write_tasks(tmp_path, records(2))
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"task 'tiny_choice' cannot be loaded: .*data.jsonl"):
        evaluate_tasks(tiny, [], ["tiny_choice"], include_path=[tmp_path])


# --- what is written -----------------------------------------------------------------------------


def test_the_page_of_a_comparison_shows_the_figures_too(
    tiny: Ensemble, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own tests draw the figure.
    monkeypatch.setattr("multicolm.evaluation.report.pareto", lambda *_: b"")
    write_report(fake_comparison(), fake_traces(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert b"lm-evaluation-harness" not in before["report.html"]
    results = evaluate_tasks(
        *(tiny, ["cosd-rule"], ["tiny_choice"]),
        include_path=[tasks],
        out=tmp_path,
        limit=4,
        title="<b>tiny</b>",
    )
    page = (tmp_path / "report.html").read_text()
    assert "Tasks of the lm-evaluation-harness" in page
    assert "&lt;b&gt;tiny&lt;/b&gt;" in page
    for figure in results.figures:
        assert f"{figure.value:.4f} ± {figure.stderr:.4f}" in page
    # All else is as it was, and comes again with the next comparison in this folder.
    for name in ("results.json", "traces.jsonl", "table.md"):
        assert (tmp_path / name).read_bytes() == before[name]
    write_report(fake_comparison(), fake_traces(), tmp_path)
    assert (tmp_path / "report.html").read_text() == page


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command sets it where stderr is no terminal, but for this test alone."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@pytest.mark.usefixtures("quiet")
def test_the_command_prints_a_table_and_json_and_keeps_both(
    tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "tiny", "--tasks", "tiny_choice,tiny_rolling", "--limit", "2"]
    arguments += ["--include-path", str(tasks), "--out", str(tmp_path), "--policy", "average"]
    assert main(arguments) == 0
    shown = capfd.readouterr()
    assert "tiny_rolling  byte_perplexity  average" in shown.out
    assert str(tmp_path / "lm_eval.md") in shown.out
    assert "generalist alone, tiny_choice: done" in shown.err.splitlines()
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((tmp_path / "lm_eval.json").read_text())
    table = (tmp_path / "lm_eval.md").read_text()
    assert "| average | joint |" in table
    assert table.startswith("# tiny in the lm-evaluation-harness\n")


@pytest.mark.usefixtures("quiet")
def test_the_command_judges_the_ensembles_own_policy_if_none_is_named(
    tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "tiny", "--tasks", "tiny_rolling", "--limit", "1", "--no-alone", "--json"]
    assert main([*arguments, "--include-path", str(tasks)]) == 0
    figures = json.loads(capfd.readouterr().out)["figures"]
    assert [figure["row"] for figure in figures] == ["co-llm"]


@pytest.mark.usefixtures("quiet")
def test_what_an_evaluation_asks_is_said_before_a_model_is_loaded(
    tasks: Path, tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multicolm, "load", lambda source: pytest.fail("it was loaded"))
    arguments = ["eval", "tiny", "--tasks", "tiny_choice", "--limit", "2", "--policy", "average"]
    arguments += ["--include-path", str(tasks), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == "Ahead: 4 rows, 2 questions each (tiny_choice), 8 in all."
    assert not (tmp_path / "out").exists()
    slip = ["eval", "tiny", "--tasks", "tiny_chioce", "--include-path", str(tasks)]
    assert main(slip) == 2


@pytest.mark.usefixtures("quiet")
def test_a_slip_of_the_pen_ends_in_one_sentence(
    tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "tiny", "--tasks", "tiny_choice,", "--include-path", str(tasks)]) == 2
    assert capfd.readouterr().err == "Error: --tasks: a name is missing beside a comma.\n"
