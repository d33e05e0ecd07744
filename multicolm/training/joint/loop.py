"""The steps of joint training: several processes share each batch, and a stop costs little."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim

from multicolm.errors import ConfigError, TrainingError
from multicolm.learning.snapshots import Snapshots, load_optimizer, optimizer_tensors
from multicolm.training.joint.data import Lessons, Text, batches
from multicolm.training.joint.model import JointModel, joint_loss

__all__ = ["Losses", "Schedule", "Trainer", "open_accelerator"]

# Keeping the state may take this part of the time: that of a large model takes minutes to write.
_PART_FOR_STATES = 0.05


@dataclass(frozen=True)
class Schedule:
    """How the loop goes; see :class:`multicolm.training.joint.job.JointSettings`."""

    lr: float
    head_lr: float
    epochs: int
    batch_size: int
    batch_tokens: int
    warmup: float
    weight_decay: float
    clip: float
    patience: int
    seed: int
    save_every: float

    def factor(self, step: int, n_steps: int) -> float:
        """The part of the learning rate at a step (from 0): up in a line, then down to zero."""
        n_up = math.ceil(self.warmup * n_steps)
        if step < n_up:
            return (step + 1) / n_up
        return (n_steps - step) / max(1, n_steps - n_up)


@dataclass(frozen=True)
class Losses:
    """Means over some texts, in nats per token.

    Attributes:
        joint: of the joint model.
        base: of the base model alone, where it can write the token.
    """

    joint: float
    base: float


@dataclass
class _Course:
    """How far a training is.

    Attributes:
        epoch: that is at work, from 0.
        step: of this epoch that comes next.
        before: the losses when it began.
        smoothed: the steps' losses, each a tenth of it, to see divergence.
        epoch_loss: sum over the positions of this epoch so far, in nats.
        epoch_positions: how many these are.
        best_loss: of the epochs that are done.
        best_epoch: that it is of, from 1.
        history: per epoch its mean loss, and those on held-out texts.
        finished: whether nothing is left to do.
    """

    before: dict[str, float]
    smoothed: float
    epoch: int = 0
    step: int = 0
    epoch_loss: float = 0.0
    epoch_positions: int = 0
    best_loss: float | None = None
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


def open_accelerator(mixed_precision: str | None) -> Any:
    """What spreads the work over the processes of ``accelerate launch``; one process without.

    Raises:
        ConfigError: if it was set up for something that the state of a training does not cover.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        raise ConfigError(f"mixed_precision: {' '.join(str(error).split())}") from error
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"accelerate is set to mixed precision '{accelerator.mixed_precision}'; allowed are "
            "no and bf16 (`accelerate launch --mixed_precision bf16`, or the option "
            "mixed_precision)."
        )
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise ConfigError(
            f"accelerate is set to {accelerator.distributed_type.value}; joint training runs on "
            "one process, or data parallel on several: `accelerate launch --multi_gpu`."
        )
    return accelerator


