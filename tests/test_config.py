from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from multicolm.config import (
    EnsembleConfig,
    GenerationConfig,
    ModelConfig,
    PolicyConfig,
    check_params,
    load_ensemble,
    load_model_file,
    load_policy,
    parse_ensemble,
    policy_names,
    validate,
)
from multicolm.errors import ConfigError, InputError, UnknownNameError
from multicolm.plugins import policies

KNOWN_MODELS = "tiny-facts, tiny-facts-own, tiny-generalist, tiny-math, tiny-math-own"
MODEL_KEYS = (
    "adapter, allow_pickled_weights, api_key_env, attn_implementation, backend, cache_type, "
    "chat_template, chat_template_args, connect_timeout, context_length, cost, device, device_map, "
    "dtype, engine_options, gpu_layers, logprobs, look_ahead, model, retries, revision, "
    "served_model, timeout, tokenizer, trust_remote_code, url"
)
DUO = """\
base_model: small
models:
  expert: {model: tiny-facts}
  small: {model: tiny-generalist}
"""


def complaint(text: str, origin: str | Path = "duo.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        parse_ensemble(text, origin)
    return str(caught.value)


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


# What a right file says


def test_the_base_model_comes_first_and_the_assistants_in_the_order_of_the_file() -> None:
    config = parse_ensemble(DUO + "  last: {model: tiny-math}\n", "duo.yaml")
    assert config.names == ("small", "expert", "last")


def test_what_a_file_does_not_say_has_a_default() -> None:
    config = parse_ensemble(DUO, "duo.yaml")
    assert config.policy == PolicyConfig(kind="single")
    assert config.generation == GenerationConfig()
    assert config.generation.max_new_tokens == 64
    assert config.generation.temperature == 0.0
    assert config.generation.schedule is None
    model = config.models["expert"]
    assert (model.backend, model.dtype, model.cost) == ("transformers", "auto", 1.0)
    assert not model.trust_remote_code and not model.allow_pickled_weights


def test_settings_are_frozen() -> None:
    config = parse_ensemble(DUO, "duo.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.base_model = "expert"  # type: ignore[misc]


def test_a_single_stop_string_may_stand_alone() -> None:
    config = parse_ensemble(DUO + 'generation: {stop: "\\n"}\n', "duo.yaml")
    assert config.generation.stop == ("\n",)


def test_a_number_in_scientific_notation_needs_no_point() -> None:
    config = parse_ensemble(DUO + "generation: {temperature: 1e-3}\n", "duo.yaml")
    assert config.generation.temperature == 1e-3


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "duo.yaml").write_bytes(b"\xef\xbb\xbf" + DUO.encode())
    assert load_ensemble(tmp_path / "duo.yaml").base_model == "small"


def test_an_ensemble_is_found_by_name_by_file_and_by_folder(tmp_path: Path) -> None:
    (tmp_path / "ensemble.yaml").write_text(DUO)
    assert load_ensemble("tiny").names == ("generalist", "facts", "math")
    assert load_ensemble(str(tmp_path)) == load_ensemble(tmp_path / "ensemble.yaml")


def test_a_name_of_the_catalogue_goes_before_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "ensemble.yaml").write_text(DUO)
    assert load_ensemble("tiny").base_model == "generalist"
    assert load_ensemble("./tiny").base_model == "small"


# What a wrong file is told


def test_a_misspelt_key_is_shown_with_its_place_and_the_nearest_one() -> None:
    text = DUO + "  facts:\n    model: tiny-facts\n    dtyp: float32\n"
    assert complaint(text) == (
        "duo.yaml:7:5: models.facts.dtyp: unknown key 'dtyp'. Did you mean 'dtype'? "
        f"Allowed: {MODEL_KEYS}."
    )


