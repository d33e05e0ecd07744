"""Weights and tokenizers are loaded safely, and what is wrong with them is said in one sentence."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import PROMPTS, byte_level, decoder_replaced, network, save, shared_tokenizer, t5
from transformers import LlamaConfig

from multicolm import Ensemble
from multicolm.backend.loading import _without_known
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.config import EnsembleConfig, ModelConfig, ResolvedModel, parse_ensemble
from multicolm.errors import (
    ConfigError,
    InputError,
    MulticolmError,
    MulticolmWarning,
    VocabularyError,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model."""
    path = tmp_path_factory.mktemp("models") / "sound"
    save(path, network("llama"), shared_tokenizer())
    return path


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture
def pickled(folder: Path, tmp_path: Path) -> Path:
    """The same model with its weights pickled."""
    path = copied(folder, tmp_path / "pickled")
    (path / "model.safetensors").unlink()
    torch.save(network("llama").state_dict(), path / "pytorch_model.bin")
    return path


def load(path: Path, **settings: Any) -> TransformersModel:
    return TransformersModel.from_config("m", ModelConfig(model=str(path), **settings))


def refused(path: Path, **settings: Any) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(MulticolmError) as caught:
        load(path, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.startswith("model 'm'")
    return sentence


def logits(model: TransformersModel) -> torch.Tensor:
    return model.open(1).feed([0], [[5, 6, 7, 8]], [4]).logits


def test_a_folder_with_safetensors_gives_the_networks_logits(folder: Path) -> None:
    loaded = load(folder)
    with torch.inference_mode():
        want = network("llama")(torch.tensor([[5, 6, 7, 8]])).logits[0]
    assert torch.allclose(logits(loaded), want, atol=1e-5)
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.n_tokens == len(shared_tokenizer())


def test_pickled_weights_are_refused_and_load_if_the_file_allows_them(pickled: Path) -> None:
    sentence = refused(pickled)
    assert sentence.startswith(f"model 'm': cannot load the weights from {pickled}: ")
    assert sentence.endswith(
        "Only safetensors are loaded; convert the weights, or set "
        "`allow_pickled_weights: true` if you trust their author."
    )
    loaded = load(pickled, allow_pickled_weights=True)
    want = TransformersModel("w", network("llama"), shared_tokenizer())
    assert torch.allclose(logits(loaded), logits(want), atol=1e-5)


def test_a_folder_without_weights_or_without_a_tokenizer_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    bare = copied(folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert f"cannot load the weights from {bare}" in refused(bare)
    mute = copied(folder, tmp_path / "mute")
    for file in mute.glob("tokenizer*"):
        file.unlink()
    assert f"cannot load the tokenizer from {mute}" in refused(mute)


def test_damaged_files_are_refused_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    for number, (file, content) in enumerate(
        [
            ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00not a header at all"),
            ("model.safetensors", (folder / "model.safetensors").read_bytes()[:5000]),
            ("model.safetensors", b""),
            ("tokenizer.json", b"{"),
            ("tokenizer.json", b'{"version": "1.0"}'),
            ("config.json", b"{"),
            ("config.json", b'{"model_type": "no-such-architecture"}'),
        ]
    ):
        path = copied(folder, tmp_path / f"damaged-{number}")
        (path / file).write_bytes(content)
        assert "cannot load the" in refused(path), file


def test_weights_that_are_not_in_the_file_are_never_made_up(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "holes")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert refused(path) == (
        f"model 'm': {path} lacks 1 of the weights, such as model.layers.1.mlp.up_proj.weight; "
        "are these the weights of a causal language model, and of this one?"
    )


def test_a_config_that_drops_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "shorter")
    settings = json.loads((path / "config.json").read_text())
    settings["num_hidden_layers"] = 1
    settings.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(settings))
    complaint = refused(path)
    assert f"{path} holds " in complaint
    assert "weights that the model has no place for, such as model.layers.1." in complaint
    assert "does the config fit the weights (`num_hidden_layers`" in complaint


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        (["model.layers.1.mlp.up_proj.weight", "model.extra.weight"], 2),
        (["h.0.attn.bias", "h.0.attn.masked_bias", "layers.0.rotary_emb.inv_freq"], 0),
        (["model.vision_tower.x.weight", "multi_modal_projector.linear.weight"], 0),
        (["v_head.summary.weight", "lm_head.weight", "mtp.fc.weight"], 0),
        (["model.layers.3.eh_proj.weight", "model.layers.4.eh_proj.weight"], 1),
    ],
)  # fmt: skip
def test_weights_that_are_known_to_be_harmless_are_left_out(keys: list[str], left: int) -> None:
    settings = LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True)
    settings.num_nextn_predict_layers = 1
    assert len(_without_known(keys, settings)) == left


