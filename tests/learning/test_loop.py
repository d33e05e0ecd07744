"""Training that is stopped anywhere ends with the same bytes, and stops itself where it should."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learning_worlds import Stop, hidden, stopping, world
from safetensors.torch import save

from multicolm.errors import ConfigError, TrainingError
from multicolm.learning.classifier import fit_classifier
from multicolm.learning.networks import from_tensors
from multicolm.learning.router import fit_marginal, raw_scores
from multicolm.learning.training import Training
from multicolm.score_table import ScoreTable

SEARCHING = {"epochs": 4, "weak_epochs": 2, "batch_size": 64}
SHORT = {**SEARCHING, "lr": 0.01, "l2": 0.0}
KINDS = {
    "linear": SHORT,
    "rates and decays": {**SEARCHING, "network": "mlp", "width": 8, "dropout": 0.3},
    "mlp": {**SHORT, "network": "mlp", "width": 8, "dropout": 0.3},
    "residual": {**SHORT, "network": "residual", "width": 8, "dropout": 0.3},
    "seeds": {**SHORT, "network": "mlp", "width": 8, "seeds": (3, 1)},
    "twice the same seed": {**SHORT, "seeds": (1, 1)},
    "no weak labels": {**SHORT, "weak_epochs": 0, "patience": 2},
    "nothing held out": {**SHORT, "held_out": 0.0},
}


def marginal(table: ScoreTable, training: Training) -> bytes:
    return save(fit_marginal(table, hidden, training))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_equal_trainings_give_equal_bytes_whatever_torch_drew_before(options) -> None:
    reports = []
    results = []
    for junk in (1, 2):
        torch.manual_seed(junk)
        training = Training(options)
        results.append(marginal(world(), training))
        reports.append(training.report)
    assert results[0] == results[1] and reports[0] == reports[1]


def test_training_draws_nothing_from_the_callers_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    marginal(world(), Training(KINDS["mlp"]))
    assert torch.equal(torch.rand(3), expected)


def test_other_seeds_give_other_networks() -> None:
    a, b = (marginal(world(), Training({**KINDS["mlp"], "seeds": (s,)})) for s in (0, 1))
    assert a != b


@pytest.mark.parametrize("name", KINDS)
def test_a_training_stopped_after_any_epoch_ends_with_the_same_bytes(name, tmp_path) -> None:
    calls = []
    plain = Training(KINDS[name], on_progress=lambda *args: calls.append(args))
    whole = marginal(world(), plain)
    assert len(calls) >= 4
    for cut in range(1, len(calls) + 1):
        folder = tmp_path / str(cut)
        with pytest.raises(Stop):
            marginal(world(), Training(KINDS[name], folder, stopping(cut), save_every=0.0))
        resumed = Training(KINDS[name], folder, save_every=0.0)
        assert marginal(world(), resumed) == whole, f"cut after {cut}"
        assert resumed.report == plain.report


def test_a_training_stopped_after_every_epoch_in_turn_ends_with_the_same_bytes(tmp_path) -> None:
    options = KINDS["seeds"]
    whole = marginal(world(), Training(options))
    n_stops, result = 0, b""
    while not result and n_stops < 100:
        try:
            result = marginal(world(), Training(options, tmp_path, stopping(1), save_every=0.0))
        except Stop:
            n_stops += 1
    assert result == whole and n_stops >= 2 * 6


def test_a_resumed_training_does_not_repeat_what_was_done(tmp_path) -> None:
    def n_epochs(training) -> int:
        calls = []
        training.on_progress = lambda *args: calls.append(args)
        marginal(world(), training)
        return len(calls)

    whole = n_epochs(Training(SHORT))
    with pytest.raises(Stop):
        marginal(world(), Training(SHORT, tmp_path, stopping(4), save_every=0.0))
    assert n_epochs(Training(SHORT, tmp_path)) == whole - 4


@pytest.mark.parametrize(
    "other",
    [
        lambda t: (t, {**SHORT, "lr": 0.02}),
        lambda t: (t, {**SHORT, "seeds": (5,)}),
        lambda t: (replace(t, digest="e"), SHORT),
        lambda t: (replace(t, identities=("id0", "id1", "other")), SHORT),
        lambda t: (t.rows(t.example < 50), SHORT),
    ],
)
def test_the_state_of_another_training_is_not_taken_up(tmp_path, other) -> None:
    with pytest.raises(Stop):
        marginal(world(), Training(SHORT, tmp_path, stopping(4), save_every=0.0))
    table, options = other(world())
    assert marginal(table, Training(options, tmp_path)) == marginal(table, Training(options))


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b"\0" * 99])
def test_a_damaged_state_is_trained_again(tmp_path, damage) -> None:
    with pytest.raises(Stop):
        marginal(world(), Training(SHORT, tmp_path, stopping(4), save_every=0.0))
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert marginal(world(), Training(SHORT, tmp_path)) == marginal(world(), Training(SHORT))


def test_states_are_as_rare_as_they_are_wanted(tmp_path) -> None:
    with pytest.raises(Stop):
        marginal(world(), Training(SHORT, tmp_path, stopping(4), save_every=3600.0))
    assert not list(tmp_path.iterdir())


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_models", [2, 3, 5])
def test_the_writer_is_learned_where_the_hidden_state_tells_it(n_models) -> None:
    training = Training({"epochs": 20, "batch_size": 64, "lr": 0.03})
    table = world(n_models, 600)
    tensors = fit_marginal(table, hidden, training)
    fresh = world(n_models, 600, seed=9)
    scores = raw_scores(tensors, hidden(fresh))
    chosen = fresh.correct.gather(1, scores.argmax(-1)[:, None])
    assert float(chosen.float().mean()) > 0.95
    report = training.report
    assert report["nll_nats"] < 0.4 < report["nll_nats_uniform"]
    assert report["nll_nats"] < min(report["nll_nats_alone"].values())
    assert report["right_tokens"] > 0.9 > report["right_tokens_base"]
    assert report["right_tokens_oracle"] == 1 and sum(report["share"].values()) == pytest.approx(1)


def test_early_stopping_keeps_the_best_epoch() -> None:
    """Much too long on few texts: what is kept is what was best on the others."""
    options = {"network": "mlp", "width": 64, "epochs": 60, "weak_epochs": 0, "lr": 0.05}
    training = Training({**options, "held_out": 0.4, "patience": 5, "batch_size": 8})
    table = world(3, 60, noise=2.0)
    tensors = fit_marginal(table, hidden, training)
    held_out = [epoch["held_out"] for epoch in training.report["history"]]
    best = min(range(len(held_out)), key=lambda n: held_out[n])
    assert len(held_out) == best + 1 + 5 < 60, "it stopped 5 epochs later"
    assert training.report["epochs"] == best + 1
    assert training.report["loss_nats"] == held_out[best]
    _, judged = table.split(0.4, 0)
    from multicolm.learning.losses import marginal_loss

    scores = raw_scores(tensors, hidden(judged))
    mine = float(marginal_loss(scores, judged.gold_logprobs, judged.known).mean())
    assert mine == pytest.approx(held_out[best], rel=1e-4)


@pytest.mark.parametrize("name", ["rates and decays", "linear"])
def test_the_candidate_that_is_kept_is_what_it_would_be_alone(name) -> None:
    """Side by side they share batches and dropout, and nothing else."""
    options = {k: v for k, v in KINDS[name].items() if k not in ("lr", "l2")}
    together = Training(options)
    kept = marginal(world(noise=1.0), together)
    report = together.report
    assert len(report["search"]) == 6
    best = min(tried["loss_nats"] for tried in report["search"])
    assert report["loss_nats"] == best
    alone = Training({**options, "lr": report["lr"], "l2": report["l2"]})
    assert marginal(world(noise=1.0), alone) == kept
    assert alone.report["history"] == report["history"]


def test_no_patience_never_stops() -> None:
    training = Training({**SHORT, "epochs": 30, "patience": 0, "lr": 0.3})
    fit_marginal(world(noise=2.0), hidden, training)
    assert len(training.report["history"]) == 2 + 30


def test_of_several_seeds_the_best_on_held_out_texts_is_kept() -> None:
    options = {**KINDS["mlp"], "held_out": 0.3}
    training = Training({**options, "seeds": (0, 1, 2, 3)})
    kept = marginal(world(noise=1.5), training)
    losses = training.report["loss_nats_by_seed"]
    alone = {}
    for seed in range(4):
        single = Training({**options, "seeds": (seed,)})
        result = marginal(world(noise=1.5), single)
        alone[str(seed)] = single.report["loss_nats"]
        if seed == training.report["seed"]:
            assert result == kept
    assert losses == alone and len(set(losses.values())) == 4
    assert losses[str(training.report["seed"])] == min(losses.values())
    assert training.report["loss_nats"] == min(losses.values())
    mean = sum(losses.values()) / 4
    assert training.report["loss_nats_mean"] == pytest.approx(mean)
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses.values()) / 4)
    assert training.report["loss_nats_sd"] == pytest.approx(deviation)


def test_a_price_on_assistants_hands_over_less_and_the_dearer_one_least() -> None:
    table = replace(world(3, 600), costs=(1.0, 1.0, 20.0))
    shares = []
    for weight in (0.0, 0.3):
        training = Training({"epochs": 40, "lr": 0.05, "cost_weight": weight})
        fit_marginal(table, hidden, training)
        shares.append(training.report["share"])
    assert shares[1]["m2"] < 0.1 < 0.2 < shares[0]["m2"]
    assert shares[1]["m1"] > 0.2


# --- where it stops with a sentence --------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("text", [0, 5])
def test_features_that_are_no_numbers_are_refused_by_name(value, text) -> None:
    table = world()
    table.base["hidden"][text * 4, 2] = value
    with pytest.raises(TrainingError, match=r"features .* NaN or infinite at 1 of \d+ positions"):
        fit_marginal(table, hidden, Training(SHORT))


@pytest.mark.parametrize("lr", [1e4, 1e8])
@pytest.mark.parametrize("name", ["linear", "mlp", "residual"])
def test_a_learning_rate_that_is_much_too_high_is_told_so(name, lr) -> None:
    options = {**KINDS[name], "lr": lr, "epochs": 20, "patience": 0}
    with pytest.raises(TrainingError, match=r"training diverges: lower lr \(") as caught:
        fit_marginal(world(noise=2.0), hidden, Training(options))
    assert "\n" not in str(caught.value)


def test_one_model_leaves_nothing_to_choose() -> None:
    with pytest.raises(TrainingError, match="has one model, so there is no choice to learn"):
        fit_marginal(world(1), hidden, Training())
    with pytest.raises(TrainingError, match="has one model, so there is no choice to learn"):
        fit_classifier(world(1), hidden, "each", Training())


def test_positions_that_teach_nothing_are_no_training() -> None:
    table = world()
    table.known[:, 1:] = False
    with pytest.raises(TrainingError, match="nothing to learn from: at no position is the token"):
        fit_marginal(table, hidden, Training())
    nobody = replace(world(), top1_ids=torch.full((300, 3), 6))
    with pytest.raises(TrainingError, match=r"nothing to learn from: at no position .* any model"):
        fit_classifier(nobody, hidden, "each", Training())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epocs": 3}, "unknown key 'epocs'. Did you mean 'epochs'?"),
        ({"zzz": 3}, "unknown key 'zzz'. Allowed: balance,"),
        ({"epochs": 0}, "must be 1 or more, got 0."),
        ({"epochs": "3"}, "must be a whole number, got '3'."),
        ({"epochs": 1.5}, "must be a whole number, got 1.5."),
        ({"lr": 0}, "must be more than 0, got 0."),
        ({"lr": float("inf")}, "must be a finite number, got inf."),
        ({"held_out": 1.0}, "must be less than 1, got 1.0."),
        ({"network": "tree"}, "must be 'linear', 'mlp' or 'residual', got 'tree'."),
        ({"network": "linea"}, "Did you mean 'linear'?"),
        ({"seeds": []}, "must hold 1 or more, got 0."),
        ({"seeds": [2**70]}, "seeds.0: must be less than 4.29497e+09"),
        ({"seeds": [-1]}, "must be 0 or more"),
        ({"balance": 0.5}, "must be 1 or more, got 0.5."),
    ],
)
def test_a_wrong_option_is_told_what_is_allowed(options, said) -> None:
    with pytest.raises(ConfigError) as caught:
        fit_marginal(world(), hidden, Training(options))
    assert "training options" in str(caught.value) and said in str(caught.value)


def test_seeds_as_a_yaml_list_are_taken() -> None:
    as_list, as_tuple = (Training({**SHORT, "seeds": kind([0, 1])}) for kind in (list, tuple))
    assert marginal(world(), as_list) == marginal(world(), as_tuple)


# --- classification ------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", ["each", "binary"])
def test_a_classifier_learns_who_is_right(ways) -> None:
    training = Training({"network": "mlp", "epochs": 20, "width": 16, "held_out": 0.2, "lr": 0.01})
    table = world(3, 800)
    tensors, threshold = fit_classifier(table, hidden, ways, training)
    fresh = world(3, 800, seed=7)
    scores = raw_scores(tensors, hidden(fresh))[:, 1:]
    assert scores.shape[1] == (2 if ways == "each" else 1)
    wanted = ~fresh.correct[:, 0]
    assert threshold is not None
    handed = scores.amax(-1).sigmoid() > threshold
    assert float(handed[wanted].float().mean()) > 0.9
    assert training.report["share_to_hand_over"] == pytest.approx(2 / 3, abs=0.1)
    if ways == "each":
        writers = (scores.argmax(-1) + 1) * handed
        assert float(fresh.correct.gather(1, writers[:, None]).float().mean()) > 0.95
        assert training.report["right_tokens"] > 0.9 > training.report["right_tokens_base"]


def test_the_threshold_reaches_the_recall_on_the_held_out_texts() -> None:
    table = world(2, 600, noise=1.5)
    _, judged = table.split(0.3, 0)
    wanted, found = ~judged.correct[:, 0], []
    for recall in (0.3, 0.9, 0.99):
        training = Training({"network": "linear", "epochs": 5, "held_out": 0.3, "recall": recall})
        tensors, threshold = fit_classifier(table, hidden, "each", training)
        handed = raw_scores(tensors, hidden(judged))[:, 1].sigmoid()
        assert float((handed[wanted] > threshold).float().mean()) >= recall
        found.append(threshold)
    assert found[0] >= found[1] >= found[2] and found[0] > found[2]


@pytest.mark.parametrize("options", [{"recall": 0.0}, {"held_out": 0.0, "recall": 0.9}])
def test_a_recall_of_0_or_without_held_out_texts_leaves_the_threshold(options) -> None:
    training = Training({"network": "linear", "epochs": 2, **options})
    tensors, threshold = fit_classifier(world(), hidden, "each", training)
    assert threshold is None and from_tensors(tensors)


def test_positions_where_nobody_is_right_change_nothing_for_a_classifier() -> None:
    table = world(3, 200)
    nobody = replace(
        world(3, 200, seed=1), top1_ids=torch.full((200, 3), 6), example=table.example + 1000
    )
    both = replace(
        table,
        **{
            name: torch.cat([getattr(table, name), getattr(nobody, name)])
            for name, value in vars(table).items()
            if isinstance(value, torch.Tensor)
        },
        base={"hidden": torch.cat([table.base["hidden"], nobody.base["hidden"]])},
    )
    options = {"network": "linear", "epochs": 3}
    one = fit_classifier(table, hidden, "each", Training(options))
    two = fit_classifier(both, hidden, "each", Training(options))
    assert save(one[0]) == save(two[0]) and one[1] == two[1]


def test_a_classifier_that_is_stopped_ends_with_the_same_bytes(tmp_path: Path) -> None:
    options = {"width": 8, "epochs": 4, "dropout": 0.2, "batch_size": 64}
    whole, threshold = fit_classifier(world(), hidden, "binary", Training(options))
    for cut in (1, 3, 4):
        with pytest.raises(Stop):
            stopped = Training(options, tmp_path / str(cut), stopping(cut), save_every=0.0)
            fit_classifier(world(), hidden, "binary", stopped)
        resumed = Training(options, tmp_path / str(cut))
        tensors, again = fit_classifier(world(), hidden, "binary", resumed)
        assert save(tensors) == save(whole) and again == threshold
