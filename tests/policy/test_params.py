"""What may be written for a policy and its params, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tables import READY, random_table

from multicolm import Ensemble, ModelNames, Policy
from multicolm.config import policy_names
from multicolm.errors import CapabilityError, ConfigError, MulticolmError, UnknownNameError
from multicolm.plugins import policies
from multicolm.policy.fixed import SinglePolicy
from multicolm.policy.logit_arithmetic import ProxyTuningPolicy

BASE, LEFT, RIGHT = (random_table(name, seed) for seed, name in enumerate(("base", "left", "sage")))
TRIO = Ensemble([BASE, LEFT, RIGHT])
INF = float("inf")
NAN = float("nan")


def writers(ensemble: Ensemble, policy: Any, **params: Any) -> set[str]:
    [answer] = ensemble.generate(["a"], policy, params=params, max_new_tokens=8, seed=1)
    return {token.model for token in answer.trace}


def refusal(kind: Any, **params: Any) -> str:
    with pytest.raises(MulticolmError) as caught:
        TRIO.generate(["a"], kind, params=params, max_new_tokens=1)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    "kind", ["co-llm", "cosd-tree", "cpr", "fusion-route", "mlp-router", "query-router"]
)
def test_a_price_on_cost_is_a_finite_number(kind: str) -> None:
    for wrong in (INF, NAN, -1.0):
        assert f"ConfigError: {kind}: cost_weight: must be" in refusal(kind, cost_weight=wrong)


@pytest.mark.parametrize(
    ("kind", "params", "said"),
    [
        ("speculative-cascade", {"rule": "chow", "alpha": -0.5}, "alpha: must be from 0 to 1"),
        ("cpr", {"low": 0.9, "high": 0.1}, "low: must be at most high (0.1), got 0.9."),
        ("co-llm", {"decode": "sample", "cost_weight": 1.0}, "cost_weight: it counts where"),
    ],
)
def test_params_that_do_not_go_together_are_refused_and_the_policy_is_named_once(
    kind: str, params: dict[str, Any], said: str
) -> None:
    assert refusal(kind, **params).startswith(f"ConfigError: {kind}: {said}")


@pytest.mark.parametrize("kind", list(policies))
def test_every_policy_refuses_a_param_that_it_does_not_have(kind: str) -> None:
    assert refusal(kind, tempo=1).startswith(
        f"ConfigError: {kind}: tempo: unknown key 'tempo'. Allowed: "
    )


def test_a_misspelt_param_is_told_the_nearest_one() -> None:
    assert refusal("confidence", treshold=0.4) == (
        "ConfigError: confidence: treshold: unknown key 'treshold'. Did you mean 'threshold'? "
        "Allowed: threshold."
    )


LEARNED = ("head", "network", "router", "tree", "made_for")
"""Filled by training; a text is the path of a file there."""
ROLES = ("model", "large", "nudger", "target", "expert", "antiexpert", "amateur")
ROLES += ("attribute", "opposite")


@pytest.mark.parametrize(
    ("kind", "param"),
    [
        (kind, field)
        for kind in policies
        for field in policies.get(kind)().as_config()["params"]
        if field not in LEARNED
    ],
)
def test_every_param_refuses_a_value_of_another_type(kind: str, param: str) -> None:
    for wrong in (object(), "hm", [[]], {"base": "hm"}):
        if param in ROLES and wrong == "hm":
            assert refusal(kind, **{param: wrong}).startswith(
                "UnknownNameError: unknown model 'hm'. Known: "
            )
        else:
            assert refusal(kind, **{param: wrong}).startswith(f"ConfigError: {kind}: {param}")


@pytest.mark.parametrize(
    ("kind", "param", "value", "sentence"),
    [
        ("confidence", "threshold", NAN, "must be a finite number, got nan."),
        ("confidence", "threshold", 7, "must be at most 2, got 7."),
        ("confidence", "threshold", -0.1, "must be 0 or more, got -0.1."),
        ("confidence", "threshold", "0.5", "must be a number, got '0.5'."),
        ("confidence", "threshold", True, "must be a number, got true."),
        ("entropy", "threshold", NAN, "must be a number, got nan."),
        ("single", "model", True, "must be a whole number or text, got true."),
        ("bild", "num_small_iters", "3", "must be a whole number, got '3'."),
        ("margin", "threshold", NAN, "must be a finite number, got nan."),
        ("margin", "threshold", 7, "must be at most 2, got 7."),
        ("nudging", "threshold", NAN, "must be a finite number, got nan."),
        ("nudging", "threshold", INF, "must be a finite number, got inf."),
        ("cosd-rule", "alpha", NAN, "must be a finite number, got nan."),
        ("cosd-rule", "alpha", 7, "must be at most 2, got 7."),
        ("cosd-rule", "beta", -1, "must be 0 or more, got -1."),
        ("bild", "fallback", NAN, "must be a finite number, got nan."),
        ("bild", "fallback", 7, "must be at most 2, got 7."),
        ("gac", "threshold", 7, "must be at most 2, got 7."),
        ("safe", "threshold", 7, "must be at most 1, got 7."),
        ("co-llm", "threshold", 7, "must be at most 1, got 7."),
        ("co-llm", "threshold", -7, "must be -1 or more, got -7."),
        ("mlp-router", "threshold", -7, "must be -1 or more, got -7."),
        ("bild", "rollback", -1.0, "must be 0 or more, got -1.0."),
        ("bild", "num_small_iters", -1, "must be 0 or more, got -1."),
        ("bild", "num_small_iters", 1.5, "must be a whole number, got 1.5."),
        ("contrastive", "alpha", 1.5, "must be at most 1, got 1.5."),
        ("contrastive", "alpha", -0.5, "must be 0 or more, got -0.5."),
        ("contrastive", "beta", -1.0, "must be 0 or more, got -1.0."),
        ("contrastive", "beta", INF, "must be a finite number, got inf."),
        ("proxy-tuning", "alpha", INF, "must be a finite number, got inf."),
        ("proxy-tuning", "alpha", NAN, "must be a finite number, got nan."),
        ("speculative", "lenience", -0.5, "must be 0 or more, got -0.5."),
        ("speculative", "lenience", 2.0, "must be at most 1, got 2.0."),
        ("average", "mean", "aritmetic", "must be 'arithmetic', 'geometric' or 'median', got "
            "'aritmetic'. Did you mean 'arithmetic'?"),
    ],
)  # fmt: skip
def test_a_number_without_a_meaning_is_refused(
    kind: str, param: str, value: Any, sentence: str
) -> None:
    assert refusal(kind, **{param: value}) == f"ConfigError: {kind}: {param}: {sentence}"


@pytest.mark.parametrize(
    ("role", "name"),
    [("base", "base"), (0, "base"), ("assistant", "left"), (1, "left"), (2, "sage"),
        ("sage", "sage")],
)  # fmt: skip
def test_a_role_is_a_word_an_index_or_a_name(role: int | str, name: str) -> None:
    assert writers(TRIO, "single", model=role) == {name}


def test_a_name_goes_before_the_words_base_and_assistant() -> None:
    turned = ModelNames(["assistant", "base", "left"])
    assert [turned.role(role) for role in ("assistant", "base", 0, 1)] == [0, 1, 0, 1]
    # What the large model of proxy tuning is hangs on its place, not on a name.
    proxies = ProxyTuningPolicy(expert="base", antiexpert="left")
    assert sorted(proxies.needs(turned).always) == [0, 1, 2]


def test_an_index_in_quotes_is_a_name() -> None:
    assert refusal("single", model="1") == (
        "UnknownNameError: unknown model '1'. Known: assistant, base, left, sage."
    )
    numbered = Ensemble([random_table("1", 1), random_table("0", 2)])
    assert writers(numbered, "single", model="1") == {"1"}
    assert writers(numbered, "single", model=1) == {"0"}


def test_a_misspelt_model_is_told_the_nearest_one() -> None:
    said = "unknown model 'saeg'. Did you mean 'sage'? Known: assistant, base, left, sage."
    for kind, param in (
        ("single", "model"),
        ("nudging", "nudger"),
        ("bild", "large"),
        ("speculative", "target"),
        ("contrastive", "expert"),
        ("contrastive", "amateur"),
        ("proxy-tuning", "expert"),
        ("proxy-tuning", "antiexpert"),
    ):
        assert refusal(kind, **{param: "saeg"}) == f"UnknownNameError: {said}"
    for kind in ("random", "average"):
        assert refusal(kind, weights={"saeg": 1}) == f"UnknownNameError: {said}"


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    assert refusal("single", model=index) == (
        f"CapabilityError: there is no model {index}: this ensemble has 3 (0 base, 1 left, 2 sage)."
    )


@pytest.mark.parametrize(
    "weights",
    [[1, 1], [1, 1, 1, 1], [], [0, 0, 0], [2, -1, 1], {}, {"left": 0}, {"left": INF}],
)
@pytest.mark.parametrize("kind", ["random", "average"])
def test_weights_that_do_not_fit_the_ensemble_are_refused(kind: str, weights: Any) -> None:
    assert refusal(kind, weights=weights).endswith(
        "do not fit: allowed is one weight >= 0 for each of base, left, sage, not all zero."
    )


@pytest.mark.parametrize("kind", ["random", "average"])
def test_weights_whose_sum_is_infinite_are_weights(kind: str) -> None:
    settings: dict[str, Any] = {"seed": 1, "temperature": 1.0, "max_new_tokens": 6}
    huge, plain = (
        TRIO.generate(["a"], kind, params={"weights": [weight] * 3}, **settings)[0].text
        for weight in (1e308, 1)
    )
    assert huge == plain


@pytest.mark.parametrize("kind", ["random", "average"])
def test_a_model_is_weighed_once(kind: str) -> None:
    assert refusal(kind, weights={"left": 1, "assistant": 3}) == (
        "CapabilityError: weights name model 'left' twice, as 'left' and as 'assistant'."
    )


@pytest.mark.parametrize(
    ("kind", "params"),
    [("single", {"model": 7}), ("random", {"weights": [1]}), ("bild", {"large": "nobody"})],
)
def test_a_policy_that_does_not_fit_is_refused_when_the_ensemble_is_made(
    kind: str, params: dict[str, Any]
) -> None:
    with pytest.raises((CapabilityError, UnknownNameError)):
        Ensemble([BASE, LEFT], policy={"kind": kind, "params": params})


OF_ONE = [
    "confidence",
    "cool-fusion",
    "cosd-rule",
    "entropy",
    "gac",
    "margin",
    "max-confidence",
    "phases",
    "random",
    "safe",
    "single",
    "spec-fuse",
]


@pytest.mark.parametrize("kind", READY)
def test_with_one_model_a_policy_lets_it_write_or_says_what_is_missing(kind: str) -> None:
    solo = Ensemble([BASE])
    if kind in OF_ONE:
        assert writers(solo, kind) == {"base"}
    elif kind in ("average", "btm", "pack-llm", "unite"):
        assert writers(solo, kind) == {"mixture"}
    else:
        with pytest.raises(CapabilityError) as caught:
            writers(solo, kind)
        assert str(caught.value) == "there is no model 1: this ensemble has 1 (0 base)."


def test_params_replace_those_of_the_policy_that_they_are_given_with() -> None:
    preset = {"kind": "bild", "params": {"fallback": 0.25, "large": "sage"}}
    for source in (preset, TRIO.resolve(preset)):
        changed = TRIO.resolve(source, {"fallback": 0.5})
        assert changed.as_config()["params"] == {
            "fallback": 0.5,
            "rollback": 5.0,
            "num_small_iters": 10,
            "large": "sage",
            "large_first": True,
        }
    assert Ensemble([BASE, LEFT], policy=preset | {"params": {}}).resolve(None).name == "bild"


@pytest.mark.parametrize("kind", list(policies))
def test_a_policy_written_out_and_read_again_is_equal(kind: str) -> None:
    policy = TRIO.resolve(kind)
    assert TRIO.resolve(policy.as_config()) == policy


FORMS = (
    'a policy is a name, a path, {"kind": "confidence", "params": {"threshold": 0.6}}, or an '
    "instance of a policy's class"
)


def test_what_is_no_policy_is_refused() -> None:
    assert refusal({"params": {}}) == f"ConfigError: policy {{'params': {{}}}}: {FORMS}."
    assert refusal("confidense") == (
        "UnknownNameError: unknown policy 'confidense'. Did you mean 'confidence'? "
        f"Known: {', '.join(policy_names())}."
    )


def test_what_is_of_no_type_that_a_policy_has_is_refused() -> None:
    # In a process of its own, where nothing but the package looks at types.
    program = (
        "import multicolm\n"
        "from multicolm.policy.fixed import SinglePolicy\n"
        "from multicolm.policy.resolve import resolve_policy\n"
        "for source in (3, SinglePolicy):\n"
        "    try:\n"
        "        resolve_policy(source)\n"
        "    except multicolm.MulticolmError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"policy 3: {FORMS}.",
        f"policy {SinglePolicy!r}: {FORMS}; make one: SinglePolicy(...).",
    ], done.stderr


PLUG_IN = """
from __future__ import annotations
import torch
import multicolm