class Trainer:
    """Trains the base model and the head together.

    Args:
        model: both, with the weights that they begin with.
        lessons: what they learn from.
        schedule: how.
        accelerator: of :func:`open_accelerator`.
        snapshots: keeps the state.
        on_progress: called after each step.
    """

    def __init__(
        self,
        model: JointModel,
        lessons: Lessons,
        schedule: Schedule,
        accelerator: Any,
        snapshots: Snapshots,
        on_progress: Callable[[float, float, str], None],
    ) -> None:
        self._model = model
        self._lessons = lessons
        self._schedule = schedule
        self._accelerator = accelerator
        self._snapshots = snapshots
        self._on_progress = on_progress
        self._steps = math.ceil(len(lessons.learnt) / schedule.batch_size)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._best: dict[str, Tensor] = {}
        self._wrapped, self._optimizer = accelerator.prepare(model, self._fresh_optimizer())
        self._saved_at, self._save_took = time.monotonic(), 0.0

    def _fresh_optimizer(self) -> optim.AdamW:
        of_head = {n for n in self._trained if n.startswith("head.")}
        schedule = self._schedule
        groups: list[dict[str, Any]] = [
            {
                "params": [p for n, p in self._trained.items() if n not in of_head],
                "peak": schedule.lr,
                "weight_decay": schedule.weight_decay,
            },
            {
                "params": [p for n, p in self._trained.items() if n in of_head],
                "peak": schedule.head_lr,
                "weight_decay": 0.0,
            },
        ]
        return optim.AdamW([group for group in groups if group["params"]], lr=schedule.lr)

    @property
    def n_trained(self) -> int:
        """Number of weights that are trained."""
        return sum(parameter.numel() for parameter in self._trained.values())

    def run(self) -> dict[str, Any]:
        """Train to the end, and leave the best epoch's weights in the model.

        A stopped training resumes from its last state; on one process it ends with the
        same bytes. The best epoch is that with the least joint loss on held-out texts, or on the
        texts themselves if none are held out.

        Returns:
            A report: ``before`` (:class:`Losses`), ``epoch`` that was kept, ``history``.

        Raises:
            TrainingError: if the loss is no number, or grows without bound.
        """
        course = self._resumed() or self._begun()
        self._accelerator.wait_for_everyone()  # nobody writes a state that others still read
        while not course.finished:
            for step, texts in enumerate(self._order(course.epoch)):
                if step >= course.step:
                    self._step(course, texts)
            self._finish_epoch(course)
            self._save(course)
        with torch.no_grad():
            for name, tensor in self._best.items():
                self._trained[name].copy_(tensor)
        return {
            "before": Losses(**course.before),
            "epoch": course.best_epoch,
            "history": course.history,
        }

    def _begun(self) -> _Course:
        before = self.measure(self._lessons.judged)
        return _Course(before=asdict(before), smoothed=before.joint)

    def _order(self, epoch: int) -> Iterator[Sequence[Text]]:
        """The batches of an epoch; the seed alone shuffles them."""
        texts, size = self._lessons.learnt, self._schedule.batch_size
        generator = torch.Generator().manual_seed(self._mixed(epoch, 0))
        order = torch.randperm(len(texts), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [texts[number] for number in order[start : start + size]]

    def _mixed(self, epoch: int, step: int) -> int:
        return (self._schedule.seed * 1_000_003 + epoch * 100_003 + step) & 0x7FFFFFFF

    def _step(self, course: _Course, texts: Sequence[Text]) -> None:
        """One step of the optimizer, on all positions of some texts."""
        accelerator = self._accelerator
        number, total = (
            course.epoch * self._steps + course.step,
            self._schedule.epochs * self._steps,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule.factor(number, total)
        n_positions = sum(len(text.rows) for text in texts)
        self._wrapped.train(True)
        with self._seeded(self._mixed(course.epoch, course.step + 1)):
            own = self._backward(texts, n_positions)
        loss = float(self._summed(own)) / n_positions
        norm = accelerator.clip_grad_norm_(list(self._trained.values()), self._schedule.clip)
        course.smoothed += 0.1 * (loss - course.smoothed)
        self._refuse_divergence(course, loss, float(norm))
        self._optimizer.step()
        self._optimizer.zero_grad()
        course.epoch_loss += loss * n_positions
        course.epoch_positions += n_positions
        course.step += 1
        self._on_progress(number + 1, total, f"epoch {course.epoch + 1}: {loss:.3f} nats a token")
        if time.monotonic() - self._saved_at >= self._seconds_between_states:
            self._save(course)

    @property
    def _seconds_between_states(self) -> float:
        wanted = self._schedule.save_every
        return max(wanted, self._save_took / _PART_FOR_STATES) if wanted else 0.0

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Dropout that depends on the step alone, not on where a training was taken up again."""
        device = self._accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self._accelerator.process_index)
            yield

    def _backward(self, texts: Sequence[Text], n_positions: int) -> Tensor:
        """The gradients of this process's share, and the sum of its losses in nats."""
        accelerator = self._accelerator
        rank, n_ranks = accelerator.process_index, accelerator.num_processes
        # Gradients are exchanged in the last pass of a process, so each needs one at least; where
        # there is no text left for it, that of another counts for nothing.
        share = texts[rank::n_ranks]
        weight = 1.0 if share else 0.0
        table, budget = self._lessons.table, self._schedule.batch_tokens
        parts = list(batches(table, share or texts[:1], budget))
        total = torch.zeros((), dtype=torch.float64)
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else accelerator.no_sync(self._wrapped):
                loss, _ = self._losses(self._wrapped, part.to(accelerator.device))
                # Processes' gradients are averaged; over all positions it is a sum that is wanted.
                accelerator.backward(loss.sum() * (weight * n_ranks / n_positions))
            total += weight * loss.detach().cpu().double().sum()
        return total

    def _summed(self, numbers: Tensor) -> Tensor:
        """The sum over the processes."""
        if self._accelerator.num_processes == 1:
            return numbers
        summed: Tensor = self._accelerator.reduce(numbers.to(self._accelerator.device), "sum")
        return summed.cpu()

    def _losses(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Of each position: the joint loss, and the base model's log-probability, in nats."""
        logprobs, scores = model(
            batch.input_ids, batch.attention_mask, batch.lines, batch.columns, batch.gold
        )
        return joint_loss(logprobs, scores, batch), logprobs

    def _refuse_divergence(self, course: _Course, loss: float, norm: float) -> None:
        start = course.before["joint"]
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and course.smoothed <= 3 * start + 3:
            return
        what = f"the loss is {loss:.3g}" if finite or not math.isfinite(loss) else "a gradient"
        what += "" if finite or not math.isfinite(loss) else " is no number"
        raise TrainingError(
            f"{what} in step {course.step + 1} of epoch {course.epoch + 1} (the loss was "
            f"{start:.3g} at the start); training diverges: lower lr ({self._schedule.lr:g}) or "
            f"head_lr ({self._schedule.head_lr:g})."
        )

    @torch.no_grad()
    def measure(self, texts: Sequence[Text]) -> Losses:
        """The losses on some texts, as the models are now; the processes share the work.

        Raises:
            TrainingError: if the loss is no number.
        """
        accelerator = self._accelerator
        self._model.train(False)
        sums = torch.zeros(4, dtype=torch.float64)
        share = texts[accelerator.process_index :: accelerator.num_processes]
        for batch in batches(self._lessons.table, share, self._schedule.batch_tokens):
            loss, logprobs = self._losses(self._model, batch.to(accelerator.device))
            alone = logprobs[logprobs > float("-inf")].cpu().double()
            sums[0] += loss.cpu().double().sum()
            sums[1] += len(loss)
            sums[2] -= alone.sum()
            sums[3] += len(alone)
        joint, n, base, n_alone = self._summed(sums).tolist()
        if not math.isfinite(joint):
            raise TrainingError(
                f"the loss is {joint:.3g} on {len(texts)} texts; the base model computes in "
                f"{self._model.base.dtype}: try another `dtype`, or lower lr."
            )
        return Losses(joint / n, base / max(n_alone, 1.0))

    def _finish_epoch(self, course: _Course) -> None:
        losses = None
        judged = mean = course.epoch_loss / course.epoch_positions
        if self._lessons.held_out:
            losses = self.measure(self._lessons.held_out)
            judged = losses.joint
        course.history.append(
            {"loss": mean, "held_out": None if losses is None else asdict(losses)}
        )
        if course.best_loss is None or judged < course.best_loss:
            course.best_loss, course.best_epoch = judged, course.epoch + 1
            self._best = {n: p.detach().cpu().clone() for n, p in self._trained.items()}
        course.epoch, course.step = course.epoch + 1, 0
        course.epoch_loss, course.epoch_positions = 0.0, 0
        patience = self._schedule.patience
        tired = patience > 0 and course.epoch - course.best_epoch >= patience
        course.finished = tired or course.epoch == self._schedule.epochs

    def _save(self, course: _Course) -> None:
        """Keep the state, so that a stopped training resumes from here."""
        if not self._accelerator.is_main_process:
            return
        begun = time.monotonic()
        tensors: dict[str, Tensor] = {f"weights.{n}": p for n, p in self._trained.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        tensors |= optimizer_tensors(self._optimizer.optimizer)
        self._snapshots.save(tensors, asdict(course))
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - begun

    @torch.no_grad()
    def _resumed(self) -> _Course | None:
        state = self._snapshots.load()
        if state is None:
            return None
        tensors, facts = state
        for name, parameter in self._trained.items():
            parameter.copy_(tensors[f"weights.{name}"])
            if f"best.{name}" in tensors:
                self._best[name] = tensors[f"best.{name}"]
        load_optimizer(self._optimizer.optimizer, tensors)
        return _Course(**facts)
