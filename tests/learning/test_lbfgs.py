"""A linear head trained on the whole table: the optimum, no luck, and stops anywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from learning_worlds import Stop, hidden, stopping, world
from safetensors.torch import save
from scipy.optimize import minimize

from multicolm.errors import ConfigError
from multicolm.learning.losses import marginal_loss
from multicolm.learning.router import RouterSettings, fit_marginal, raw_scores
from multicolm.learning.training import Training
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.score_table import ScoreTable
from multicolm.views import ModelNames

NO_SEARCH = {"l2": 0.01, "held_out": 0.0, "weak_epochs": 0}


def test_the_optimum_is_that_of_scipy() -> None:
    """Same objective, written down once more; a ridge for standardised features, a free bias."""
    table = world(3, 200, noise=1.0)
    mine = fit_marginal(table, hidden, Training({**NO_SEARCH, "epochs": 300, "patience": 0}))
    raw = table.base["hidden"].double()
    scale = raw.std(0, unbiased=False)
    inputs = (raw - raw.mean(0)) / scale

    def objective(flat):
        at = torch.tensor(flat, requires_grad=True)
        weight, bias = at[:12].view(2, 6), at[12:]
        scores = torch.cat([torch.zeros(200, 1).double(), inputs @ weight.T + bias], -1)
        loss = marginal_loss(scores, table.gold_logprobs.double(), table.known).mean()
        total = loss + 0.005 * weight.square().sum()
        total.backward()
        return float(total.detach()), at.grad.numpy()

    best = minimize(objective, torch.zeros(14).double().numpy(), jac=True, method="BFGS")
    found = torch.cat([(mine["0.weight"] * scale).flatten(), mine["0.bias"]]).double()
    found[12:] += (mine["0.weight"].double() @ raw.mean(0)).flatten()
    assert objective(found.numpy())[0] == pytest.approx(best.fun, abs=2e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_scale_and_the_place_of_features_make_no_difference(scale) -> None:
    table = world(3, 300, noise=1.0)
    moved = replace(table, base={"hidden": table.base["hidden"] * scale + 5 * scale})
    reports = []
    for each in (table, moved):
        training = Training({"l2": 0.03})
        fit_marginal(each, hidden, training)
        reports.append(training.report)
    assert reports[0]["nll_nats"] == pytest.approx(reports[1]["nll_nats"], abs=2e-3)


def wide(n: int, width: int, seed: int) -> ScoreTable:
    """64 directions of falling variance tell who is right; the rest of the width is noise."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(5)
    spread = torch.arange(1, 65) ** -0.7
    directions = torch.randn(64, width, generator=fixed) * spread[:, None]
    inner = torch.randn(n, 64, generator=g)
    seen = inner @ directions + 0.3 * torch.randn(n, width, generator=g)
    told = torch.randn(64, generator=fixed) / 4
    assistant = torch.rand(n, generator=g) < torch.sigmoid(inner @ told - 1.5)
    chance = torch.rand(n, 2, generator=g) < torch.tensor([0.1, 0.3])
    right = torch.stack([~assistant, assistant], 1) | chance
    return table_of(right, seen, torch.where(right, 0.8, 0.03).log())


def table_of(right, seen, logprobs) -> ScoreTable:
    n, m = right.shape
    zeros = torch.zeros(n, m)
    return ScoreTable(
        models=ModelNames([f"m{k}" for k in range(m)]),
        gold_ids=torch.zeros(n).long(),
        gold_logprobs=logprobs,
        known=torch.ones(n, m).bool(),
        top1_ids=torch.where(right, 0, 1),
        top1_logprobs=zeros,
        entropies=zeros,
        margins=zeros,
        example=torch.arange(n) // 40,
        place=torch.arange(n) % 40,
        base={"hidden": seen},
        costs=(1.0,) * m,
        identities=("",) * m,
    )