def test_an_encoder_decoder_folder_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t5"
    save(path, t5(), shared_tokenizer())
    assert refused(path) == (
        f"model 'm' ({path}) is an encoder-decoder; multicolm serves decoder-only language models."
    )


def test_a_tokenizer_that_is_not_made_of_bytes_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "wordpiece")
    wordpiece = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    decoder_replaced(byte_level(), wordpiece).save_pretrained(path)
    with pytest.raises(VocabularyError, match=r"model 'm' has .* decoder \(WordPiece\)"):
        load(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_type_that_is_asked_for(folder: Path, dtype: str) -> None:
    loaded = load(folder, dtype=dtype)
    assert loaded.model.dtype == loaded.dtype == getattr(torch, dtype)
    assert bool(logits(loaded).isfinite().all())


def test_the_type_of_the_weights_is_kept_if_none_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "half"
    save(path, copy.deepcopy(network("llama")).to(torch.bfloat16), shared_tokenizer())
    assert load(path).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings", [{"device": "cpu"}, {"device_map": "cpu"}, {"device_map": "auto"}]
)
def test_devices_change_no_logits(folder: Path, settings: dict[str, str]) -> None:
    loaded = load(folder, **settings)
    assert torch.allclose(logits(loaded), logits(load(folder)), atol=1e-5)
    assert Ensemble([loaded]).generate("ab", max_new_tokens=2)


def test_a_device_that_is_not_there_is_refused_with_a_sentence(folder: Path) -> None:
    if not torch.cuda.is_available():
        assert "cannot load the weights" in refused(folder, device="cuda:0")
    assert "cannot load the weights" in refused(folder, device="abacus")
    assert "cannot load the weights" in refused(folder, attn_implementation="magic")


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter's folder, and the logits of the model with it."""
    path = tmp_path_factory.mktemp("adapters") / "lora"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        # peft asks transformers for a property by its older name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        with_it = peft.get_peft_model(copy.deepcopy(network("llama")), config)
    with_it.save_pretrained(path)
    with torch.inference_mode():
        return path, with_it(torch.tensor([[5, 6, 7, 8]])).logits[0]


def test_an_adapter_gives_the_adapters_logits(
    folder: Path, adapted: tuple[Path, torch.Tensor]
) -> None:
    path, want = adapted
    loaded = load(folder, adapter=str(path))
    assert torch.allclose(logits(loaded), want, atol=1e-4)
    assert not torch.allclose(logits(load(folder)), want, atol=1e-2)
    assert loaded.served_as == "rows"


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
}


@pytest.mark.parametrize(
    ("kind", "inside"), [*((kind, False) for kind in ADAPTERS), ("dora", True)]
)
def test_a_sound_adapter_of_any_kind_gives_what_peft_gives(
    folder: Path, tmp_path: Path, kind: str, inside: bool
) -> None:
    path = tmp_path / "adapter"
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of adapters that cannot be merged
        plain = type(network("llama")).from_pretrained(folder)
        with_it = peft.get_peft_model(plain, peft.LoraConfig(r=2, **ADAPTERS[kind]))
        for parameter in with_it.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        with_it.save_pretrained(path)
    with torch.inference_mode():
        want = with_it(torch.tensor([[5, 6, 7, 8]])).logits[0]
    if inside:
        for file in folder.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        loaded = load(path)
    else:
        loaded = load(folder, adapter=str(path))
    assert torch.allclose(logits(loaded), want, atol=1e-4)
    assert not torch.allclose(logits(load(folder)), want, atol=1e-2)


