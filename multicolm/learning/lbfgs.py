"""Trains a linear head by L-BFGS with a ridge penalty: nothing to set, whatever width and data.

The objective is the mean loss plus l2 / 2 times the squared norm of the weights for standardised
features (the bias is free). It is minimised over the whole table, which is read once for each
evaluation. A step size is found by line search, so there is no learning rate. What is kept is the
iterate with the least loss on held-out texts.

The penalty is found on held-out texts, too: first the one that suits the number of features and of
positions, then weaker and stronger ones. Another one is taken only if it is better by more than the
standard error of the difference, so that few held-out texts choose nothing by chance.

The marginal likelihood is not convex. Where a strong penalty keeps pi from telling positions apart,
its optimum can have pi_k = 0, whose gradient is zero too: whoever goes on from there stays there.
Each l2 therefore begins at the optimum of the convex stages before (weak labels) at that same l2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from multicolm.errors import TrainingError
from multicolm.learning.networks import router_scores
from multicolm.learning.problem import Fitted, Problem, Stage
from multicolm.learning.snapshots import Snapshots

__all__ = ["fit_linear", "usual_penalty"]

_GAIN = 1e-3
"""Nats that a weaker or stronger penalty must gain; the second that does not is the last one."""

_PLANNED = 10
"""Penalties that a search usually tries, for its progress."""

_RANGE = 1e-9, 1e4
"""Of penalties: beyond them nothing changes any more."""

_SMALL = 1e-4
"""Of the objective: an iteration that gains less, twice in a row, ends a stage."""


def usual_penalty(n_features: int, n_positions: int) -> float:
    """The penalty that suits a table: 0.1 times features per position.

    It is that of a Gaussian prior on the weights whose variance is 10 over their number, so that
    scores of standardised, independent features have a variance of 10.
    """
    return 0.1 * n_features / n_positions


def fit_linear(
    network: nn.Module,
    problem: Problem,
    stages: Sequence[Stage],
    penalty: float | None,
    patience: int,
    save_every: float,
    snapshots: Snapshots,
    on_progress: Callable[[float, float, str], None],
) -> Fitted:
    """Minimise the last stage's loss, from the optimum of those before.

    A stopped training resumes from its last state and ends with the same bytes.

    Args:
        network: linear, with the weights that it begins with; trained in place.
        problem: what it learns from.
        stages: ``epochs`` are the most iterations for each penalty; one takes a pass or two.
        penalty: l2; found on held-out texts if not given, :func:`usual_penalty` if there are none.
        patience: iterations without a better held-out loss that end a penalty; 0 never does.
        save_every: seconds between two states; 0 keeps every state.
        snapshots: keeps the state.
        on_progress: called after each iteration.

    Raises:
        TrainingError: if the loss is no number.
    """
    path = _Path(network, problem, [s for s in stages if s.epochs], penalty, patience)
    state = snapshots.load()
    if state is not None:
        path.resume(*state)
    saved_at = time.monotonic()
    while path.step():
        if time.monotonic() - saved_at >= save_every:
            snapshots.save(*path.state())
            saved_at = time.monotonic()
        on_progress(*path.progress())
    on_progress(path.progress()[1], path.progress()[1], "done")
    return path.fitted


@dataclass
class _Course:
    """Where a training is.

    Attributes:
        left: penalties to come, the first of them at work.
        phase: which penalties are tried: the ``weaker`` ones, then ``stronger`` ones, then those
            ``near`` the one that was kept.
        idle: penalties of this phase that gained next to nothing.
        stage: at work.
        iteration: of it that comes next, from 0.
        waited: iterations without a better loss for this penalty.
        small: iterations in a row that gained next to nothing.
        objective: after the last iteration.
        best: of this penalty: its least loss.
        best_epoch: the iteration that it is of, from 1.
        history: of this penalty.
        loss: mean loss over the table without the penalty, at the last evaluation.
    """

    left: list[float]
    phase: str = "weaker"
    idle: int = 0
    stage: int = 0
    iteration: int = 0
    waited: int = 0
    small: int = 0
    objective: float | None = None
    best: float | None = None
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    loss: float = math.inf


class _Path:
    """One penalty after the other."""

    def __init__(
        self,
        network: nn.Module,
        problem: Problem,
        stages: list[Stage],
        penalty: float | None,
        patience: int,
    ) -> None:
        self._network = network.to(problem.device)
        self._problem = problem
        self._stages = stages
        self._patience = patience
        self._weight, self._bias = network.parameters()
        self._n = len(problem.parts.learnt)
        self._searches = penalty is None and len(problem.parts.judged) > 0
        usual = usual_penalty(self._weight.shape[1], self._n)
        self.course = _Course([usual if penalty is None else penalty])
        self._by_text = torch.zeros(0)  # the kept iterate's held-out losses
        self.fitted = Fitted(0, {})
        self._start = self._now()  # where the guiding stages of the next penalty begin
        self._optimizer = self._fresh_optimizer()
        self._last: tuple[Tensor, Tensor, list[Tensor], float] | None = None

    def _now(self) -> Tensor:
        return parameters_to_vector(self._network.parameters()).detach().clone()

    def _fresh_optimizer(self) -> optim.LBFGS:
        return optim.LBFGS(
            self._network.parameters(),
            max_iter=1,
            max_eval=25,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

    def step(self) -> bool:
        """One iteration; false if there is nothing left to do."""
        course = self.course
        if not course.left:
            return False
        stage = self._stages[course.stage]
        before = course.objective
        self._optimizer.step(self._evaluate)  # type: ignore[no-untyped-call]
        after = float(self._evaluate())
        if not math.isfinite(after):
            raise TrainingError(
                f"the loss is {after:.3g} in iteration {course.iteration + 1} of '{stage.name}'; "
                "train with the option solver=adamw and a low lr."
            )
        course.iteration += 1
        little = before is not None and before - after < _SMALL * abs(after)
        course.small = course.small + 1 if little else 0
        course.objective = after
        last = course.stage == len(self._stages) - 1
        judged = self._judge() if last else None
        course.history.append({"stage": stage.name, "loss": course.loss, "held_out": judged})
        # The first steps are rough: L-BFGS knows nothing of the curvature yet.
        settled = course.iteration >= 2 * self._patience > 0
        tired = last and settled and course.waited >= self._patience
        if course.small >= 2 or course.iteration == stage.epochs or tired:
            self._end_stage("held-out loss" if tired else "converged")
        return bool(course.left)

    def _evaluate(self) -> Tensor:
        """The objective and its gradients, over the whole table."""
        at = self._now()
        if self._last is not None and torch.equal(self._last[0], at):
            _, objective, gradients, self.course.loss = self._last
            for parameter, gradient in zip(self._network.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            return objective
        losses = self._stages[self.course.stage].losses
        self._optimizer.zero_grad()
        total = 0.0
        with torch.enable_grad():
            for inputs, part in self._problem.batches(self._problem.parts.learnt):
                scores = router_scores(self._network, inputs)
                loss = losses(scores, part).sum() / self._n
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            penalty = self.course.left[0] / 2 * self._weight.square().sum()
            penalty.backward()  # type: ignore[no-untyped-call]
        objective = (penalty.detach() + total).cpu()
        gradients = [p.grad.clone() for p in self._network.parameters() if p.grad is not None]
        self._last = (at, objective, gradients, total)
        self.course.loss = total
        return objective

    def _judge(self) -> float:
        """The held-out loss of the present weights, which are kept if they are the best."""
        course, fitted = self.course, self.fitted
        judged, by_text = course.loss, torch.zeros(0)
        if len(self._problem.parts.judged):
            by_text = self._problem.held_out_by_text(self._network)
            judged = float(by_text.sum()) / len(self._problem.parts.judged)
        course.waited += 1
        if course.best is None or judged < course.best:
            course.best, course.best_epoch, course.waited = judged, course.iteration, 0
        if self._is_better(judged, by_text):
            fitted.loss, fitted.epoch = judged, course.iteration
            fitted.settings = {"l2": course.left[0]}
            fitted.tensors = {
                name: tensor.detach().clone() for name, tensor in self._network.state_dict().items()
            }
            self._by_text = by_text
        return judged

    def _is_better(self, loss: float, by_text: Tensor) -> bool:
        """Than what is kept; of another penalty, by more than a standard error over texts."""
        fitted = self.fitted
        if not fitted.tensors or fitted.settings["l2"] == self.course.left[0]:
            return loss < fitted.loss
        gain = self._by_text - by_text
        if len(gain) < 2:
            return False
        error = float(gain.std()) * math.sqrt(len(gain))
        return float(gain.sum()) > error

    def _end_stage(self, why: str) -> None:
        course, fitted = self.course, self.fitted
        cut = course.iteration == self._stages[course.stage].epochs
        self._optimizer, self._last = self._fresh_optimizer(), None
        course.iteration = course.waited = course.small = 0
        course.objective = None
        course.stage += 1
        if course.stage == len(self._stages) - 1:
            self._start = self._now()
        if course.stage < len(self._stages):
            return
        l2 = course.left.pop(0)
        best = math.inf if course.best is None else course.best
        stopped = "epochs" if cut and course.best_epoch == self._stages[-1].epochs else why
        fitted.search.append(
            {"l2": l2, "loss_nats": best, "epoch": course.best_epoch, "stopped": stopped}
        )
        if fitted.settings.get("l2") == l2:
            fitted.stopped, fitted.history = stopped, course.history
        course.stage, course.best, course.best_epoch, course.history = 0, None, 0, []
        self._choose_next(l2)
        if len(self._stages) > 1:
            vector_to_parameters(self._start, self._network.parameters())

    def _choose_next(self, l2: float) -> None:
        """The penalty to try after one that is finished."""
        course, search = self.course, self.fitted.search
        if not self._searches or course.phase == "near":
            return
        before = [tried["loss_nats"] for tried in search[:-1]]
        if before and search[-1]["loss_nats"] > min(before) - _GAIN:
            course.idle += 1
        following = l2 / 10 if course.phase == "weaker" else l2 * 10
        if course.idle < 2 and _RANGE[0] <= following <= _RANGE[1]:
            course.left = [following]
        elif course.phase == "weaker":
            course.phase, course.idle = "stronger", 0
            course.left = [search[0]["l2"] * 10]
        else:
            kept = self.fitted.settings["l2"]
            course.phase, course.left = "near", [kept * 10**0.5, kept / 10**0.5]

    def progress(self) -> tuple[float, float, str]:
        """How much is done, of how much, and what is being done."""
        course = self.course
        each = sum(stage.epochs for stage in self._stages)
        total = each * (_PLANNED if self._searches else 1)
        n_finished = len(self.fitted.search)
        begun = sum(stage.epochs for stage in self._stages[: course.stage]) + course.iteration
        name = self._stages[min(course.stage, len(self._stages) - 1)].name
        what = f"l2 {course.left[0]:.3g}: {name}" if course.left else "done"
        return min(n_finished * each + begun, total), total, what

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it takes to resume from here."""
        kept = self._optimizer.state_dict()["state"].get(0, {})
        tensors, numbers = _flat(kept)
        tensors |= {"now": self._now(), "start": self._start, "by_text": self._by_text}
        tensors |= {f"best.{name}": tensor for name, tensor in self.fitted.tensors.items()}
        facts = {"lbfgs": numbers, "course": asdict(self.course), "best": self.fitted.facts()}
        return tensors, facts

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on after a state."""
        self.course = _Course(**facts["course"])
        self.fitted = Fitted.restored("best.", tensors, facts["best"])
        self._by_text = tensors["by_text"]
        self._start = tensors["start"].to(self._problem.device)
        now = tensors["now"].to(self._problem.device)
        vector_to_parameters(now.clone(), self._network.parameters())
        kept = _unflat(tensors, facts["lbfgs"])
        if kept:
            whole = self._optimizer.state_dict()
            self._optimizer.load_state_dict({**whole, "state": {0: kept}})


def _flat(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an L-BFGS optimizer: its tensors by name, and the rest for JSON."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"lbfgs.{name}"] = value
        elif name == "al":
            continue  # Room that every iteration fills anew.
        elif isinstance(value, list):
            rest[name] = len(value)
            tensors |= {f"lbfgs.{name}.{n}": item for n, item in enumerate(value)}
        else:
            rest[name] = value
    return tensors, rest


def _unflat(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`_flat`."""
    state: dict[str, Any] = {}
    for name, value in rest.items():
        listed = name in ("old_dirs", "old_stps", "ro")
        state[name] = [tensors[f"lbfgs.{name}.{n}"] for n in range(value)] if listed else value
    for name, tensor in tensors.items():
        if name.startswith("lbfgs.") and name.count(".") == 1:
            state[name.removeprefix("lbfgs.")] = tensor
    return state
