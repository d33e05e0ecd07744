"""How many CPU threads torch uses while text is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from multicolm.backend.base import Model

__all__ = ["torch_threads"]

# Decoding one token is a few matrix-vector products. Up to this size a second thread gains nothing
# for them, and on a shared machine its barriers were measured to cost ten to hundreds of times.
SMALL_MODEL = 300_000_000


@contextmanager
def torch_threads(models: Sequence[Model], threads: int | None) -> Iterator[None]:
    """Set torch's thread count for a while.

    Args:
        models: the models that will run.
        threads: the number wanted; ``None`` for one thread if every model is small and on the
            CPU, and torch's own setting otherwise.
    """
    before = torch.get_num_threads()
    if threads is None:
        small = all(model.on_cpu and model.n_parameters <= SMALL_MODEL for model in models)
        threads = 1 if small else before
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