def test_everything_that_is_wrong_is_listed_in_the_order_of_the_file() -> None:
    text = """\
base_model: smal
modells: 3
models:
  small: {model: tiny-generalist, dtype: float31, cost: -1}
  ex/pert: {}
  expert: {model: tiny-fact, revision: 123456}
policy: {kind: cosd-rul, params: {alpha: 0.4}}
generation: {max_new_tokens: true, stop: [3, ""], top_p: 2, schedule: blok, temperature: .nan}
"""
    lines = complaint(text).splitlines()
    assert lines == [
        "duo.yaml:1:13: base_model: unknown model 'smal'. Did you mean 'small'? "
        "Known: ex/pert, expert, small.",
        "duo.yaml:2:1: modells: unknown key 'modells'. Did you mean 'models'? "
        "Allowed: base_model, bridge, generation, models, policy, summary.",
        "duo.yaml:4:42: models.small.dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', "
        "got 'float31'. Did you mean 'float32'?",
        "duo.yaml:4:57: models.small.cost: must be 0 or more, got -1.",
        "duo.yaml:5:3: models.ex/pert: a model's name is letters, digits, '.', '_' and '-', "
        "got 'ex/pert'.",
        "duo.yaml:5:12: models.ex/pert.model: required, but missing: "
        "a registry name, a folder, or a Hub id.",
        "duo.yaml:6:40: models.expert.revision: must be text, got 123456; put it in quotes.",
        "duo.yaml:7:16: policy.kind: unknown policy 'cosd-rul'. Did you mean 'cosd-rule'? "
        f"Known: {', '.join(policies.names())}.",
        "duo.yaml:8:30: generation.max_new_tokens: must be a whole number, got true.",
        "duo.yaml:8:43: generation.stop.0: must be text, got 3; put it in quotes.",
        "duo.yaml:8:46: generation.stop.1: must not be empty.",
        "duo.yaml:8:58: generation.top_p: must be at most 1, got 2.",
        "duo.yaml:8:71: generation.schedule: must be 'stepwise' or 'block', got 'blok'. "
        "Did you mean 'block'?",
        "duo.yaml:8:90: generation.temperature: must be a finite number, got nan.",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "duo.yaml: the file is empty."),
        ("# nothing\n", "duo.yaml: the file is empty."),
        ("- a\n- b\n", "duo.yaml:1:1: must be a mapping (`key: value`), got a list."),
        ("duo", "duo.yaml:1:1: must be a mapping (`key: value`), got 'duo'."),
        ("null", "duo.yaml:1:1: must be a mapping (`key: value`), got nothing."),
        (
            "models: {}\nbase_model: a\n",
            "duo.yaml:1:9: models: must hold 1 or more, got 0.",
        ),
        (
            "models: 3\nbase_model: a\n",
            "duo.yaml:1:9: models: must be a mapping, got 3.",
        ),
        (
            "base_model: a\n",
            "duo.yaml:1:1: models: required, but missing: a mapping from a name to a model's "
            "settings.",
        ),
        (
            "models: {small: {model: tiny-math}}\n",
            "duo.yaml:1:1: base_model: required, but missing: the name of one of `models`.",
        ),
        (
            "models: {small: tiny-math}\nbase_model: small\n",
            "duo.yaml:1:17: models.small: must be a mapping, got 'tiny-math'.",
        ),
        (
            "models: {base: {model: tiny-math}}\nbase_model: base\n",
            "duo.yaml:1:10: models.base: 'base' cannot be a model's name: it is reserved.",
        ),
        (
            "models: {mixture: {model: tiny-math}}\nbase_model: mixture\n",
            "duo.yaml:1:10: models.mixture: 'mixture' cannot be a model's name: it is reserved.",
        ),
        (DUO + "policy: 3\n", "duo.yaml:5:9: policy: must be a policy's name, a path, or `kind` "
            "and `params`, got 3."),
        (DUO + "policy: {params: {}}\n",
            "duo.yaml:5:9: policy.kind: required, but missing: the name of a policy."),
        (
            DUO + "generation: {seed: 1.5}\n",
            "duo.yaml:5:20: generation.seed: must be a whole number, got 1.5.",
        ),
        (
            DUO + "base_model: expert\n",
            "duo.yaml:5:1: base_model: this key is in line 1 already.",
        ),
        (
            "models:\n  a: {model: tiny-math}\n  a: {model: tiny-facts}\n",
            "duo.yaml:3:3: models.a: this key is in line 2 already.",
        ),
        (
            "models: {1: {model: tiny-math}}\n",
            "duo.yaml:1:10: models: a key must be text, got 1; put it in quotes.",
        ),
        (
            "on: 1\n",
            "duo.yaml:1:1: a key must be text, got true; put it in quotes.",
        ),
        (
            "models: !!python/object/apply:os.system [ls]\n",
            "duo.yaml:1:9: models: the tag tag:yaml.org,2002:python/object/apply:os.system is not "
            "allowed; write plain values.",
        ),
        (
            "models: !mine 3\n",
            "duo.yaml:1:9: models: the tag !mine is not allowed; write plain values.",
        ),
        (
            "models: &m {a: {model: x}}\nother: *m\n",
            "duo.yaml:2:8: not readable as YAML: aliases (`*name`) are not allowed; write the "
            "value out.",
        ),
        (
            "models:\n  <<: {}\n",
            "duo.yaml:2:3: models: merge keys (`<<`) are not allowed; write them out.",
        ),
        (
            "models: [1, 2\n",
            "duo.yaml:1:9: not readable as YAML: what begins here does not end: expected ',' or "
            "']', but got '<stream end>'.",
        ),
        (
            "models: {a: 1\npolicy: single\n",
            "duo.yaml:1:9: not readable as YAML: what begins here does not end: expected ',' or "
            "'}', but got ':'.",
        ),
        (
            'summary: "x\npolicy: single\n',
            "duo.yaml:1:10: not readable as YAML: what begins here does not end: found unexpected "
            "end of stream.",
        ),
        (
            "models:\n  a\n    model: tiny-facts\n",
            "duo.yaml:2:3: not readable as YAML: 'a' lacks a colon.",
        ),
        (
            "models: {a: 1 b: 2}\n",
            "duo.yaml:1:16: not readable as YAML: expected ',' or '}', but got ':'.",
        ),
        (
            "a: b: c\n",
            "duo.yaml:1:5: not readable as YAML: mapping values are not allowed here.",
        ),
        (
            "summary: 2024-99-99\n",
            "duo.yaml:1:10: summary: '2024-99-99' cannot be read: month must be in 1..12.",
        ),
        (DUO + "summary: 2024-01-01\n",
            "duo.yaml:5:10: summary: must be text, got 2024-01-01; put it in quotes."),
    ],
)  # fmt: skip
def test_a_wrong_file_gets_one_sentence(text: str, said: str) -> None:
    assert complaint(text) == said


