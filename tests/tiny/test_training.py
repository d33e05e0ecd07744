"""Training runs end to end, is repeatable, and saves folders that anybody can load."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from embedded import training
from embedded.training import (
    DOCUMENTS,
    PLANS,
    batches,
    learn_tokenizer,
    learning_rate,
    new_model,
    optimise,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from multicolm.tiny.world import build_world, stream

WORLD = build_world()


@pytest.fixture(autouse=True)
def one_thread_and_few_documents(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "TOKENIZER_DOCUMENTS", 300)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(PLANS, "math", replace(PLANS["math"], rows=2, row_tokens=48, layers=1))


def test_a_short_training_ends_in_a_folder_that_transformers_can_load(tmp_path, small):
    seen = []
    train("math", WORLD, tmp_path / "math", 9, lambda step, nats: seen.append((step, nats)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "math")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "math")
    assert [step for step, _ in seen] == list(range(1, 10))
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 512
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 0
    assert tokenizer.bos_token is None


def test_equal_seeds_give_equal_weights(tmp_path, small):
    losses = [train("math", WORLD, tmp_path / name, 4) for name in "ab"]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert losses[0] == losses[1]
    assert first == second


def test_training_lowers_the_loss(small):
    plan = PLANS["math"]
    tokenizer = learn_tokenizer(WORLD, plan)
    rows = batches(plan, tokenizer, DOCUMENTS["math"](WORLD, stream(1, "x")), stream(1, "y"))
    heard = []
    optimise(new_model(plan, 1), rows, 40, lambda _, nats: heard.append(nats))
    assert heard[-1] < heard[0] - 0.3


def test_a_loss_that_is_no_number_stops_the_training(small):
    model = new_model(PLANS["math"], 1)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0; nothing was saved"):
        optimise(model, [torch.zeros(1, 8, dtype=torch.long)], 1)


def test_a_new_model_leaves_the_global_generator_as_it_was():
    before = torch.random.get_rng_state()
    new_model(PLANS["facts"], 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_row_begins_where_a_document_begins():
    plan = PLANS["facts"]
    tokenizer = learn_tokenizer(WORLD, plan)
    documents = [f"{number}. Zosos treats nausea." for number in range(2000)]
    rows = next(batches(plan, tokenizer, iter(documents), stream(1, "rows")))
    assert rows.shape == (plan.rows, plan.row_tokens)
    assert all(tokenizer.decode(row[:1].tolist()).isdigit() for row in rows)


def test_every_eighth_batch_has_long_rows_and_no_more_tokens():
    plan = PLANS["facts"]
    tokenizer = learn_tokenizer(WORLD, plan)
    rows = batches(plan, tokenizer, DOCUMENTS["facts"](WORLD, stream(1, "x")), stream(1, "y"))
    shapes = [tuple(batch.shape) for batch in itertools.islice(rows, 16)]
    assert [step for step, shape in enumerate(shapes) if shape[1] == 384] == [7, 15]
    assert max(count * length for count, length in shapes) == plan.rows * plan.row_tokens


@pytest.mark.parametrize("name", PLANS)
def test_tokenizers_have_their_planned_size_and_the_end_token_first(name):
    tokenizer = learn_tokenizer(WORLD, PLANS[name])
    assert tokenizer.get_vocab_size() <= PLANS[name].vocabulary
    assert tokenizer.token_to_id("<|end|>") == 0
    assert len(tokenizer.encode("161").ids) == 3


def test_equal_plans_give_equal_tokenizers():
    first, second = (learn_tokenizer(WORLD, PLANS[name]).to_str() for name in ("facts", "math"))
    assert json.loads(first) == json.loads(second)


def test_the_learning_rate_warms_up_stays_and_falls_to_a_twentieth():
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(3e-3 / 60)
    assert rates[60] == rates[399] == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(0.05 * 3e-3, rel=0.05)
    assert rates[399:] == sorted(rates[399:], reverse=True)