def test_an_adapter_with_layers_that_the_model_does_not_have_is_refused(
    folder: Path, adapted: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    longer = copied(adapted[0], tmp_path / "longer")
    tensors = load_file(longer / "adapter_model.safetensors")
    more = {
        key.replace(".layers.0.", ".layers.7."): value.clone() for key, value in tensors.items()
    }
    save_file({**tensors, **more}, longer / "adapter_model.safetensors")
    assert f"{longer} holds 4 weights that the model has no place for" in refused(
        folder, adapter=str(longer)
    )


def test_an_adapter_that_is_a_learned_prompt_is_refused_by_name(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompt"
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        peft.get_peft_model(copy.deepcopy(network("llama")), config).save_pretrained(path)
    assert "learned a prompt (PROMPT_TUNING)" in refused(folder, adapter=str(path))


def test_two_models_of_one_folder_do_not_share_an_adapter(
    folder: Path, adapted: tuple[Path, torch.Tensor]
) -> None:
    plain, with_it = load(folder), load(folder, adapter=str(adapted[0]))
    assert torch.allclose(logits(with_it), adapted[1], atol=1e-4)
    want = TransformersModel("w", network("llama"), shared_tokenizer())
    assert torch.allclose(logits(plain), logits(want), atol=1e-5)


def pickled_adapter(source: Path, target: Path) -> Path:
    path = copied(source, target)
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    return path


def test_a_pickled_adapter_is_refused_and_loads_if_the_file_allows_it(
    folder: Path, adapted: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    path = pickled_adapter(adapted[0], tmp_path / "pickled")
    assert refused(folder, adapter=str(path)) == (
        f"model 'm': adapter: {path} has no adapter_model.safetensors; save the adapter with "
        "safetensors, or set `allow_pickled_weights: true` if you trust its author."
    )
    loaded = load(folder, adapter=str(path), allow_pickled_weights=True)
    assert torch.allclose(logits(loaded), adapted[1], atol=1e-4)


def test_a_pickled_adapter_inside_the_models_folder_is_refused_too(
    folder: Path, adapted: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    path = copied(folder, tmp_path / "embedded")
    adapter = pickled_adapter(adapted[0], tmp_path / "pickled")
    for file in adapter.glob("adapter*"):
        (path / file.name).write_bytes(file.read_bytes())
    assert "has no adapter_model.safetensors" in refused(path)


def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(
    folder: Path, adapted: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    wrong = copied(adapted[0], tmp_path / "wrong")
    tensors = load_file(wrong / "adapter_model.safetensors")
    save_file({key: torch.zeros(3, 5) for key in tensors}, wrong / "adapter_model.safetensors")
    assert f"cannot load the adapter from {wrong}" in refused(folder, adapter=str(wrong))
    partial = copied(adapted[0], tmp_path / "partial")
    tensors = load_file(partial / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, partial / "adapter_model.safetensors")
    assert f"{partial} lacks 1 of the weights" in refused(folder, adapter=str(partial))
    damaged = copied(adapted[0], tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    assert f"cannot load the adapter from {damaged}" in refused(folder, adapter=str(damaged))
    foreign = copied(adapted[0], tmp_path / "foreign")
    settings = (foreign / "adapter_config.json").read_text()
    (foreign / "adapter_config.json").write_text(
        settings.replace("q_proj", "c_attn").replace("v_proj", "c_proj")
    )
    assert f"cannot load the adapter from {foreign}" in refused(folder, adapter=str(foreign))


# --- chat templates ------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}>"
CHAT = [{"role": "user", "content": "ab cd"}]


def test_a_chat_template_may_stand_in_the_file_or_in_a_jinja_file(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.warns(MulticolmWarning, match="model 'm' has no chat template, so its chats"):
        ids = load(folder).tokenizer.encode_chat(CHAT)
    assert load(folder).tokenizer.decode(ids) == b"User: ab cd\n\nAssistant:"
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    for given in (TEMPLATE, str(tmp_path / "chat.jinja")):
        tokenizer = load(folder, chat_template=given).tokenizer
        assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == b"[user] ab cd >"


def test_a_template_that_refuses_the_messages_is_quoted(folder: Path) -> None:
    refusing = "{{ raise_exception('only one system message') if messages }}"
    tokenizer = load(folder, chat_template=refusing).tokenizer
    with pytest.raises(InputError, match=r"template of model 'm' refuses .* only one system mess"):
        tokenizer.encode_chat(CHAT)


def test_an_ensemble_file_loads_its_models(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "ensemble.yaml"
    text = f"""
base_model: small
models:
  small: {{model: {folder}, dtype: float32}}
  big: {{model: {folder}, dtype: float32, device: cpu}}
policy: {{kind: confidence, params: {{threshold: 0.2}}}}
"""
    config: EnsembleConfig = parse_ensemble(text, file)
    answers = Ensemble.from_config(config).generate(PROMPTS[:2], max_new_tokens=4)
    alone = Ensemble([load(folder)]).generate(PROMPTS[:2], max_new_tokens=4)
    assert [a.text for a in answers] == [a.text for a in alone]


def test_a_table_is_read_from_yaml_and_a_wrong_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "coin.yaml"
    file.write_text('tokens: [a, .]\nends: [.]\ntable: {"": {a: 0.25, .: 0.75}}\n')
    config = ModelConfig(backend="table", model="coin")
    config._resolved = ResolvedModel(str(file), None, True, None, None)
    table = TableModel.from_config("coin", config)
    assert table.open(1).feed([0], [[0]], [1]).logits.exp()[0].tolist() == [0.25, 0.75]
    file.write_text("tokens: 3")
    with pytest.raises(ConfigError, match="is no table; its form is"):
        TableModel.from_config("coin", config)


def test_remote_code_is_not_run_unless_allowed(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "remote")
    marker = tmp_path / "was-run"
    (path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    settings = (path / "config.json").read_text().rstrip().rstrip("}")
    (path / "config.json").write_text(
        settings.replace('"model_type": "llama"', '"model_type": "own"')
        + ', "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}'
    )
    assert "trust_remote_code" in refused(path)
    assert not marker.exists()
