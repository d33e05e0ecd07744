"""Settings at the edge, where a policy must equal something simpler.

One test for each line of the table, on exact tables whose models disagree nearly everywhere, with
both schedules and several block sizes.
"""

from __future__ import annotations

from typing import Any

import pytest
from tables import READY, random_table

from multicolm import Ensemble
from multicolm.backend.table import TableModel

PROMPTS = ["a", "b c", " c", "df", " cab", " ea"]
WAYS = [("stepwise", 1), ("block", 3), ("block", 8)]


BASE, LEFT, RIGHT = (
    random_table(name, seed) for seed, name in enumerate(("base", "left", "right"))
)
PAIR = Ensemble([BASE, LEFT])
TRIO = Ensemble([BASE, LEFT, RIGHT])
TWINS = Ensemble([BASE, random_table("twin", 0), random_table("triplet", 0)])


def texts(
    ensemble: Ensemble, kind: str, way: tuple[str, int] = WAYS[0], **params: Any
) -> list[str]:
    """The written token ids, as text, of every prompt; greedy."""
    answers = ensemble.generate(
        PROMPTS,
        {"kind": kind, "params": params},
        max_new_tokens=20,
        seed=0,
        schedule=way[0],
        block_size=way[1],
    )
    return [" ".join(str(token.id) for token in answer.trace) for answer in answers]


def alone(model: TableModel) -> list[str]:
    """What a model writes without any ensemble around it."""
    return texts(Ensemble([model]), "single")


def shares(
    ensemble: Ensemble,
    kind: str,
    way: tuple[str, int] = WAYS[0],
    temperature: float = 0.0,
    **params: Any,
) -> dict[str, float]:
    """Part of all tokens that each model wrote."""
    answers = ensemble.generate(
        PROMPTS,
        {"kind": kind, "params": params},
        max_new_tokens=20,
        temperature=temperature,
        seed=0,
        schedule=way[0],
        block_size=way[1],
    )
    tokens = [token.model for answer in answers for token in answer.trace]
    return {name: tokens.count(name) / len(tokens) for name in ensemble.models}


def test_the_tables_disagree_so_that_equalities_mean_something() -> None:
    written = {tuple(alone(model)) for model in (BASE, LEFT, RIGHT)}
    assert len(written) == 3
    assert texts(PAIR, "cosd-rule") not in (alone(BASE), alone(LEFT))