def test_a_control_character_is_refused_in_one_line() -> None:
    said = complaint("summary: a\x00b\n")
    assert said.startswith("duo.yaml: not readable as YAML: ")
    assert "\n" not in said


def test_a_file_that_is_nested_without_end_is_refused() -> None:
    assert complaint("a: " + "[" * 20_000) == "duo.yaml: nested too deeply."


def test_a_device_and_a_device_map_exclude_each_other() -> None:
    text = "base_model: a\nmodels:\n  a: {model: tiny-math, device: cpu, device_map: auto}\n"
    assert complaint(text) == ("duo.yaml:3:6: models.a: give `device` or `device_map`, not both.")


def served(settings: str) -> str:
    return complaint(f"base_model: a\nmodels:\n  a: {{model: tiny-math, {settings}}}\n")


@pytest.mark.parametrize("backend", ["vllm", "sglang", "llama-cpp-server", "openai"])
def test_a_model_in_a_server_needs_the_servers_address(backend: str) -> None:
    assert served(f"backend: {backend}") == (
        f"duo.yaml:3:6: models.a: backend '{backend}' needs a `url`: that of the server, such as "
        "http://127.0.0.1:8000/v1."
    )
    text = f"base_model: a\nmodels:\n  a: {{model: tiny-math, backend: {backend}, url: 'http://h'}}"
    assert parse_ensemble(text, "duo.yaml").models["a"].url == "http://h"


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000", "ftp://host", "http://", "http://a b/"),
        *("http://host:80a", "http://host:99999", "http://[::1"),
    ],
)
def test_an_address_is_one_of_http(url: str) -> None:
    assert served(f"backend: vllm, url: '{url}'") == (
        f"duo.yaml:3:6: models.a: `url` must be http://host:port or https://..., got '{url}'."
    )


