"""What `multicolm validate` says of templates, special tokens and tasks."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest

import multicolm
from multicolm import ModelNames, catalog
from multicolm.errors import MulticolmWarning
from multicolm.tokenizer.bridged import join
from multicolm.tokenizer.bridges import pairs
from multicolm.tokenizer.literal import LiteralTokenizer

TEMPLATED = """\
base_model: facts
models:
  facts: {{model: tiny-facts, dtype: float32, chat_template: {facts}}}
  math: {{model: tiny-math-own, dtype: float32}}
"""


def test_a_template_with_special_tokens_that_a_model_does_not_have_is_warned_of(
    run, tmp_path: Path
) -> None:
    file = tmp_path / "duo.yaml"
    file.write_text(TEMPLATED.format(facts="chatml"))
    said = run("validate", str(file), "--load").out
    warning = (
        "models.facts: its `chat_template` writes <|im_start|> and <|im_end|>, which its tokenizer "
        "does not have as tokens, so that the model reads them as text; give the template that it "
        "was trained with, or `chat_template: plain`.\n"
    )
    assert f"  warning  {warning}" in said
    with pytest.warns(MulticolmWarning, match=r"^models\.facts: its `chat_template` writes"):
        multicolm.load(file)
    for template in ("plain", '"{{ messages }}<|end|>"'):  # a token that it has
        file.write_text(TEMPLATED.format(facts=template))
        with warnings.catch_warnings():
            warnings.simplefilter("error", MulticolmWarning)
            multicolm.load(file)


def test_two_ends_of_a_text_are_told_by_their_names() -> None:
    tokens = ["a", "b", "ab", "<s>", "<stop>", "<end>"]
    for ends, wanted in ((["<stop>"], "<end> = <stop>"), (["<end>"], "<end>")):
        other = LiteralTokenizer(tokens, specials=["<stop>", "<s>", "<end>"], ends=ends)
        one = LiteralTokenizer(["a", "b", "ba", "<s>", "<end>"], ["<s>"], ["<end>"])
        tokenizers = [one, other]
        [pair] = pairs(join(ModelNames(["one", "other"]), tokenizers), tokenizers)
        assert wanted in pair.specials and "<s>" in pair.specials


def test_a_task_is_validated_by_name_and_by_file(run, tmp_path: Path) -> None:
    name = catalog.names("tasks")[0]
    assert f"{name}: ok\n  checked  task {name}: fields, metric " in run("validate", name).out
    file = tmp_path / "task.yaml"
    file.write_text("data: {test: none.jsonl}\nprompt: '{q}'\nmetric: {kind: exact-match}\n")
    result = run("validate", str(file))
    assert result.code == 2 and f"{file}:1:1: gold: " in result.out.replace(": missing", "")


def test_loading_says_what_each_model_is(run, tmp_path: Path) -> None:
    said = run("validate", "tiny", "--load").out
    assert (
        "  checked  model facts: LlamaForCausalLM, 295 k parameters, float32, 1.18 MB of weights, "
        "768 tokens, context 512\n"
        "  checked  model facts: ends a text with <|end|>; a chat template\n"
    ) in said
    assert "not used" not in said


def test_generation_settings_that_come_with_weights_are_said_to_be_unused(
    run, tmp_path: Path
) -> None:
    folder = tmp_path / "facts"
    shutil.copytree(catalog.registry() / "tiny/facts", folder)
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [0, 5]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    file = tmp_path / "one.yaml"
    file.write_text(f"base_model: facts\nmodels: {{facts: {{model: {folder}, dtype: float32}}}}\n")
    said = run("validate", str(file), "--load").out
    assert (
        "its author's generation settings (do_sample True, temperature 0.6, top_k 20) are not used"
    ) in said
    # But for the ends of a text, which are what the model was taught.
    ends = multicolm.load(file).backends[0].tokenizer.end_ids
    assert {0, 5} <= ends
