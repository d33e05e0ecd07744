"""Every selecting policy against its definition, written out in plain Python, token by token.

p[k] is model k's next-token distribution, x[k] its most likely token; ties go to the lower index.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from multicolm import Ensemble
from multicolm.backend.table import TableModel

TOKENS = ["a", "b", " c", "d", " e", "f", "."]
END = len(TOKENS) - 1
Dist = list[float]
# (distributions, writers so far) -> the writer
Rule = Callable[[list[Dist], list[int]], int]


def table(name: str, seed: int) -> TableModel:
    chance = random.Random(seed)
    rows: dict[Any, dict[str, float]] = {}
    for context in ["", *TOKENS[:-1], *((a, b) for a in TOKENS[:-1] for b in TOKENS[:-1])]:
        weights = [chance.random() ** chance.choice([1, 3, 8]) + 1e-4 for _ in TOKENS]
        weights[END] *= 0.2
        rows[context] = {t: w / sum(weights) for t, w in zip(TOKENS, weights, strict=True)}
    return TableModel(name, TOKENS, rows, ends=["."])


def top(p: Dist) -> int:
    return max(range(len(p)), key=lambda i: (p[i], -i))


def largest(values: dict[int, float]) -> int:
    return max(values, key=lambda k: (values[k], -k))


def entropy(p: Dist) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def margin(p: Dist) -> float:
    first, second = sorted(p, reverse=True)[:2]
    return first - second


def confidence(threshold: float) -> Rule:
    def rule(p: list[Dist], _: list[int]) -> int:
        if max(p[0]) >= threshold:
            return 0
        return largest({k: max(p[k]) for k in range(1, len(p))})

    return rule


def entropies(threshold: float) -> Rule:
    def rule(p: list[Dist], _: list[int]) -> int:
        if entropy(p[0]) <= threshold:
            return 0
        return largest({k: -entropy(p[k]) for k in range(1, len(p))})

    return rule


def margins(threshold: float) -> Rule:
    def rule(p: list[Dist], _: list[int]) -> int:
        if margin(p[0]) >= threshold:
            return 0
        return largest({k: margin(p[k]) for k in range(1, len(p))})

    return rule


def max_confidence(p: list[Dist], _: list[int]) -> int:
    return largest({k: max(p[k]) for k in range(len(p))})


def cosd(alpha: float, beta: float) -> Rule:
    def rule(p: list[Dist], _: list[int]) -> int:
        sure = max(p[0])
        candidates = {
            k: max(p[k])
            for k in range(1, len(p))
            if top(p[k]) != top(p[0]) and sure < alpha and max(p[k]) > beta * sure
        }
        return largest(candidates) if candidates else 0

    return rule


def nudging(threshold: float) -> Rule:
    def rule(p: list[Dist], writers: list[int]) -> int:
        if max(p[0]) < threshold:
            return 1
        begins = TOKENS[top(p[1])].startswith(" ") or top(p[1]) == END
        return 1 if writers and writers[-1] == 1 and not begins else 0

    return rule


def bild(fallback: float, rollback: float, num_small_iters: int) -> Rule:
    def rule(p: list[Dist], writers: list[int]) -> int:
        run = 0
        while run < len(writers) and writers[-1 - run] == 0:
            run += 1
        x = top(p[0])
        objects = top(p[1]) != x and -math.log(p[1][x]) > rollback
        return int(max(p[0]) < fallback or run >= num_small_iters or objects)

    return rule


RULES: list[tuple[str, dict[str, Any], Rule]] = [
    ("confidence", {"threshold": 0.35}, confidence(0.35)),
    ("confidence", {"threshold": 0.6}, confidence(0.6)),
    ("entropy", {"threshold": 1.3}, entropies(1.3)),
    ("margin", {"threshold": 0.15}, margins(0.15)),
    ("max-confidence", {}, max_confidence),
    ("cosd-rule", {"alpha": 0.5, "beta": 0.5}, cosd(0.5, 0.5)),
    ("cosd-rule", {"alpha": 0.9, "beta": 1.2}, cosd(0.9, 1.2)),
    ("nudging", {"threshold": 0.4}, nudging(0.4)),
    ("bild", {"fallback": 0.3, "rollback": 2.0, "num_small_iters": 3}, bild(0.3, 2.0, 3)),
]


def by_hand(
    models: list[TableModel], rule: Rule, prompt: str, n_tokens: int
) -> list[tuple[int, int]]:
    """(token, writer) of every written token; greedy."""
    ids = models[0].tokenizer.encode(prompt)
    written: list[tuple[int, int]] = []
    while len(written) < n_tokens and (not written or written[-1][0] != END):
        p = [model.logits_after(ids).exp().tolist() for model in models]
        writer = rule(p, [w for _, w in written])
        written.append((top(p[writer]), writer))
        ids.append(written[-1][0])
    return written


@pytest.mark.parametrize(
    ("kind", "params", "rule"), RULES, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("n_models", [2, 4])
def test_a_policy_does_what_its_definition_says(
    kind: str, params: dict[str, Any], rule: Rule, n_models: int
) -> None:
    writers: set[int] = set()
    for seed in range(6):
        models = [table(f"m{k}", 100 * seed + k) for k in range(n_models)]
        ensemble = Ensemble(models)
        prompts = ["a", "b c", "dd", "f", " e"]
        wanted = [by_hand(models, rule, prompt, 16) for prompt in prompts]
        for block_size in (1, 2, 7):
            answers = ensemble.generate(
                prompts,
                {"kind": kind, "params": params},
                max_new_tokens=16,
                schedule="block",
                block_size=block_size,
            )
            got = [[(t.id, ensemble.models.role(t.model)) for t in a.trace] for a in answers]
            assert got == wanted
        writers |= {writer for text in wanted for _, writer in text}
    # Where only one model ever writes, the comparison would say little.
    assert len(writers) >= 2