def test_an_address_with_a_name_and_password_is_refused_without_showing_them() -> None:
    assert served("backend: vllm, url: 'http://me:hush@host'") == (
        "duo.yaml:3:6: models.a: `url` must be http://host:port or https://..., got one with '@' "
        "in it."
    )


@pytest.mark.parametrize(
    "setting",
    [
        "url: 'http://127.0.0.1:1'",
        "served_model: a",
        "api_key_env: KEY",
        "timeout: 3",
        "connect_timeout: 3",
        "retries: 0",
        "look_ahead: 2",
        "logprobs: all",
    ],
)
def test_what_belongs_to_servers_is_refused_for_models_in_this_process(setting: str) -> None:
    key = setting.split(":")[0]
    said = served(setting)
    assert said.startswith(f"duo.yaml:3:6: models.a: `{key}` belongs to backends ")
    assert "llama-cpp-server, openai, sglang, vllm" in said
    assert said.endswith("and this model has backend 'transformers'; leave it out.")


@pytest.mark.parametrize(
    "setting",
    [
        "dtype: float32",
        "device: cpu",
        "device_map: auto",
        "attn_implementation: eager",
        "adapter: ./a",
        "allow_pickled_weights: true",
    ],
)
def test_what_belongs_to_models_in_this_process_is_refused_for_servers(setting: str) -> None:
    key = setting.split(":")[0]
    said = served(f"backend: vllm, url: 'http://h', {setting}")
    assert f"models.a: `{key}` belongs to backend" in said
    assert (
        " transformers" in said.partition(", and this model has backend 'vllm'; leave it out.")[0]
    )


def test_log_probabilities_are_a_number_or_all() -> None:
    assert served("backend: vllm, url: 'http://h', logprobs: 0").endswith(
        "models.a.logprobs: must be 1 or more or 'all', got 0."
    )
    assert "logprobs: must be" in served("backend: vllm, url: 'http://h', logprobs: most")


def test_a_setting_of_several_types_names_them_all() -> None:
    text = "base_model: a\nmodels:\n  a: {model: tiny-math, device_map: 3}\n"
    assert complaint(text) == (
        "duo.yaml:3:37: models.a.device_map: must be text or a mapping, got 3."
    )


def test_an_unknown_backend_is_refused() -> None:
    text = "base_model: a\nmodels:\n  a: {model: tiny-math, backend: transformer}\n"
    assert complaint(text).startswith(
        "duo.yaml:3:34: models.a.backend: unknown backend 'transformer'. "
        "Did you mean 'transformers'? Known: "
    )


def test_a_file_that_cannot_be_opened_gets_one_sentence(tmp_path: Path) -> None:
    def said(source: str | Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_ensemble(source)
        return str(caught.value)

    missing, folder = tmp_path / "duo.yaml", tmp_path / "folder.yaml"
    assert said(missing) == f"{missing}: no such file; expected an ensemble file."
    folder.mkdir()
    assert said(folder) == f"{folder}/ensemble.yaml: no such file; expected an ensemble file."
    (folder / "ensemble.yaml").mkdir()
    assert said(folder) == f"{folder}/ensemble.yaml: is a folder; expected an ensemble file."
    missing.write_bytes(b"base_model: caf\xe9\n")
    assert said(missing) == f"{missing}: not UTF-8 text: byte 15 cannot be read."


def test_an_unknown_ensemble_is_told_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_ensemble("tny")
    assert str(caught.value) == (
        "unknown ensemble 'tny'. Did you mean 'tiny'? Known: tiny, tiny-mixed, tiny-mixed-exact. "
        "A file's name ends in .yaml; a folder needs an ensemble.yaml."
    )


# Where models are


def test_a_model_of_the_registry_stands_for_its_folder() -> None:
    model = parse_ensemble(DUO, "duo.yaml").models["expert"]
    assert Path(model.location).parts[-3:] == ("registry", "tiny", "facts")
    assert model.resolved.is_local and model.resolved_revision is None


def test_a_folder_starts_from_the_folder_of_the_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "weights" / "mine")
    text = "base_model: a\nmodels:\n  a: {model: weights/mine}\n  b: {model: ./weights/mine}\n"
    config = parse_ensemble(text, tmp_path / "duo.yaml")
    assert config.models["a"].location == config.models["b"].location == str(folder)