@pytest.mark.parametrize("way", WAYS)
class TestDegenerateCases:
    """Each test is one line of the table."""

    def test_single_is_that_model(self, way: tuple[str, int]) -> None:
        for name, model in (("base", BASE), ("left", LEFT), ("right", RIGHT)):
            assert texts(TRIO, "single", way, model=name) == alone(model)

    def test_random_with_one_weight_is_that_model(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "random", way, weights=[0, 0, 1]) == alone(RIGHT)
        assert texts(TRIO, "random", way, weights={"left": 2}) == alone(LEFT)

    @pytest.mark.parametrize(
        ("kind", "never", "always"),
        [
            ("confidence", 0.0, 1.1),
            ("entropy", 1e9, -1.0),
            ("margin", 0.0, 1.1),
            ("r-stitch", 1.0, -1.0),
        ],
    )
    def test_thresholds_at_the_ends_are_the_base_and_the_assistant(
        self, way: tuple[str, int], kind: str, never: float, always: float
    ) -> None:
        assert texts(TRIO, kind, way, threshold=never) == alone(BASE)
        assert texts(PAIR, kind, way, threshold=always) == alone(LEFT)

    @pytest.mark.parametrize("kind", READY)
    def test_identical_models_write_the_text_of_one(self, way: tuple[str, int], kind: str) -> None:
        # Nudges that are the same again and again end a text.
        params = {"same_nudges": None} if kind == "nudging" else {}
        assert texts(TWINS, kind, way, **params) == alone(BASE)

    def test_cosd_with_alpha_0_is_the_draft(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "cosd-rule", way, alpha=0.0) == alone(BASE)

    def test_cosd_with_alpha_above_1_and_beta_0_is_the_assistant(
        self, way: tuple[str, int]
    ) -> None:
        assert texts(PAIR, "cosd-rule", way, alpha=1.1, beta=0.0) == alone(LEFT)

    def test_cosd_of_identical_models_is_the_draft_with_no_replacement(
        self, way: tuple[str, int]
    ) -> None:
        assert texts(TWINS, "cosd-rule", way, alpha=1.1, beta=0.0) == alone(BASE)
        assert shares(TWINS, "cosd-rule", way, alpha=1.1, beta=0.0)["base"] == 1

    def test_any_draft_length_gives_the_same_text(self, way: tuple[str, int]) -> None:
        for kind in ("cosd-rule", "max-confidence", "average", "bild", "nudging"):
            assert texts(TRIO, kind, way) == texts(TRIO, kind)

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_an_average_with_one_weight_is_that_model(
        self, way: tuple[str, int], mean: str
    ) -> None:
        for weights, model in (([1, 0, 0], BASE), ([0, 3, 0], LEFT), ({"right": 1}, RIGHT)):
            assert texts(TRIO, "average", way, weights=weights, mean=mean) == alone(model)

    def test_a_geometric_average_of_identical_models_is_the_same(
        self, way: tuple[str, int]
    ) -> None:
        assert texts(TWINS, "average", way, mean="geometric") == alone(BASE)

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_the_order_of_models_does_not_matter_to_an_average(
        self, way: tuple[str, int], mean: str
    ) -> None:
        turned = Ensemble([RIGHT, random_table("was-base", 0), LEFT])
        plain = texts(TRIO, "average", way, weights=[0.5, 0.2, 0.3], mean=mean)
        assert texts(turned, "average", way, weights=[0.3, 0.5, 0.2], mean=mean) == plain

    def test_max_confidence_of_identical_models_is_the_base_writing(
        self, way: tuple[str, int]
    ) -> None:
        assert shares(TWINS, "max-confidence", way)["base"] == 1

    def test_proxy_tuning_with_alpha_0_is_the_base(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "proxy-tuning", way, alpha=0.0) == alone(BASE)

    def test_proxy_tuning_with_equal_expert_and_antiexpert_is_the_base(
        self, way: tuple[str, int]
    ) -> None:
        assert texts(TRIO, "proxy-tuning", way, expert=1, antiexpert=1) == alone(BASE)

    def test_gedi_with_alpha_0_or_one_model_twice_is_the_base(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "gedi", way, alpha=0.0) == alone(BASE)
        assert texts(TRIO, "gedi", way, attribute=1, opposite=1) == alone(BASE)

    def test_contrastive_with_beta_0_is_the_expert(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "contrastive", way, beta=0.0, expert="right") == alone(RIGHT)

    def test_contrastive_with_alpha_1_is_the_expert(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "contrastive", way, alpha=1.0, expert="right") == alone(RIGHT)

    def test_bild_that_never_objects_is_the_small_model_up_to_its_turn(
        self, way: tuple[str, int]
    ) -> None:
        quiet = {"fallback": 0.0, "rollback": float("inf")}
        never = {**quiet, "num_small_iters": 100, "large_first": False}
        assert texts(PAIR, "bild", way, **never) == alone(BASE)
        answers = PAIR.generate(
            PROMPTS,
            {"kind": "bild", "params": {**quiet, "num_small_iters": 4}},
            max_new_tokens=20,
            schedule=way[0],
            block_size=way[1],
        )
        for answer in answers:
            writers = [token.model for token in answer.trace]
            assert writers == ["base" if i % 5 else "left" for i in range(len(writers))]

    def test_bild_with_fallback_above_1_is_the_large_model(self, way: tuple[str, int]) -> None:
        assert texts(PAIR, "bild", way, fallback=1.1) == alone(LEFT)

    def test_bild_with_rollback_0_is_the_large_model(self, way: tuple[str, int]) -> None:
        settings = {"fallback": 0.0, "rollback": 0.0, "num_small_iters": 100}
        assert texts(PAIR, "bild", way, **settings) == alone(LEFT)

    def test_speculative_decoding_is_the_target(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "speculative", way, target="right") == alone(RIGHT)

    def test_speculative_decoding_of_identical_models_accepts_everything(
        self, way: tuple[str, int]
    ) -> None:
        assert texts(TWINS, "speculative", way) == alone(BASE)
        assert shares(TWINS, "speculative", way)["base"] == 1
        assert shares(TWINS, "speculative", way, temperature=1.0)["base"] == 1

    @pytest.mark.parametrize(
        ("rule", "base", "target"),
        [
            ("token-v3", 1.0, 0.0),
            ("token-v2", 1.0, 0.0),
            ("token-v1", 1.0, -1.0),
            ("chow", 1.0, 0.0),
            ("diff", 1.0, -1.0),
            ("opt", 1e9, -1e9),
        ],
    )
    def test_a_cascade_is_the_base_at_one_end_and_the_target_at_the_other(
        self, way: tuple[str, int], rule: str, base: float, target: float
    ) -> None:
        kind = "speculative-cascade"
        assert texts(TRIO, kind, way, rule=rule, alpha=base, target="right") == alone(BASE)
        assert shares(TRIO, kind, way, rule=rule, alpha=base)["base"] == 1
        assert texts(TRIO, kind, way, rule=rule, alpha=target, target="right") == alone(RIGHT)

    def test_nudging_with_threshold_0_is_the_base(self, way: tuple[str, int]) -> None:
        assert texts(PAIR, "nudging", way, threshold=0.0) == alone(BASE)

    def test_nudging_with_threshold_above_1_is_the_nudger(self, way: tuple[str, int]) -> None:
        assert texts(PAIR, "nudging", way, threshold=1.1) == alone(LEFT)


