"""Models with the same base and different adapters compute in one network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import PROMPTS, network, save, shared_tokenizer

import multicolm
from multicolm import Ensemble
from multicolm.backend.loading import load_model, load_tokenizer
from multicolm.backend.transformers import TransformersModel
from multicolm.config import ModelConfig

LINEAR: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "mamba": ["in_proj", "x_proj"],
}
PLAIN: dict[str, dict[str, Any]] = {
    "all linear layers": {"r": 4, "lora_alpha": 6},
    "few layers": {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "rslora": {"r": 3, "use_rslora": True, "lora_dropout": 0.1},
    "patterns": {
        "r": 2,
        "target_modules": ["q_proj", "down_proj", "lm_head"],
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 16},
    },
    "a regular expression": {"target_modules": r".*layers\.[02]\..*_proj"},
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "uses `use_dora`"),
    "a saved head": ({"modules_to_save": ["lm_head"]}, "uses `modules_to_save`"),
    "embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "holds base_model.model.model.embed_tokens.lora_embedding_A",
    ),
    "tokens": ({"trainable_token_indices": [5, 6]}, "uses `trainable_token_indices`"),
    "biases": ({"lora_bias": True}, "uses `lora_bias`"),
    "pissa": ({"init_lora_weights": "pissa"}, "uses `init_lora_weights: pissa`"),
}


def adapter(folder: Path, seed: int, kind: str = "llama", **settings: Any) -> str:
    """An adapter with random weights, as PEFT writes it."""
    settings = {"r": 4, "target_modules": LINEAR[kind], **settings}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of what cannot be merged, and of older names
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(network(kind)), peft.LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of networks and of adapters: two of each network, called 1 and 2."""
    path = tmp_path_factory.mktemp("sharing")
    for kind in LINEAR:
        save(path / kind, network(kind), shared_tokenizer())
        for seed in (1, 2):
            adapter(path / f"{kind}-{seed}", seed, kind)
    return path


def configs(places: Path, kind: str = "llama", *more: str) -> dict[str, ModelConfig]:
    """A base, and experts with adapters."""
    adapters = {"base": None, "left": f"{kind}-1", "right": f"{kind}-2"}
    adapters |= {f"more-{i}": name for i, name in enumerate(more)}
    return {
        name: ModelConfig(
            model=str(places / kind),
            dtype="float32",
            adapter=None if folder is None else str(places / folder),
        )
        for name, folder in adapters.items()
    }


def shared(configs: Mapping[str, ModelConfig]) -> list[TransformersModel]:
    return TransformersModel.from_configs(configs)


def separate(configs: Mapping[str, ModelConfig]) -> list[TransformersModel]:
    """The same models, each with weights of its own and its adapter in PEFT's layers."""
    return [
        TransformersModel(name, load_model(name, config), load_tokenizer(name, config))
        for name, config in configs.items()
    ]


def logits(model: TransformersModel) -> torch.Tensor:
    session = model.open(2)
    session.feed([0, 1], [[5, 6, 7], [8]], [1, 1])
    return session.feed([0, 1], [[8, 9], [9, 10, 11]], [2, 3]).logits


def storage(models: list[TransformersModel]) -> int:
    """Bytes that the weights of models take in memory, adapters included."""
    held: dict[int, int] = {}
    for module in {module for model in models for module in model.model.modules()}:
        adapters = [vars(hook.__self__) for hook in module._forward_hooks.values()]
        matrices = [value for each in adapters for value in each.values()]
        for tensor in [*module.parameters(recurse=False), *matrices]:
            if isinstance(tensor, torch.Tensor):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


@pytest.mark.parametrize("kind", LINEAR)
def test_models_of_one_network_predict_what_separate_copies_predict(
    places: Path, kind: str
) -> None:
    together, apart = shared(configs(places, kind)), separate(configs(places, kind))
    assert len({id(model.model) for model in together}) == 1
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.allclose(logits(mine), logits(theirs), atol=2e-4)
        assert mine.served_as == theirs.served_as
        assert mine.n_parameters == theirs.n_parameters
    passes = "and forward passes of its own" if kind == "mamba" else "and one forward pass"
    assert all(passes in " ".join(model.abilities) for model in together)
    left, right = (logits(model) for model in together[1:])
    assert (left - right).abs().max() > 0.1 < (left - logits(together[0])).abs().max()