def test_a_hub_id_is_taken_as_it_is(tmp_path: Path) -> None:
    text = (
        "base_model: a\nmodels:\n  a: {model: org/name, revision: abc}\n  b: {model: org/other}\n"
    )
    config = parse_ensemble(text, tmp_path / "duo.yaml")
    assert config.models["a"].location == "org/name"
    assert config.models["a"].resolved_revision == "abc"
    assert config.warnings == [
        "models.b: the Hub id 'org/other' has no `revision`, so its weights may change under you; "
        "pin the commit."
    ]


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path / "weights" / "facts")
    (tmp_path / "empty").mkdir()
    text = """\
base_model: a
models:
  a: {model: tiny-fact}
  b: {model: ./none}
  c: {model: weights/fatcs}
  d: {model: empty}
  e: {model: tiny-math, revision: abc}
  f: {model: tiny-math, adapter: none}
  g: {model: tiny-math, chat_template: none.jinja}
"""
    assert complaint(text, tmp_path / "duo.yaml").splitlines() == [
        f"{tmp_path}/duo.yaml:3:14: models.a.model: unknown model 'tiny-fact'. Did you mean "
        f"'tiny-facts'? Known: {KNOWN_MODELS}. A folder is written './tiny-fact', a model of the "
        "Hub 'organisation/name'.",
        f"{tmp_path}/duo.yaml:4:14: models.b.model: there is no folder {tmp_path}/none.",
        f"{tmp_path}/duo.yaml:5:14: models.c.model: unknown folder 'weights/fatcs'. Did you mean "
        "'weights/facts'? Known: weights/facts.",
        f"{tmp_path}/duo.yaml:6:14: models.d.model: {tmp_path}/empty holds no config.json, so no "
        "model can be loaded from it.",
        f"{tmp_path}/duo.yaml:7:35: models.e.revision: only a Hub id has revisions, and "
        "`model` is a folder.",
        f"{tmp_path}/duo.yaml:8:34: models.f.adapter: there is no folder {tmp_path}/none.",
        f"{tmp_path}/duo.yaml:9:40: models.g.chat_template: {tmp_path}/none.jinja: no such file; "
        "expected a chat template.",
    ]


def test_a_chat_template_is_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    text = """\
base_model: a
models:
  a: {model: tiny-math, chat_template: "{{ messages[0] }}"}
  b: {model: tiny-math, chat_template: chat.jinja}
"""
    config = parse_ensemble(text, tmp_path / "duo.yaml")
    assert config.models["a"].chat_template_text == "{{ messages[0] }}"
    assert config.models["b"].chat_template_text == "{{ messages }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "chatmll",
            "unknown chat template 'chatmll'. Did you mean 'chatml'? Known: chatml, plain. Allowed "
            "are `chatml` and `plain`, a .jinja file, or jinja text that uses `messages`.",
        ),
        (
            "{{ message }}",
            "the template does not use `messages`, so what is asked would be lost; allowed are "
            "`chatml` and `plain`, a .jinja file, or jinja text that uses `messages`.",
        ),
        (
            "{% for m in messages %}{{ m }}",
            "is not jinja in line 1 of the template: Unexpected end of template. Jinja was looking "
            "for the following tags: 'endfor' or 'else'. The innermost block that needs to be "
            "closed is 'for'.",
        ),
    ],
)
def test_a_chat_template_that_would_lose_the_question_is_refused_before_anything_is_loaded(
    template: str, said: str, tmp_path: Path
) -> None:
    text = f'base_model: a\nmodels:\n  a: {{model: tiny-math, chat_template: "{template}"}}\n'
    where = f"{tmp_path}/duo.yaml:3:40: models.a.chat_template: "
    assert complaint(text, tmp_path / "duo.yaml") == where + said
    (tmp_path / "t.jinja").write_text(template)
    if "{" in template:
        complained = complaint(text.replace(template, "t.jinja"), tmp_path / "duo.yaml")
        assert complained == f"{where}{tmp_path}/t.jinja: {said}"


