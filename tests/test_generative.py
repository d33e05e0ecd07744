"""An ensemble in the place of a transformers model writes what that model would write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from tables import random_table
from tiny_models import PROMPTS, generated, model, network, shared_tokenizer

import multicolm
from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.errors import CapabilityError, InputError, UnknownNameError

ASKED = [
    "Question: What is Dulerex made from?\nResponse:",
    "Question: What is 2 * x + 15 if x = 7?\nResponse:",
    "Response:",
]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Ensemble]:
    yield multicolm.load("tiny")


@pytest.fixture
def inputs(tiny: Ensemble) -> Any:
    """Prompts of several lengths, padded on the left."""
    tokenizer = multicolm.as_transformers(tiny).tokenizer
    assert tokenizer is not None
    return tokenizer(ASKED, return_tensors="pt", padding=True)


def own(tiny: Ensemble) -> Any:
    return tiny.backends[0].model  # type: ignore[attr-defined]


# --- the base model alone ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_single_is_the_base_models_own_generate(
    tiny: Ensemble, inputs: Any, batch_size: int
) -> None:
    mine = multicolm.as_transformers(tiny, "single")
    found = mine.generate(**inputs, max_new_tokens=40, batch_size=batch_size)
    expected = own(tiny).generate(**inputs, max_new_tokens=40, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 40},
        {"max_new_tokens": 1},
        {"generation_config": hf.GenerationConfig(max_new_tokens=12, num_beams=1)},
        {"max_new_tokens": 24, "pad_token_id": 5},
        {"max_new_tokens": 12, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 12, "use_cache": True, "output_scores": False},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_fields_that_are_honoured_mean_what_they_mean_there(
    tiny: Ensemble, inputs: Any, settings: dict[str, Any]
) -> None:
    found = multicolm.as_transformers(tiny, "single").generate(**inputs, **settings)
    assert torch.equal(found, own(tiny).generate(**inputs, **settings))


def test_stop_strings_stay_in_the_text(tiny: Ensemble, inputs: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 30, "stop_strings": [" is"]}
    mine = multicolm.as_transformers(tiny, "single")
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    found = mine.generate(**one, **settings, tokenizer=mine.tokenizer)
    expected = own(tiny).generate(**one, **settings, tokenizer=mine.tokenizer, do_sample=False)
    assert torch.equal(found, expected)
    assert mine.tokenizer is not None
    assert mine.tokenizer.decode(found[0]).endswith(" is")


def test_random_models_write_the_same_too() -> None:
    tokenizer = shared_tokenizer()
    for kind in ("llama", "gpt2"):
        mine = multicolm.as_transformers(Ensemble([model(kind)]))
        texts = generated(network(kind), PROMPTS[:4], 12)
        for prompt, text in zip(PROMPTS, texts, strict=False):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            assert mine.generate(ids, max_new_tokens=12)[0, ids.shape[1] :].tolist() == text


# --- ensembles -----------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_trace(tiny: Ensemble, inputs: Any) -> None:
    found = multicolm.as_transformers(tiny, "cosd-rule").generate(**inputs, max_new_tokens=40)
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    answers = tiny.generate(rows, "cosd-rule", max_new_tokens=40)
    width = inputs["input_ids"].shape[1]
    for line, answer in zip(found, answers, strict=True):
        ids = [token.id for token in answer.trace]
        assert line[width : width + len(ids)].tolist() == ids
        assert set(line[width + len(ids) :].tolist()) <= {0}
        assert torch.equal(line[:width], inputs["input_ids"][list(answers).index(answer)])


def test_models_of_other_vocabularies_give_the_base_models_tokens() -> None:
    mixed = multicolm.load("tiny-mixed")
    mine = multicolm.as_transformers(mixed, "cosd-rule")
    assert mine.tokenizer is not None
    ids = mine.tokenizer(ASKED[0], return_tensors="pt")["input_ids"]
    heard = Heard()
    found = mine.generate(ids, max_new_tokens=40, streamer=heard)
    [answer] = mixed.generate([ids[0].tolist()], "cosd-rule", max_new_tokens=40)
    text = mine.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == answer.text
    assert heard.tokens == found[0].tolist() and heard.ended


def test_set_seed_makes_texts_repeatable_and_each_of_several_another(tiny: Ensemble) -> None:
    mine = multicolm.as_transformers(tiny, "average")
    assert mine.tokenizer is not None
    ids = mine.tokenizer("Question: What", return_tensors="pt")["input_ids"]
    settings: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 16}
    texts = []
    for _ in range(2):
        hf.set_seed(7)
        texts.append(mine.generate(ids, **settings, num_return_sequences=3))
    assert torch.equal(texts[0], texts[1])
    assert len({tuple(row) for row in texts[0].tolist()}) == 3
    by_seed = [mine.generate(ids, **settings, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(by_seed[0], by_seed[1])
    assert by_seed[0].tolist() != by_seed[2].tolist()


@pytest.mark.parametrize("unsaid", [{"max_new_tokens": None}, {"max_length": None}], ids=str)
def test_a_length_of_none_is_not_said(tiny: Ensemble, inputs: Any, unsaid: dict[str, Any]) -> None:
    mine = multicolm.as_transformers(tiny)
    assert torch.equal(mine.generate(**inputs, **unsaid), mine.generate(**inputs))
    short = mine.generate(**inputs, max_new_tokens=3, max_length=None)
    assert short.shape[1] == inputs["input_ids"].shape[1] + 3


def test_what_is_not_said_is_the_ensembles_own(tiny: Ensemble) -> None:
    mine = multicolm.as_transformers(tiny)
    assert mine.generation_config.max_new_tokens == tiny.generation.max_new_tokens
    assert mine.policy is tiny.policy
    sampled = Ensemble(
        [random_table("p", 0)],
        generation=multicolm.ensemble.GenerationConfig(temperature=0.5, top_k=3, stop="x"),
    )
    config = multicolm.as_transformers(sampled).generation_config
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.5, 3)
    assert config.stop_strings == ["x"]


# --- streamers and pipelines ---------------------------------------------------------------------


class Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.n_puts = 0
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.n_puts += 1
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_prompt_and_every_token(tiny: Ensemble, inputs: Any) -> None:
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    mine, theirs = Heard(), Heard()
    found = multicolm.as_transformers(tiny, "single").generate(
        **one, max_new_tokens=20, streamer=mine
    )
    own(tiny).generate(**one, max_new_tokens=20, streamer=theirs, do_sample=False)
    assert mine.tokens == theirs.tokens == found[0].tolist()
    assert mine.ended and mine.n_puts == theirs.n_puts


def test_an_assistants_own_end_is_the_base_models_and_the_tokens_before_it_stay() -> None:
    tokens = ["a", "b", "ab", "."]
    table = {"": {"a": 1.0}, "a": {"b": 1.0}, ("a", "b"): {"<y>": 1.0}}
    ensemble = Ensemble(
        [
            TableModel("base", tokens, {"": {"a": 1.0}}, ends=["."]),
            TableModel("other", [*tokens, "<y>"], table, ends=[".", "<y>"]),
        ]
    )
    other = {"kind": "single", "params": {"model": "other"}}
    heard = Heard()
    prompt = torch.tensor([[1]])
    found = multicolm.as_transformers(ensemble, other).generate(prompt, streamer=heard)
    assert found.tolist() == [[1, 0, 1, 3]]
    assert heard.tokens == [1, 0, 1, 3] and heard.ended


def test_the_text_streamer_prints_the_text(
    tiny: Ensemble, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = multicolm.as_transformers(tiny, "cosd-rule")
    assert mine.tokenizer is not None
    streamer = hf.TextStreamer(mine.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = mine.tokenizer(ASKED[0], return_tensors="pt")
    mine.generate(**ids, streamer=streamer)
    [answer] = tiny.generate([ASKED[0]], "cosd-rule")
    assert capsys.readouterr().out == answer.text + "\n"


def test_a_text_generation_pipeline_runs_on_it(tiny: Ensemble) -> None:
    mine = multicolm.as_transformers(tiny, "cosd-rule")
    pipe = hf.pipeline("text-generation", model=mine, tokenizer=mine.tokenizer, device="cpu")
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
    texts = pipe(ASKED[:2], return_full_text=False, batch_size=2, **settings)
    answers = tiny.generate(ASKED[:2], "cosd-rule", max_new_tokens=40)
    assert [text[0]["generated_text"] for text in texts] == [answer.text for answer in answers]
    chat = [{"role": "user", "content": "What is Dulerex made from?"}]
    [reply] = pipe(chat, **settings)
    [expected] = tiny.generate([chat], "cosd-rule", max_new_tokens=40)
    assert reply["generated_text"][-1] == {"role": "assistant", "content": expected.text}


def test_a_dictionary_is_returned_if_it_is_asked_for(tiny: Ensemble, inputs: Any) -> None:
    mine = multicolm.as_transformers(tiny)
    found = mine.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(found.sequences, mine.generate(**inputs, max_new_tokens=4))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_beams": 4}, r"generate\(num_beams=4\): an ensemble does not do this; it honours"),
        ({"repetition_penalty": 1.2}, r"generate\(repetition_penalty=1.2\)"),
        ({"output_scores": True}, r"generate\(output_scores=True\)"),
        ({"logits_processor": [1]}, r"generate\(logits_processor=\[1\]\)"),
        ({"assistant_model": "x"}, r"generate\(assistant_model='x'\)"),
        ({"max_new_tokns": 4}, r"generate\(max_new_tokns=4\)"),
        ({"generation_config": hf.GenerationConfig(min_p=0.1)}, r"generate\(min_p=0.1\)"),
        ({"eos_token_id": 5}, r"generate\(eos_token_id=5\): every model ends a text with its own"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_an_ensemble_does_not_do_is_refused_by_name(
    tiny: Ensemble, inputs: Any, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CapabilityError, match=complaint):
        multicolm.as_transformers(tiny).generate(**inputs, **settings)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "give `input_ids`"),
        ({"input_ids": torch.ones(1, 2).bool()}, "expected whole numbers"),
        ({"input_ids": torch.zeros(3)}, "expected whole numbers"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"have shape \[1, 0\]"),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[1, 1, 0]])},
            "row 0 of input_ids is not padded on the left",
        ),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)},
            "row 0 of input_ids is nothing but padding",
        ),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(2, 2)},
            "attention_mask has shape",
        ),
        ({"input_ids": torch.ones(1, 9).long(), "max_length": 9}, "max_length is 9"),
        (
            {"input_ids": torch.ones(1, 2).long(), "num_return_sequences": 2},
            "contradict.*do_sample",
        ),
        ({"input_ids": torch.ones(2, 2).long(), "streamer": Heard()}, "a streamer takes one text"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    tiny: Ensemble, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        multicolm.as_transformers(tiny).generate(**arguments)


def test_it_neither_moves_nor_is_called(tiny: Ensemble) -> None:
    mine = multicolm.as_transformers(tiny)
    assert mine.to("cpu") is mine and mine.eval() is mine and mine.can_generate()
    with pytest.raises(CapabilityError, match="does not move to meta"):
        mine.to("meta")
    with pytest.raises(CapabilityError, match="no single forward pass"):
        mine(input_ids=torch.ones(1, 2))
    with pytest.raises(UnknownNameError, match="unknown policy"):
        multicolm.as_transformers(tiny, "cosd-rul")
