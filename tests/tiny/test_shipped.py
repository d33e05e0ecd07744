"""The weights in registry/tiny: sizes, tokenizers, and that they can only answer together."""

import json
from pathlib import Path

import pytest
import torch
from embedded.head import train_head
from embedded.measure import TOGETHER, alone, load, oracle, read_records
from embedded.training import PLANS
from safetensors.torch import load_file
from transformers import AutoTokenizer

import multicolm
from multicolm.config import load_ensemble
from multicolm.scoring.corpus import open_corpus
from multicolm.tiny.world import KINDS, SPLITS, build_world, is_right
from multicolm.training.identities import identities

FOLDER = Path(__file__).parents[2] / "registry" / "tiny"
WORLD = build_world()
SAMPLE_PER_KIND = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    return {name: load(FOLDER / name) for name in PLANS}


@pytest.fixture(scope="module")
def sample():
    test = WORLD.questions("test")
    return [
        question
        for kind in KINDS
        for question in [each for each in test if each.kind == kind][:SAMPLE_PER_KIND]
    ]


def test_everything_together_is_at_most_eight_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8e6


@pytest.mark.parametrize("name", PLANS)
def test_weights_are_fp16_and_the_configuration_asks_for_float32(name):
    weights = load_file(FOLDER / name / "model.safetensors")
    config = json.loads((FOLDER / name / "config.json").read_text())
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 512


@pytest.mark.parametrize("name", PLANS)
def test_models_have_their_planned_shape(name, models):
    config = models[name][0].config
    assert (config.vocab_size, config.num_hidden_layers) == (
        PLANS[name].vocabulary,
        PLANS[name].layers,
    )
    assert len(models[name][1]) == PLANS[name].vocabulary


def test_the_three_share_one_tokenizer_and_the_others_have_their_own():
    texts = {name: (FOLDER / name / "tokenizer.json").read_text() for name in PLANS}
    assert texts["generalist"] == texts["facts"] == texts["math"]
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize("name", PLANS)
def test_any_text_survives_encoding_and_decoding(name):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    for text in ("Question: 23 * 7 =\nResponse:", "  two  spaces .", "Ünïcödé 漢字 🙂", "\t\r\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|end|>")["input_ids"] == [0]


@pytest.mark.parametrize("name", PLANS)
def test_a_chat_becomes_the_prompt_of_the_question_files(name):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    chat = [{"role": "user", "content": "What is Dulerex made from?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "Question: What is Dulerex made from?\nResponse:"


def test_a_longer_chat_has_an_end_token_after_each_response():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "generalist")
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": " Sure. Answer: 1."},
        {"role": "user", "content": "Two?"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "Be brief.\nQuestion: One?\nResponse: Sure. Answer: 1.<|end|>\nQuestion: Two?\nResponse:"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_the_question_files_are_those_of_the_default_seed(split):
    assert read_records(FOLDER / "questions" / f"{split}.jsonl") == [
        question.as_record() for question in WORLD.questions(split)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_no_model_can_answer_alone(name, models, sample):
    assert alone(models[name], sample).overall <= 5.0


@pytest.mark.slow
def test_together_they_can_answer(models, sample):
    shared = [models[name][0] for name in TOGETHER]
    assert oracle(shared, models["generalist"][1], sample).overall >= 98.0


def test_the_trained_head_is_of_the_shipped_models_and_questions():
    facts = json.loads((FOLDER / "co-llm" / "provenance.json").read_text())
    table = facts["train"]
    assert (table["source"], table["examples"]) == ("registry/tiny/questions/train.jsonl", 1200)
    assert table["digest"] == open_corpus(FOLDER / "questions" / "train.jsonl").digest()
    found = identities(load_ensemble("tiny"))
    assert {model["name"]: model["identity"] for model in facts["models"]} == found
    assert facts["license"] == "Apache-2.0"


def test_a_head_that_is_there_is_not_trained_again(tmp_path):
    (tmp_path / "co-llm").mkdir()
    train_head(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["co-llm"]


def test_the_head_of_a_folder_is_trained_by_the_commands_and_answers(tmp_path):
    for name in TOGETHER:
        (tmp_path / name).symlink_to(FOLDER / name)
    lines = (FOLDER / "questions" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "train.jsonl").write_text("".join(lines[::10]))
    train_head(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {*TOGETHER, "questions", "co-llm"}
    assert not (tmp_path / "co-llm" / ".lock").exists()
    [answer] = multicolm.load("tiny").generate(
        [[{"role": "user", "content": "What is Dulerex made from?"}]], tmp_path / "co-llm"
    )
    assert answer.text.endswith("Answer: thyme.")


def test_with_its_own_policy_the_ensemble_answers_what_no_model_can(sample):
    ensemble = multicolm.load("tiny")
    assert ensemble.policy.name == "co-llm"
    asked = sample[:: SAMPLE_PER_KIND // 6]
    said = [q.prompt.removeprefix("Question: ").removesuffix("\nResponse:") for q in asked]
    chats = [[{"role": "user", "content": text}] for text in said]
    for prompts in ([question.prompt for question in asked], chats):
        answers = ensemble.generate(prompts)
        right = [is_right(a.text, q.answer) for a, q in zip(answers, asked, strict=True)]
        assert sum(right) >= 0.9 * len(asked)