def test_a_chat_template_may_be_a_shipped_one_by_name_or_use_tags_of_transformers(
    tmp_path: Path,
) -> None:
    (tmp_path / "t.jinja").write_text("{% generation %}{{ messages }}{% endgeneration %}")
    text = """\
base_model: a
models:
  a: {model: tiny-math, chat_template: chatml}
  b: {model: tiny-math, chat_template: plain}
  c: {model: tiny-math, chat_template: t.jinja}
"""
    config = parse_ensemble(text, tmp_path / "duo.yaml")
    assert "<|im_start|>assistant" in str(config.models["a"].chat_template_text)
    assert "Assistant:" in str(config.models["b"].chat_template_text)
    assert "generation" in str(config.models["c"].chat_template_text)


def test_a_gguf_file_is_told_its_backend(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    text = "base_model: a\nmodels:\n  a: {model: ./m.gguf}\n"
    assert complaint(text, tmp_path / "duo.yaml") == (
        f"{tmp_path}/duo.yaml:3:14: models.a.model: './m.gguf' is a GGUF file; add `backend: "
        "llama-cpp`, which loads these."
    )


def test_an_adapter_starts_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    text = "base_model: a\nmodels:\n  a: {model: tiny-math, adapter: lora}\n"
    config = parse_ensemble(text, tmp_path / "duo.yaml")
    assert config.models["a"].adapter_location == str(tmp_path / "lora")


def test_settings_that_are_made_in_python_find_their_model_too() -> None:
    assert ModelConfig(model="tiny-math").resolved.is_local
    with pytest.raises(ConfigError, match=r"^model: there is no folder /nowhere\.$"):
        _ = ModelConfig(model="/nowhere").location
    models = {"a": ModelConfig(model="tiny-math")}
    assert EnsembleConfig(base_model="a", models=models).names == ("a",)
    with pytest.raises(ValueError, match="unknown model 'b'"):
        EnsembleConfig(base_model="b", models=models)


def test_a_backend_that_is_no_library_names_its_models_as_it_likes(tmp_path: Path) -> None:
    text = "base_model: a\nmodels:\n  a: {model: 'served name', backend: table}\n"
    config = parse_ensemble(text, tmp_path / "duo.yaml")
    assert config.models["a"].location == "served name"
    assert config.warnings == []


# Policies


def test_a_policy_is_a_name_a_file_a_folder_or_stands_inline(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("kind: confidence\nparams: {threshold: 0.6}\n")
    for written in (
        "policy: ./policy.yaml",
        f"policy: {tmp_path}",
        "policy: ./",
        "policy: policy.yaml",
        "policy: {kind: confidence, params: {threshold: 0.6}}",
    ):
        config = parse_ensemble(DUO + written, tmp_path / "duo.yaml")
        assert config.policy == PolicyConfig(kind="confidence", params={"threshold": 0.6})
    named = parse_ensemble(DUO + "policy: nudging", tmp_path / "duo.yaml").policy
    assert named.params["threshold"] == 0.4 and named.params["nudger"] == "assistant"


def test_a_misspelt_param_is_shown_with_its_place_and_the_nearest_one(tmp_path: Path) -> None:
    inline = DUO + "policy: {kind: cosd-rule, params: {alpa: 0.4, alpha: true, beta: hm}}\n"
    assert complaint(inline).splitlines() == [
        "duo.yaml:5:36: policy.params.alpa: unknown key 'alpa'. Did you mean 'alpha'? "
        "Allowed: alpha, beta.",
        "duo.yaml:5:54: policy.params.alpha: must be a number, got true.",
        "duo.yaml:5:66: policy.params.beta: must be a number, got 'hm'.",
    ]
    file = tmp_path / "mine.yaml"
    file.write_text("kind: cosd-rule\nparams:\n  alpa: 0.4\n")
    with pytest.raises(ConfigError) as caught:
        load_policy(file, tmp_path)
    assert str(caught.value) == (
        f"{file}:3:3: params.alpa: unknown key 'alpa'. Did you mean 'alpha'? Allowed: alpha, beta."
    )


def test_params_that_come_from_elsewhere_are_checked_too() -> None:
    check_params("cosd-rule", {"alpha": 0.4}, "--set")
    with pytest.raises(ConfigError) as caught:
        check_params("cosd-rule", {"alpa": 0.4}, "--set")
    assert str(caught.value) == (
        "--set: alpa: unknown key 'alpa'. Did you mean 'alpha'? Allowed: alpha, beta."
    )
    with pytest.raises(UnknownNameError, match="Did you mean 'cosd-rule'"):
        check_params("cosd-rul", {}, "--set")


def test_a_policy_without_params_says_so() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'alpha'\. Allowed: none\."):
        check_params("max-confidence", {"alpha": 1}, "x")


def test_a_role_may_be_an_index_or_a_name() -> None:
    check_params("single", {"model": 1}, "x")
    check_params("single", {"model": "facts"}, "x")
    with pytest.raises(ConfigError) as caught:
        check_params("single", {"model": [1]}, "x")
    assert str(caught.value) == "x: model: must be a whole number or text, got a list."


def test_an_unknown_policy_is_told_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_policy("entrpy", tmp_path)
    assert str(caught.value) == (
        f"unknown policy 'entrpy'. Did you mean 'entropy'? Known: {', '.join(policy_names())}."
    )
    assert complaint(DUO + "policy: entrpy\n") == f"duo.yaml:5:9: policy: {caught.value}"


def test_a_param_that_is_a_path_starts_from_the_folder_of_the_file(tmp_path: Path) -> None:
    from multicolm.policy import SelectPolicy, register_policy

    @register_policy("test-with-a-file")
    class WithAFile(SelectPolicy):
        head: Path
        label: str = ""

    try:
        file = tmp_path / "policy.yaml"
        file.write_text("kind: test-with-a-file\nparams: {head: head.safetensors, label: a/b}\n")
        assert load_policy(tmp_path, Path("/")).params == {
            "head": str(tmp_path / "head.safetensors"),
            "label": "a/b",
        }
        file.write_text("kind: test-with-a-file\n")
        with pytest.raises(ConfigError) as caught:
            load_policy(tmp_path, Path("/"))
        assert str(caught.value) == f"{file}:1:1: params.head: required, but missing."
    finally:
        policies._classes.pop("test-with-a-file")


# Settings of one call


def test_settings_of_one_call_replace_those_of_the_file() -> None:
    settings = GenerationConfig(top_k=5).updated({"temperature": 0.5, "top_k": None, "stop": "x"})
    assert settings == GenerationConfig(top_k=5, temperature=0.5, stop=("x",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be 1 or more, got 0."),
        ({"temperature": -1.0}, "temperature: must be 0 or more, got -1.0."),
        ({"top_p": 0.0}, "top_p: must be more than 0, got 0.0."),
        ({"top_k": 0}, "top_k: must be 1 or more, got 0."),
        ({"stop": ("",)}, "stop.0: must not be empty."),
        ({"schedule": "blok"}, "schedule: must be 'stepwise' or 'block', got 'blok'. "
            "Did you mean 'block'?"),
        ({"temprature": 1.0}, "unknown setting 'temprature'. Did you mean 'temperature'? Allowed: "
            "block_size, max_new_tokens, schedule, seed, stop, temperature, "
            "think_end_token, think_start_token, thinking_token_budget, threads, top_k, "
            "top_logprobs, top_p."),
    ],
)  # fmt: skip
def test_a_setting_that_is_out_of_range_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        GenerationConfig().updated(settings)
    assert str(caught.value) == said


# Validation


def test_an_ensemble_that_is_right_is_told_what_was_checked() -> None:
    report = validate("tiny")
    assert report.kind == "ensemble" and not report.errors and not report.warnings
    assert report.checked[:2] == [
        "settings: base model generalist, assistants facts, math",
        "policy co-llm: kind, params, the models it speaks of",
    ]
    assert [line.split(":")[0] for line in report.checked[2:]] == [
        "model generalist",
        "model facts",
        "model math",
    ]
    assert report.as_json()["ok"] is True


def test_a_policy_that_speaks_of_a_model_too_many_is_not_right(tmp_path: Path) -> None:
    file = tmp_path / "duo.yaml"
    file.write_text(DUO + "policy: proxy-tuning\n")
    [error] = validate(str(file)).errors
    assert error.startswith("policy: there is no model 2: this ensemble has 2")


def test_weights_that_are_missing_or_pickled_are_found(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine")
    file = tmp_path / "duo.yaml"
    file.write_text("base_model: a\nmodels: {a: {model: ./mine}}\n")
    assert validate(str(file)).errors == [
        f"models.a: {folder} holds no safetensors; convert the weights, or set "
        "`allow_pickled_weights: true` if you trust their author."
    ]
    (folder / "pytorch_model.bin").touch()
    assert len(validate(str(file)).errors) == 1
    file.write_text("base_model: a\nmodels: {a: {model: ./mine, allow_pickled_weights: true}}\n")
    report = validate(str(file))
    assert report.errors == [f"models.a: {folder} holds no tokenizer; save it beside the weights."]
    assert report.warnings == [
        "models.a: `allow_pickled_weights` lets the model's author run code."
    ]
    (folder / "config.json").write_text("{")
    assert "is not readable as JSON" in validate(str(file)).errors[0]


def test_a_policy_is_validated_too(tmp_path: Path) -> None:
    assert validate("entropy").kind == "policy"
    (tmp_path / "policy.yaml").write_text("kind: entropy\nparams: {treshold: 1}\n")
    report = validate(str(tmp_path))
    assert report.kind == "policy"
    assert report.errors == [
        f"{tmp_path}/policy.yaml:2:10: params.treshold: unknown key 'treshold'. "
        "Did you mean 'threshold'? Allowed: threshold."
    ]
    [error] = validate("entrpy").errors
    assert error.startswith("unknown ensemble, policy or task 'entrpy'. Did you mean 'entropy'?")


def test_a_model_of_the_registry_needs_one_place() -> None:
    from multicolm.config import ModelFile

    facts = load_model_file("tiny-math").model_dump()
    with pytest.raises(ValueError, match="give `repository` or `path`, one of the two"):
        ModelFile(**{**facts, "repository": "org/name", "revision": "abc"})
    with pytest.raises(ValueError, match="`repository` needs a `revision`"):
        ModelFile(**{**facts, "path": None, "repository": "org/name"})


def test_reading_configuration_loads_no_torch_if_nothing_was_learned() -> None:
    code = (
        "import sys; from multicolm.config import validate; r = validate('tiny-mixed');"
        "assert not r.errors, r; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_table_in_a_file_validates_and_writes(tmp_path: Path) -> None:
    import multicolm
    from multicolm.config.validation import validate

    (tmp_path / "coin.yaml").write_text(
        'tokens: [a, b, "."]\nends: ["."]\ntable: {"": {a: 1.0}, "a a": {".": 1.0}}\n'
    )
    file = tmp_path / "ensemble.yaml"
    file.write_text("base_model: coin\nmodels:\n  coin: {backend: table, model: ./coin.yaml}\n")
    assert not validate(str(file)).errors
    [answer] = multicolm.load(tmp_path).generate(["b"])
    assert (answer.text, answer.finish_reason) == ("aa", "eos")
