"""Score tables that something can be learned from, and a training that is stopped."""

from __future__ import annotations

import torch

from multicolm.score_table import ScoreTable
from multicolm.views import ModelNames


def world(n_models: int = 3, n: int = 300, seed: int = 0, noise: float = 0.3) -> ScoreTable:
    """Positions whose hidden state says which model is right, four to a text."""
    g = torch.Generator().manual_seed(seed)
    right = torch.randint(n_models, (n,), generator=g)
    logprobs = torch.full((n, n_models), -4.0)
    logprobs[range(n), right] = -0.1
    top1 = torch.full((n, n_models), 6)
    top1[range(n), right] = 5
    hidden = torch.randn(n, 6, generator=g) * noise
    hidden[range(n), right] += 1.0
    zeros = torch.zeros(n, n_models)
    return ScoreTable(
        models=ModelNames([f"m{k}" for k in range(n_models)]),
        gold_ids=torch.full((n,), 5),
        gold_logprobs=logprobs,
        known=torch.ones(n, n_models).bool(),
        top1_ids=top1,
        top1_logprobs=zeros,
        entropies=zeros,
        margins=zeros,
        example=torch.arange(n) // 4,
        place=torch.arange(n) % 4,
        base={"hidden": hidden},
        identities=tuple(f"id{k}" for k in range(n_models)),
        digest="d",
    )


def hidden(part: ScoreTable) -> torch.Tensor:
    return part.feature("hidden")


class Stop(Exception):
    pass


def stopping(after: int):
    calls = 0

    def stop(done: float, total: float, label: str) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    return stop