def test_a_wide_head_on_few_positions_is_far_better_than_uniform_by_defaults() -> None:
    """A rate that was found at width 96 gave 0.80 here, which is worse than uniform."""
    fresh = wide(2000, 512, 1)
    head = fit_marginal(wide(2000, 512, 0), hidden, Training())
    scores = raw_scores(head, hidden(fresh))
    nll = float(marginal_loss(scores, fresh.gold_logprobs, fresh.known).mean())
    uniform = marginal_loss(torch.zeros_like(scores), fresh.gold_logprobs, fresh.known).mean()
    assert nll < float(uniform) - 0.12


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10])
def test_overlapping_assistants_are_used_however_many_there_are(k) -> None:
    """Jointly right at 70 %, and the states say nothing: it is best to ask them always."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand(3000, generator=g) < 0.7
    right = torch.stack([~z, *[z] * k], 1)
    seen = torch.randn(3000, 8, generator=g)
    training = Training()
    CoLlmPolicy().fit(table_of(right, seen, torch.where(right, 0.8, 0.02).log()), training)
    report = training.report
    assert report["share"]["m0"] == 0
    assert report["right_tokens"] == pytest.approx(1 - report["right_tokens_base"])
    assert report["right_tokens"] > 0.65


def test_ten_assistants_some_of_them_rare_are_told_apart() -> None:
    """A strong penalty alone would end at pi_k = 0, from where no gradient leads away."""
    rates = torch.tensor([0.9] + [0.0199] * 5 + [0.0001] * 5)
    centres = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))

    def drawn(n: int, seed: int) -> ScoreTable:
        g = torch.Generator().manual_seed(seed)
        z = torch.multinomial(rates, n, replacement=True, generator=g)
        right = torch.nn.functional.one_hot(z, 11).bool() | (torch.rand(n, 11, generator=g) < 0.05)
        seen = centres[z] + 0.5 * torch.randn(n, 32, generator=g)
        return table_of(right, seen, torch.where(right, 0.9, 0.05).log())

    fresh = drawn(4000, 9)
    head = fit_marginal(drawn(4000, 0), hidden, Training())
    writers = raw_scores(head, hidden(fresh)).argmax(-1)
    assert float(fresh.correct.gather(1, writers[:, None]).float().mean()) > 0.99
    assert float(fresh.correct[:, 0].float().mean()) < 0.92


# --- stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"epochs": 3}, {"l2": 0.1}, {"weak_epochs": 0, "l2": 1e-4}])
def test_a_training_stopped_after_any_iteration_ends_with_the_same_bytes(options, tmp_path) -> None:
    calls = []
    plain = Training(options, on_progress=lambda *args: calls.append(args))
    whole = save(fit_marginal(world(n=120), hidden, plain))
    assert [c[0] for c in calls] == sorted(c[0] for c in calls) and calls[-1][0] == calls[-1][1]
    for cut in range(1, len(calls), max(1, len(calls) // 4)):
        folder = tmp_path / str(cut)
        with pytest.raises(Stop):
            stopped = Training(options, folder, stopping(cut), save_every=0.0)
            fit_marginal(world(n=120), hidden, stopped)
        resumed = Training(options, folder, save_every=0.0)
        assert save(fit_marginal(world(n=120), hidden, resumed)) == whole, f"cut after {cut}"
        assert resumed.report == plain.report


# --- what is said --------------------------------------------------------------------------------


def test_a_cap_that_binds_is_said_and_one_that_does_not_is_not() -> None:
    for epochs, said in ((2, True), (100, False)):
        training = Training({"epochs": epochs, "l2": 1e-3})
        fit_marginal(world(3, 2000), hidden, training)
        note = training.report.get("note", "")
        assert ("cut off after 2 epochs, while it still improved: raise the option" in note) == said


def test_figures_of_few_held_out_tokens_are_said_to_mean_little() -> None:
    training = Training()
    fit_marginal(world(3, 60), hidden, training)
    assert training.report["note"].startswith("8 held-out tokens: figures of so few say little")
    training = Training({"held_out": 0.0})
    fit_marginal(world(3, 60), hidden, training)
    assert training.report["note"].startswith("No text is held out")


def test_a_penalty_that_is_given_is_the_only_one() -> None:
    training = Training({"l2": 0.3})
    fit_marginal(world(), hidden, training)
    assert [tried["l2"] for tried in training.report["search"]] == [0.3]
    assert training.report["l2"] == 0.3 and training.report["solver"] == "lbfgs"


@pytest.mark.parametrize("options", [{"lr": 0.01}, {"batch_size": 64}, {"seeds": [3]}])
def test_settings_of_adamw_choose_adamw(options) -> None:
    assert not RouterSettings(**options).uses_lbfgs and RouterSettings().uses_lbfgs
    with pytest.raises(ConfigError, match=f"solver lbfgs has no {next(iter(options))}; use adamw"):
        fit_marginal(world(), hidden, Training({"solver": "lbfgs", **options}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 8}, "a linear network has no width; leave it out, or set network to"),
        ({"dropout": 0.1}, "a linear network has no dropout"),
        ({"n_blocks": 3, "network": "mlp"}, "a mlp network has no n_blocks"),
        ({"solver": "lbfgs", "network": "mlp"}, "solver lbfgs trains linear networks"),
        ({"balance": 2.0, "weak_epochs": 0}, "balance is of the weak labels, and weak_epochs is 0"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(options, said) -> None:
    from multicolm.errors import MulticolmError

    with pytest.raises(MulticolmError) as caught:
        fit_marginal(world(), hidden, Training(options))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# --- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("sureness", "least", "most"), [(0.0, 0.0, 0.03), (30.0, 0.45, 0.55)])
def test_a_router_that_is_sure_by_tossing_a_coin_is_not_calibrated(sureness, least, most) -> None:
    """Against responsibilities, which contain pi, its error would be 0.0000."""
    from multicolm.learning.router import calibration

    g = torch.Generator().manual_seed(0)
    base = torch.rand(4000, generator=g) < 0.5
    right = torch.stack([base, ~base], 1)
    table = table_of(right, torch.zeros(4000, 1), torch.where(right, 0.9, 0.01).log())
    coin = 2.0 * (torch.rand(4000, generator=g) < 0.5) - 1
    found = calibration(table, torch.stack([torch.zeros(4000), sureness * coin], 1))
    assert least <= found["calibration_error"] <= most
    assert found["calibration_positions"] == 4000


def test_calibration_is_measured_where_one_side_alone_is_right() -> None:
    from multicolm.learning.router import calibration

    right = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1]]).bool()
    table = table_of(right, torch.zeros(5, 1), torch.zeros(5, 3))
    found = calibration(table, torch.tensor([[0.0, -math.inf, math.log(3)]]).expand(5, 3))
    assert found["calibration_positions"] == 3
    assert found["calibration_error"] == pytest.approx(0.75 - 2 / 3)