@multicolm.register_policy("turns-{name}")
class Turns(multicolm.SelectPolicy):
    first: int = 0

    def select(self, views: multicolm.Views) -> torch.Tensor:
        return torch.full((views.n_positions,), self.first)
"""


def test_a_file_with_a_class_is_found_from_the_folder_of_the_ensemble(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUG_IN.format(name=tmp_path.name))
    ensemble = Ensemble([BASE, LEFT], policy="mine.py:Turns", base_dir=tmp_path)
    assert isinstance(ensemble.policy, Policy)
    assert writers(ensemble, ensemble.policy, first=1) == {"left"}
    with pytest.raises(ConfigError, match=r"mine.py:Turns: first: must be a whole number"):
        ensemble.resolve(f"{tmp_path}/mine.py:Turns", {"first": "no"})
    with pytest.raises(UnknownNameError, match=r"'Turn'. Did you mean 'Turns'"):
        ensemble.resolve(f"{tmp_path}/mine.py:Turn")
    with pytest.raises(ConfigError, match=r"there is no file .*other\.py"):
        Ensemble([BASE], policy="other.py:Turns", base_dir=tmp_path)


@pytest.mark.parametrize(
    ("rule", "alpha", "low"), [("token-v3", -0.1, "0"), ("chow", 1.5, "0"), ("diff", 1.5, "-1")]
)
def test_a_cascades_alpha_is_checked_against_its_rule(rule: str, alpha: float, low: str) -> None:
    assert refusal("speculative-cascade", rule=rule, alpha=alpha).endswith(
        f"alpha: must be from {low} to 1 for rule '{rule}', got {alpha:g}."
    )
    assert TRIO.resolve({"kind": "speculative-cascade", "params": {"rule": "opt", "alpha": 7.0}})
