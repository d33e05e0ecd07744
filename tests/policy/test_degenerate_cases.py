"""Settings at the edge, where a policy must equal something simpler.

One test for each line of the table, on exact tables whose models disagree nearly everywhere, with
both schedules and several block sizes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from multicolm import Ensemble
from multicolm.backend.table import TableModel

TOKENS = ["a", "b", "c", " d", "e", " f", "."]
PROMPTS = ["a", "bc", " d", "e f", "cab", "ea"]
WAYS = [("stepwise", 1), ("block", 1), ("block", 3), ("block", 8)]


def table(name: str, seed: int) -> TableModel:
    """A table of two tokens' memory with random, rather peaked distributions."""
    chance = random.Random(seed)
    rows: dict[Any, Mapping[str, float]] = {}
    for context in ["", *TOKENS[:-1], *((a, b) for a in TOKENS[:-1] for b in TOKENS[:-1])]:
        weights = [chance.random() ** 4 + 1e-6 for _ in TOKENS]
        weights[-1] *= 0.3
        rows[context] = {t: w / sum(weights) for t, w in zip(TOKENS, weights, strict=True)}
    return TableModel(name, TOKENS, rows, ends=["."])


BASE, LEFT, RIGHT = table("base", 1), table("left", 2), table("right", 3)
PAIR = Ensemble([BASE, LEFT])
TRIO = Ensemble([BASE, LEFT, RIGHT])
TWINS = Ensemble([BASE, table("twin", 1), table("triplet", 1)])


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


def shares(ensemble: Ensemble, kind: str, **params: Any) -> dict[str, float]:
    """Part of all tokens that each model wrote."""
    answers = ensemble.generate(PROMPTS, {"kind": kind, "params": params}, max_new_tokens=20)
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
        [("confidence", 0.0, 1.1), ("entropy", 1e9, -1.0), ("margin", 0.0, 1.1)],
    )
    def test_thresholds_at_the_ends_are_the_base_and_the_assistant(
        self, way: tuple[str, int], kind: str, never: float, always: float
    ) -> None:
        assert texts(TRIO, kind, way, threshold=never) == alone(BASE)
        assert texts(PAIR, kind, way, threshold=always) == alone(LEFT)

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
        assert shares(TWINS, "cosd-rule", alpha=1.1, beta=0.0)["base"] == 1

    def test_any_draft_length_gives_the_same_text(self, way: tuple[str, int]) -> None:
        for kind in ("cosd-rule", "max-confidence", "average", "bild", "nudging"):
            assert texts(TRIO, kind, way) == texts(TRIO, kind)

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_an_average_with_one_weight_is_that_model(
        self, way: tuple[str, int], mean: str
    ) -> None:
        for weights, model in (([1, 0, 0], BASE), ([0, 3, 0], LEFT), ({"right": 1}, RIGHT)):
            assert texts(TRIO, "average", way, weights=weights, mean=mean) == alone(model)

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_an_average_of_identical_models_is_the_same(
        self, way: tuple[str, int], mean: str
    ) -> None:
        assert texts(TWINS, "average", way, mean=mean) == alone(BASE)

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_the_order_of_models_does_not_matter_to_an_average(
        self, way: tuple[str, int], mean: str
    ) -> None:
        turned = Ensemble([RIGHT, BASE, LEFT])
        plain = texts(TRIO, "average", way, weights=[0.5, 0.2, 0.3], mean=mean)
        assert texts(turned, "average", way, weights=[0.3, 0.5, 0.2], mean=mean) == plain

    def test_max_confidence_of_identical_models_is_the_base_writing(
        self, way: tuple[str, int]
    ) -> None:
        assert texts(TWINS, "max-confidence", way) == alone(BASE)
        assert shares(TWINS, "max-confidence")["base"] == 1

    def test_proxy_tuning_with_alpha_0_is_the_base(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "proxy-tuning", way, alpha=0.0) == alone(BASE)

    def test_proxy_tuning_with_equal_expert_and_antiexpert_is_the_base(
        self, way: tuple[str, int]
    ) -> None:
        assert texts(TRIO, "proxy-tuning", way, expert=1, antiexpert=1) == alone(BASE)

    def test_contrastive_with_beta_0_is_the_expert(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "contrastive", way, beta=0.0, expert="right") == alone(RIGHT)

    def test_contrastive_with_alpha_1_is_the_expert(self, way: tuple[str, int]) -> None:
        assert texts(TRIO, "contrastive", way, alpha=1.0, expert="right") == alone(RIGHT)

    def test_bild_that_never_objects_is_the_small_model_up_to_its_turn(
        self, way: tuple[str, int]
    ) -> None:
        quiet = {"fallback": 0.0, "rollback": float("inf")}
        assert texts(PAIR, "bild", way, **quiet, num_small_iters=100) == alone(BASE)
        answers = PAIR.generate(
            PROMPTS,
            {"kind": "bild", "params": {**quiet, "num_small_iters": 4}},
            max_new_tokens=20,
            schedule=way[0],
            block_size=way[1],
        )
        for answer in answers:
            writers = [token.model for token in answer.trace]
            assert writers == ["left" if i % 5 == 4 else "base" for i in range(len(writers))]

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
        assert shares(TWINS, "speculative")["base"] == 1

    def test_nudging_with_threshold_0_is_the_base(self, way: tuple[str, int]) -> None:
        assert texts(PAIR, "nudging", way, threshold=0.0) == alone(BASE)

    def test_nudging_with_threshold_above_1_is_the_nudger(self, way: tuple[str, int]) -> None:
        assert texts(PAIR, "nudging", way, threshold=1.1) == alone(LEFT)


def test_full_lenience_accepts_every_draft_token() -> None:
    assert texts(TRIO, "speculative", lenience=1.0) == alone(BASE)


def test_a_lottery_over_many_draws_is_the_linear_mixture() -> None:
    n_draws = 4000
    answers = TRIO.generate(
        ["a"] * n_draws,
        {"kind": "random", "params": {"weights": [0.5, 0.3, 0.2]}},
        temperature=1.0,
        max_new_tokens=1,
        seed=range(n_draws),
        batch_size=200,
    )
    counts = [0] * len(TOKENS)
    for answer in answers:
        counts[answer.trace.tokens[0].id] += 1
    wanted = [0.0] * len(TOKENS)
    for weight, model in zip((0.5, 0.3, 0.2), (BASE, LEFT, RIGHT), strict=True):
        probs = model.logits_after([0]).exp().tolist()
        wanted = [w + weight * p for w, p in zip(wanted, probs, strict=True)]
    for count, probability in zip(counts, wanted, strict=True):
        # Five standard deviations: one false alarm in a million runs, if seeds were fresh.
        slack = 5 * (n_draws * probability * (1 - probability)) ** 0.5 + 1
        assert abs(count - n_draws * probability) < slack