def test_full_lenience_accepts_every_draft_token() -> None:
    assert texts(TRIO, "speculative", lenience=1.0) == alone(BASE)


def test_the_base_writes_nothing_where_the_thresholds_are_out_of_reach() -> None:
    for kind, params in (
        ("confidence", {"threshold": 1.1}),
        ("margin", {"threshold": 1.1}),
        ("entropy", {"threshold": -1.0}),
    ):
        written = shares(TRIO, kind, **params)
        assert written["base"] == 0
        # Each of the two is the surer one somewhere.
        assert min(written["left"], written["right"]) > 0


def test_weights_mean_the_same_in_a_list_and_by_name() -> None:
    for weights in ({"left": 3, "base": 1}, {"assistant": 0.75, "base": 0.25}):
        for kind in ("random", "average"):
            assert texts(TRIO, kind, weights=weights) == texts(TRIO, kind, weights=[1, 3, 0])


@pytest.mark.parametrize(
    ("kind", "params", "idle"),
    [
        ("single", {}, {"left", "right"}),
        ("single", {"model": "right"}, {"base", "left"}),
        ("random", {"weights": [0, 1, 1]}, {"base"}),
        ("random", {"weights": {"base": 1, "right": 1}}, {"left"}),
        ("average", {"weights": [1, 0, 1]}, {"left"}),
        ("average", {"weights": [0, 1, 1]}, {"base"}),
        ("confidence", {"threshold": 0.0}, {"left", "right"}),
        ("entropy", {"threshold": float("inf")}, {"left", "right"}),
        ("margin", {"threshold": 0.0}, {"left", "right"}),
        ("cosd-rule", {"alpha": 0.0}, {"left", "right"}),
        ("nudging", {"threshold": 0.0}, {"left", "right"}),
        ("nudging", {"nudger": "right"}, {"left"}),
        ("bild", {"large": 2}, {"left"}),
        ("r-stitch", {"large": 2, "threshold": 0.5}, {"left"}),
        ("r-stitch", {"threshold": 1.0}, {"left", "right"}),
        ("speculative", {"target": "right"}, {"left"}),
        ("speculative-cascade", {"target": "right"}, {"left"}),
        ("contrastive", {"expert": "right", "amateur": "left"}, {"base"}),
        ("proxy-tuning", {"expert": "right", "antiexpert": "right"}, {"left"}),
        ("gedi", {"attribute": "right", "opposite": "base"}, {"left"}),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_without_a_part_is_never_run(
    kind: str, params: dict[str, Any], idle: set[str], way: tuple[str, int]
) -> None:
    answers = TRIO.generate(
        PROMPTS,
        {"kind": kind, "params": params},
        max_new_tokens=10,
        seed=0,
        schedule=way[0],
        block_size=way[1],
    )
    ran = {name for answer in answers for name, use in answer.usage.items() if use.forwards > 0}
    assert ran == set(TRIO.models) - idle
