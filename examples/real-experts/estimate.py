"""How long a run will take, from a few seconds of measuring this machine.

    python examples/real-experts/estimate.py BASE

prints JSON: per dtype, tokens per second of training and of reading, and seconds of a decode step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from adapters import Training
from plan import TEXTS, Plan

_READ: Final = (8, 128)


@dataclass(frozen=True)
class Speed:
    """What one model does on this machine.

    Attributes:
        trained: tokens per second of adapter training, with as many threads as are set.
        read: tokens per second of reading prompts.
        step_s: seconds of one decode step of `TEXTS` texts.
    """

    trained: float
    read: float
    step_s: float


def measure(base: Path, dtype: torch.dtype, device: str) -> Speed:
    """A few training steps, a few passes over prompts, a few decode steps."""
    plan = Plan(steps=100)
    training = Training(base, plan, dtype, device)
    size = training.model.config.vocab_size
    batch = torch.randint(size, (plan.rows, plan.row_tokens)).expand(2, -1, -1)
    train_s = _seconds(lambda: training.learn(batch), device)
    model = training.model.get_base_model()
    with torch.inference_mode():
        prompts = torch.randint(size, _READ, device=device)
        read_s = _seconds(lambda: model(prompts, logits_to_keep=1), device)
        texts = torch.randint(size, (TEXTS, 1), device=device)
        step_s = _seconds(lambda: model(texts, use_cache=False), device)
    return Speed(batch[0].numel() / train_s, prompts.numel() / read_s, step_s)


def _seconds(work: Callable[[], object], device: str) -> float:
    """The fastest of three, after one that is not counted."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(base: str) -> None:
    """Measure both dtypes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    speeds = {name: asdict(measure(Path(base), dtype, device)) for name, dtype in dtypes.items()}
    print(json.dumps(speeds))


if __name__ == "__main__":
    main(sys.argv[1])