@pytest.mark.parametrize("kind", PLAIN)
def test_every_kind_of_plain_lora_shares_the_network(
    places: Path, tmp_path: Path, kind: str
) -> None:
    path = adapter(tmp_path / "adapter", 3, **PLAIN[kind])
    every = configs(places, "llama", path)
    together, apart = shared(every), separate(every)
    assert together[3].model is together[0].model
    assert torch.allclose(logits(together[3]), logits(apart[3]), atol=2e-4)
    assert torch.allclose(logits(together[1]), logits(apart[1]), atol=2e-4)
    assert together[3].n_parameters == apart[3].n_parameters


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_adapter_gets_a_copy_of_the_network_and_says_why(
    places: Path, tmp_path: Path, kind: str
) -> None:
    settings, reason = OTHERS[kind]
    path = adapter(tmp_path / "adapter", 3, **settings)
    every = configs(places, "llama", path)
    together, apart = shared(every), separate(every)
    assert together[3].model is not together[0].model is together[2].model
    assert torch.allclose(logits(together[3]), logits(apart[3]), atol=2e-4)
    for mine, theirs in zip(together[:3], apart[:3], strict=True):
        assert torch.allclose(logits(mine), logits(theirs), atol=2e-4)
    [sentence] = together[3].abilities
    assert sentence.startswith(f"weights of its own: its adapter {reason}")
    assert together[1].abilities == [
        "one copy of the weights and one forward pass with base, right"
    ]


def test_experts_on_one_base_take_the_memory_of_their_adapters(places: Path) -> None:
    every = configs(places)
    base = storage(shared({"base": every["base"]}))
    adapters = sum(model.n_parameters for model in shared(every)) - 3 * base // 4
    assert storage(shared(every)) == base + 4 * adapters
    assert storage(separate(every)) == 3 * base + 4 * adapters


@pytest.mark.parametrize("key", ["dtype", "attn_implementation", "allow_pickled_weights"])
def test_models_that_run_the_same_weights_in_another_way_share_nothing(
    places: Path, key: str
) -> None:
    other = {"dtype": "bfloat16", "attn_implementation": "eager", "allow_pickled_weights": True}
    every = configs(places)
    every["right"] = every["right"].model_copy(update={key: other[key]})
    base, left, right = shared(every)
    assert base.model is left.model is not right.model
    own = getattr(every["base"], key)
    assert right.abilities == [f"weights of its own: `{key}` is {other[key]}, and {own} for base"]
    assert base.abilities == ["one copy of the weights and one forward pass with left"]


def test_a_model_that_nobody_shares_weights_with_says_nothing_of_it(places: Path) -> None:
    every = configs(places)
    assert [model.abilities for model in shared({"left": every["left"]})] == [[]]


def test_an_ensemble_file_shares_weights_and_writes_what_separate_copies_write(
    places: Path, tmp_path: Path
) -> None:
    (tmp_path / "e.yaml").write_text(
        "base_model: plain\nmodels:\n"
        f"  plain: {{model: {places}/llama, dtype: float32}}\n"
        f"  left: {{model: {places}/llama, dtype: float32, adapter: {places}/llama-1}}\n"
        f"  right: {{model: {places}/llama, dtype: float32, adapter: {places}/llama-2}}\n"
        "policy: max-confidence\n"
    )
    every = {name.replace("base", "plain"): each for name, each in configs(places).items()}
    mine, theirs = multicolm.load(tmp_path / "e.yaml"), Ensemble(separate(every))
    for batch_size in (1, 3):
        settings: dict[str, Any] = {"max_new_tokens": 10, "batch_size": batch_size}
        answers = mine.generate(PROMPTS[:4], **settings)
        others = theirs.generate(PROMPTS[:4], "max-confidence", **settings)
        assert [answer.text for answer in answers] == [answer.text for answer in others]
        written = {token.model for answer in answers for token in answer.trace}
        assert written == {"plain", "left", "right"}
