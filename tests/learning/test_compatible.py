"""Which models are worth adding up for a task: UniTE's "determine" stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import multicolm
from multicolm.calibration.queries import train_on_answers
from multicolm.cli import main
from multicolm.errors import ConfigError, TrainingError
from multicolm.evaluation.task import load_task
from multicolm.learning.compatible import CompatibleSettings, compatible_models
from multicolm.learning.queries import JudgedAnswers
from multicolm.learning.training import Training
from multicolm.policy.unite import UnitePolicy
from multicolm.training.checkpoint import Checkpoint


def judged(right: list[int], lengths: list[int], n: int = 20) -> JudgedAnswers:
    """Of n questions each model answers so many, at these lengths."""
    names = tuple(f"m{k}" for k in range(len(right)))
    quality = (torch.arange(n)[:, None] < torch.tensor(right)).float()
    each = torch.tensor(lengths).expand(n, -1)
    return JudgedAnswers(names, names, (1.0,) * len(names), torch.zeros(n, 0), quality, each)


@pytest.mark.parametrize(
    ("right", "lengths", "chosen"),
    [
        ([16, 14, 13], [40, 40, 40], ["m0", "m1"]),  # .8, .7, .65: the second is .1 worse
        ([13, 16, 14], [40, 40, 40], ["m1", "m2"]),
        ([16, 16, 16], [40, 80, 81], ["m0", "m1"]),
        ([16, 16, 16], [40, 20, 19], ["m0", "m1"]),
        ([16, 2, 2], [40, 40, 40], ["m0"]),
        ([0, 0, 0], [40, 40, 40], ["m0", "m1", "m2"]),
        ([16, 16], [0, 0], ["m0", "m1"]),
        ([16, 16], [5, 0], ["m0"]),
    ],
)
def test_models_of_like_quality_and_length_are_added_up(
    right: list[int], lengths: list[int], chosen: list[str]
) -> None:
    found, report = compatible_models(judged(right, lengths), CompatibleSettings())
    assert found == chosen
    assert report["quality_alone"]["m0"] == pytest.approx(right[0] / 20)
    assert ("note" in report) == (len(chosen) == 1)


def test_unite_gives_the_models_that_fit_equal_weights_and_never_runs_others() -> None:
    answers = judged([16, 15, 2], [40, 40, 40])
    fitted = UnitePolicy(top_k=5).fit_answers(answers, training := Training({}))
    assert fitted.weights == {"m0": 1.0, "m1": 1.0, "m2": 0.0}
    assert fitted.top_k == 5
    assert training.report["models"] == "m0, m1"
    models = multicolm.views.ModelNames(["m0", "m1", "m2"])
    assert fitted.uses(models) == {0, 1}
    wide = UnitePolicy().fit_answers(answers, Training({"gap": 1}))
    assert wide.uses(models) == {0, 1, 2}
    with pytest.raises(ConfigError, match="gap"):
        UnitePolicy().fit_answers(answers, Training({"gap": 2}))
    with pytest.raises(TrainingError, match="no judged answers"):
        UnitePolicy().fit_answers(judged([1, 1], [1, 1], n=0), Training({}))


def test_the_command_line_determines_the_models_of_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_text('{"q": "What is 2 * 3 =", "a": "6"}\n')
    (tmp_path / "sums.yaml").write_text(
        'data: {train: train.jsonl}\nprompt: "{q}"\ngold: "{a}"\nmax_new_tokens: 4\n'
        "metric: {kind: contains}\n"
    )
    out = tmp_path / "fits"
    argv = ["train", "tiny", "--task", str(tmp_path / "sums.yaml"), "--policy", "unite"]
    assert main([*argv, "--out", str(out)]) == 0
    assert "quality alone" in capsys.readouterr().out
    policy = Checkpoint.from_pretrained(out).policy
    assert isinstance(policy, UnitePolicy) and isinstance(policy.weights, dict)
    ensemble = multicolm.load("tiny")
    assert set(policy.weights) == set(ensemble.models)
    [answer] = ensemble.generate(["What is 2 * 3 ="], policy, max_new_tokens=3)
    assert len(answer.trace) > 0
    # The base model needs no hidden states for that, and no prompt is read for it.
    report = train_on_answers(
        ensemble, UnitePolicy(), load_task(tmp_path / "sums.yaml"), out
    ).provenance["train"]["report"]
    assert report["prompts"] == 1
