"""Every policy against its definition, written out in plain Python, token by token.

p[k] is model k's next-token distribution; ties go to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from tables import TOKENS, random_table

from multicolm import Answer, Ensemble
from multicolm.backend.table import TableModel
from multicolm.decoding.sampling import Noise, row_key

END = len(TOKENS) - 1
Dist = list[float]
# (distributions, writers so far) -> the writer, or the distribution that they make together
Rule = Callable[[list[Dist], list[int]], int | Dist]


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
        begins = TOKENS[top(p[1])].startswith(" ") or top(p[1]) == END
        if writers and writers[-1] == 1:
            if not begins:
                return 1
            if top(p[0]) == top(p[1]):
                return 0
        return int(max(p[0]) < threshold)

    return rule


def bild(fallback: float, rollback: float, num_small_iters: int, large_first: bool = True) -> Rule:
    def rule(p: list[Dist], writers: list[int]) -> int:
        run = 0
        while run < len(writers) and writers[-1 - run] == 0:
            run += 1
        x = top(p[0])
        objects = top(p[1]) != x and -math.log(p[1][x]) > rollback
        first = large_first and not writers
        return int(max(p[0]) < fallback or run >= num_small_iters or objects or first)

    return rule


def arithmetic(*weights: float) -> Rule:
    return lambda p, _: [
        sum(w * x for w, x in zip(weights, xs, strict=True)) for xs in zip(*p, strict=True)
    ]


def geometric(*weights: float) -> Rule:
    return lambda p, _: [
        math.prod(x**w for w, x in zip(weights, xs, strict=True)) for xs in zip(*p, strict=True)
    ]


def proxy(alpha: float) -> Rule:
    return lambda p, _: [x * (y / x) ** alpha for x, y in zip(*p, strict=True)]


def contrastive(alpha: float, beta: float) -> Rule:
    def rule(p: list[Dist], _: list[int]) -> Dist:
        amateur, expert = p
        return [
            e ** (1 + beta) / a**beta if e >= alpha * max(expert) else 0.0
            for e, a in zip(expert, amateur, strict=True)
        ]

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
    (
        "bild",
        {"fallback": 0.3, "rollback": 2.0, "num_small_iters": 4, "large_first": False},
        bild(0.3, 2.0, 4, large_first=False),
    ),
    ("average", {"weights": [1, 3]}, arithmetic(0.25, 0.75)),
    ("average", {"weights": {"m1": 1, "base": 1}, "mean": "geometric"}, geometric(0.5, 0.5)),
    ("proxy-tuning", {"alpha": 1.5, "expert": "m1", "antiexpert": 0}, proxy(1.5)),
    ("contrastive", {"alpha": 0.2, "beta": 0.7}, contrastive(0.2, 0.7)),
    ("contrastive", {"alpha": 0, "beta": 2}, contrastive(0, 2)),
]
# The weights and roles of these speak of two models.
OF_TWO = ("average", "proxy-tuning", "contrastive")
CASES = [
    pytest.param(*case, n_models, id=f"{case[0]}-{n_models}")
    for case in RULES
    for n_models in (2, 4)
    if n_models == 2 or case[0] not in OF_TWO
]


def by_hand(
    models: list[TableModel], rule: Rule, prompt: str, n_tokens: int, temperature: float, seed: int
) -> list[tuple[int, int]]:
    """(token, writer) of every written token.

    A token is drawn with the noise of its place, which is all that this shares with the package.
    """
    ids = models[0].tokenizer.encode(prompt)
    key = row_key(seed, ids)
    written: list[tuple[int, int]] = []
    while len(written) < n_tokens and (not written or written[-1][0] != END):
        p = [model.logits_after(ids).exp().tolist() for model in models]
        answer = rule(p, [writer for _, writer in written])
        writer, drawn_from = (
            (answer, p[answer]) if isinstance(answer, int) else (len(models), answer)
        )
        if temperature > 0:
            noise = Noise().gumbel([key], [len(written)], len(TOKENS))[0].tolist()
            # exp(log p / T + noise), which orders tokens as log p / T + noise does
            drawn_from = [
                x ** (1 / temperature) * math.exp(g) for x, g in zip(drawn_from, noise, strict=True)
            ]
        written.append((top(drawn_from), writer))
        ids.append(written[-1][0])
    return written


def written(ensemble: Ensemble, answer: Answer) -> list[tuple[int, int]]:
    """(token, writer) of every written token; a mixture counts as the model behind the last."""
    number = {name: k for k, name in enumerate([*ensemble.models, "mixture"])}
    return [(token.id, number[token.model]) for token in answer.trace]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("kind", "params", "rule", "n_models"), CASES)
def test_a_policy_does_what_its_definition_says(
    kind: str, params: dict[str, Any], rule: Rule, n_models: int, temperature: float
) -> None:
    writers: set[int] = set()
    for seed in range(2):
        models = [random_table(f"m{k}", 100 * seed + k) for k in range(n_models)]
        ensemble = Ensemble(models)
        prompts = ["a", "b c", "dd", "f", " e"]
        wanted = [by_hand(models, rule, p, 16, temperature, seed) for p in prompts]
        for block_size, batch_size in ((1, 16), (2, 3), (8, 16)):
            answers = ensemble.generate(
                prompts,
                {"kind": kind, "params": params},
                max_new_tokens=16,
                temperature=temperature,
                seed=seed,
                schedule="block",
                block_size=block_size,
                batch_size=batch_size,
            )
            assert [written(ensemble, answer) for answer in answers] == wanted
        writers |= {writer for text in wanted for _, writer in text}
    # Where only one model ever writes, the comparison would say little.
    assert len(writers) >= 2 or writers == {n_models}
