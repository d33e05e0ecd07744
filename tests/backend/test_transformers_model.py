"""What a model of the transformers library says about itself, and what is refused."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from tiny_models import CONFIGS, byte_level, fresh_network, model, network, shared_tokenizer, t5

from multicolm import Ensemble, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.errors import CapabilityError, InputError, ModelError


def test_an_encoder_decoder_is_refused_by_name() -> None:
    with pytest.raises(
        ModelError, match=r"^model 'old' is a T5ForConditionalGeneration; .* decoder-only"
    ):
        TransformersModel("old", t5(), shared_tokenizer())


def test_a_network_without_an_output_layer_is_refused_by_name() -> None:
    bare = hf.AutoModel.from_config(CONFIGS["llama"]())
    with pytest.raises(ModelError, match=r"^model 'bare' is a LlamaModel; .* decoder-only"):
        TransformersModel("bare", bare, shared_tokenizer())


@pytest.mark.parametrize(
    ("kind", "length"),
    [("llama", 256), ("gpt2", 256), ("opt", 256), ("rwkv", 256), ("bloom", None), ("mamba", None)],
)
def test_the_context_length_is_that_of_the_positions(kind: str, length: int | None) -> None:
    assert model(kind).context_length == length


def test_positions_of_mpt_are_called_otherwise() -> None:
    config = hf.MptConfig(vocab_size=257, d_model=16, n_heads=2, n_layers=1, max_seq_len=64)
    base = TransformersModel("mpt", fresh_network(config), shared_tokenizer())
    assert base.context_length == 64


def test_end_tokens_are_all_those_of_the_generation_config_the_config_and_the_tokenizer() -> None:
    sick = copy.deepcopy(network("llama"))
    sick.generation_config.eos_token_id = [3, 5]
    sick.config.eos_token_id = 7
    own = shared_tokenizer().eos_token_id
    assert TransformersModel("m", sick, shared_tokenizer()).tokenizer.end_ids == {3, 5, 7, own}
    sick.generation_config.eos_token_id = None
    sick.config.eos_token_id = None
    assert TransformersModel("m", sick, shared_tokenizer()).tokenizer.end_ids == {own}


def test_end_tokens_that_do_not_exist_do_not_count() -> None:
    sick = copy.deepcopy(network("llama"))
    sick.generation_config.eos_token_id = [-1, 99999]
    sick.config.eos_token_id = 4
    end_ids = TransformersModel("m", sick, shared_tokenizer()).tokenizer.end_ids
    assert end_ids == {4, shared_tokenizer().eos_token_id}


def test_every_end_token_of_a_list_ends_a_text() -> None:
    free = copy.deepcopy(network("gpt2"))
    first = Ensemble([TransformersModel("m", free, shared_tokenizer())]).generate(
        "ab cd", max_new_tokens=12
    )[0]
    last = first.trace.tokens[5].id
    free.generation_config.eos_token_id = [256, last]
    answer = Ensemble([TransformersModel("m", free, shared_tokenizer())]).generate(
        "ab cd", max_new_tokens=12
    )[0]
    ids = [token.id for token in answer.trace]
    assert answer.finish_reason == "eos"
    assert (
        ids == [token.id for token in first.trace][: len(ids)] and ids.index(last) == len(ids) - 1
    )


def test_a_model_in_training_mode_is_put_into_evaluation_mode() -> None:
    noisy = copy.deepcopy(network("gpt2"))
    noisy.train()
    base = TransformersModel("m", noisy, shared_tokenizer())
    outputs = [base.open(1).feed([0], [[1, 2, 3]], [1]).logits for _ in range(2)]
    assert not noisy.training and torch.equal(outputs[0], outputs[1])


def test_parameters_and_device_are_reported() -> None:
    base = model("llama")
    assert base.n_parameters == sum(p.numel() for p in network("llama").parameters())
    assert base.on_cpu and base.device == torch.device("cpu")
    base.synchronize()


def test_a_token_that_the_weights_do_not_know_is_refused_in_a_prompt_and_never_written() -> None:
    wider = byte_level(specials=["<pad>"])  # a token was added and the weights were not resized
    base = TransformersModel("m", network("llama"), wider)
    assert base.tokenizer.n_tokens == len(shared_tokenizer())
    with pytest.raises(InputError, match=r"model 'm' has a token '<pad>' \(id 266\) that its"):
        base.tokenizer.encode_rendered("ab <pad>")
    assert Ensemble([base]).generate("ab <pad>", max_new_tokens=2)  # there it is plain text
    answer = Ensemble([base, model("gpt2")]).generate("ab", max_new_tokens=4)[0]
    plain = Ensemble([model("llama", "m")]).generate("ab", max_new_tokens=4)[0]
    assert [t.id for t in answer.trace] == [t.id for t in plain.trace]


def test_a_table_shows_no_hidden_states_and_says_so() -> None:
    table = TableModel("coin", ["a", "."], {"": {"a": 0.5, ".": 0.5}}, ends=["."])
    assert "hidden" not in table.signals
    with pytest.raises(InputError, match="table 'coin' has no hidden states"):
        table.open(1).feed([0], [[0]], [1], hidden=True)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"": {"a": 0.5}}, "probabilities must be >= 0 and sum to 1"),
        ({"": {"a": 1.5, ".": -0.5}}, "probabilities must be >= 0 and sum to 1"),
        ({"": {"b": 1.0}}, "'b' is no token; known: a, \\."),
        ({"b": {"a": 1.0}}, "'b' is no token"),
        ({"a": {"a": 1.0}}, 'has no entry ""'),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, dict[str, float]], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        TableModel("coin", ["a", "."], table, ends=["."])


def test_the_longest_context_of_a_table_counts() -> None:
    table = TableModel(
        "t", ["a", "b"], {"": {"a": 1.0}, "a": {"b": 1.0}, ("b", "a"): {"a": 0.25, "b": 0.75}}
    )
    session = table.open(1)
    probs = session.feed([0], [[0, 1, 0]], [3]).logits.exp()
    assert torch.allclose(probs, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.25, 0.75]]))
    session.truncate(0, 1)
    assert torch.allclose(session.feed([0], [[0]], [1]).logits.exp(), torch.tensor([[0.0, 1.0]]))


def test_hidden_states_of_a_model_without_an_output_layer_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = model("llama")
    monkeypatch.setattr(base.model, "get_output_embeddings", lambda: None)
    with pytest.raises(CapabilityError, match=r"model 'llama' .* has no output layer"):
        base.open(1).feed([0], [[1]], [1], hidden=True)


def test_a_policy_that_wants_hidden_states_of_such_a_model_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In a server its passes are those of others too, who would fail with it.
    class ByState(SelectPolicy):
        name = "by-state"
        base_signals: ClassVar[Any] = {"hidden"}

        def select(self, views: Views) -> torch.Tensor:
            return (views.base.hidden.sum(-1) > 0).long()

    base = model("llama", "base")
    ensemble = Ensemble([base, model("gemma3", "other")])
    ensemble.check(ByState())
    monkeypatch.setattr(base.model, "get_output_embeddings", lambda: None)
    with pytest.raises(CapabilityError, match=r"needs hidden of model 'base', which shows only"):
        ensemble.check(ByState())
