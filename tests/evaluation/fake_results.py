"""A comparison and traces as a real run would write them, with the oddities that must not hurt."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from multicolm.evaluation.findings import findings
from multicolm.evaluation.results import (
    Comparison,
    ModelUse,
    RowKind,
    RowResult,
    ShownToken,
    TracedAnswer,
)
from multicolm.types import MIXTURE

MODELS = ("generalist", "facts", "sums")
COSTS = (1.0, 2.5, 2.5)
N_QUESTIONS = 120

# name, kind, of, quality, shares (base, facts, sums), cost, tokens per second, p-value
_Row = tuple[str, RowKind, str, float, tuple[float, float, float], float, float, float]
_ROWS: Sequence[_Row] = (
    ("generalist", "model", "", 0.233, (1.0, 0.0, 0.0), 1.02, 412.6, 0.0001),
    ("facts", "model", "", 0.417, (0.0, 1.0, 0.0), 2.55, 188.1, 1.0),
    ("sums", "model", "", 0.308, (0.0, 0.0, 1.0), 2.56, 190.4, 0.021),
    ("confidence", "policy", "", 0.742, (0.71, 0.18, 0.11), 2.31, 171.3, 0.0001),
    ("confidence at random", "random", "confidence", 0.283, (0.71, 0.18, 0.11), 2.4, 168.0, 0.012),
    ("confidence threshold=0.2", "sweep", "confidence", 0.408, (0.93, 0.05, 0.02), 1.3, 290.0, 0.9),
    ("confidence threshold=0.4", "sweep", "confidence", 0.60, (0.83, 0.11, 0.06), 1.7, 231.0, 4e-3),
    ("confidence threshold=0.8", "sweep", "confidence", 0.75, (0.52, 0.29, 0.19), 3.4, 121.0, 1e-4),
    ("cosd-rule", "policy", "", 0.800, (0.66, 0.20, 0.14), 6.05, 96.4, 0.00002),
    ("average", "policy", "", 0.525, (0.0, 0.0, 0.0), 6.00, 92.7, 0.06),
    ("per-question oracle", "oracle", "", 0.583, (), 0.0, 0.0, 0.00001),
    ("oracle", "oracle", "", 0.892, (), 0.0, 0.0, 0.00001),
)  # fmt: skip


def _interval(quality: float) -> tuple[float, float]:
    half = 1.96 * math.sqrt(quality * (1 - quality) / N_QUESTIONS)
    return max(0.0, quality - half), min(1.0, quality + half)


def _row(
    name: str,
    kind: RowKind,
    of: str,
    quality: float,
    shares: tuple[float, ...],
    cost: float,
    speed: float,
    p_value: float,
) -> RowResult:
    n_tokens = 0 if kind == "oracle" else 4_812 + 7 * len(name)
    low, high = _interval(quality)
    best = name == "facts"
    asked = [cost / 6 if share == 0 and kind != "model" else share for share in shares]
    uses = tuple(
        ModelUse(
            model=model,
            tokens_written=round(share * n_tokens),
            share=share,
            forwards=round(n_tokens * min(1.0, ask * 1.3) / 8),
            tokens_read=round(n_tokens * min(1.0, ask * 1.3)) * 3,
            seconds=round(n_tokens * ask / 260, 3),
        )
        for model, share, ask in zip(MODELS, shares, asked, strict=False)
    )
    gain = quality - 0.417
    return RowResult(
        name=name,
        kind=kind,
        policy=None if kind == "oracle" else {"kind": name.split()[0], "params": {}},
        n_questions=N_QUESTIONS,
        quality=quality,
        low=low,
        high=high,
        gain=None if best else gain,
        gain_low=None if best else gain - 0.09,
        gain_high=None if best else gain + 0.09,
        p_value=None if best else p_value,
        p_holm=min(1.0, 3 * p_value) if kind == "policy" else None,
        p_question_oracle=p_value / 2 if kind == "policy" else None,
        n_cut_off=None if kind == "oracle" else 3 * (name == "cosd-rule"),
        n_shared=None if kind == "oracle" else N_QUESTIONS * (kind != "model"),
        uses=uses,
        n_tokens=n_tokens,
        n_mixed=n_tokens if name == "average" else 0,
        seconds=n_tokens / speed if speed else 0.0,
        tokens_per_second=speed,
        cost=cost,
        of=of,
        point={"threshold": float(name.split("=")[1])} if kind == "sweep" else {},
        note="Its threshold was chosen on other questions." if name == "confidence" else "",
    )


def fake_comparison() -> Comparison:
    """Three models, ten rows and two oracles."""
    comparison = Comparison(
        ensemble="tiny",
        models=MODELS,
        identities=("tiny-generalist@5f1c", "tiny-facts@90ab", "tiny-sums@77de"),
        costs=COSTS,
        task="tiny-word-problems",
        metric="exact match",
        split="test",
        digest="sha256:4be1c09d27aa",
        seed=0,
        settings={"max_new_tokens": 48, "temperature": 0.0},
        versions={"multicolm": "0.1.0", "torch": "2.13.0", "python": "3.11"},
        machine="x86_64, 2 threads, no accelerator",
        rows=tuple(_row(*row) for row in _ROWS),
        warnings=(
            "The three models were trained for this task; numbers do not carry over to others.",
            "120 questions: differences under 9 points are within chance.",
        ),
        binary=True,
        intervals="Clopper-Pearson",
        timing="after a warm-up",
    )  # fmt: skip
    return replace(comparison, findings=findings(comparison))


WRITERS = {"generalist": 0, "facts": 1, "sums": 2}
_TEXT: Sequence[tuple[str, str]] = (
    (" Sure", "generalist"), (".", "generalist"), (" Lox", "facts"), ("id", "facts"),
    (" is", "generalist"), (" given", "generalist"), (" at", "generalist"), (" {dose}", "facts"),
    (" mg", "generalist"), (" per", "generalist"), (" kg", "generalist"), (".", "generalist"),
    ("\n", "generalist"), ("So", "generalist"), (" we", "generalist"), (" need", "generalist"),
    (" {weight}", "generalist"), (" *", "sums"), (" {dose}", "sums"), (" =", "sums"),
    (" {product}", "sums"), (".", "generalist"), ("\n", "generalist"), ("Answer", "generalist"),
    (":", "generalist"), (" {product}", "sums"), (" mg", "generalist"), (".", "generalist"),
)  # fmt: skip
_OTHERS = (" the", " a", " 12", " Sofid", ".", " is", " we", "\n")


def _looks(text: str, writer: str, rng: random.Random) -> dict[str, dict[str, object]]:
    """What the models made of a place: the writer is surest."""
    outputs: dict[str, dict[str, object]] = {}
    for model in MODELS:
        sure = rng.uniform(0.75, 0.99) if model == writer else rng.uniform(0.05, 0.7)
        others = rng.sample([other for other in _OTHERS if other != text], 4)
        rest = sorted((rng.random() for _ in others), reverse=True)
        scale = (1 - sure) / (sum(rest) + 0.2)
        top = [(text, sure), *((other, r * scale) for other, r in zip(others, rest, strict=True))]
        top.sort(key=lambda pair: -pair[1])
        outputs[model] = {"logprob": math.log(sure), "top": [list(pair) for pair in top]}
    return outputs


def token(text: str, writer: str, rng: random.Random) -> ShownToken:
    """A token with all that a report can know of it."""
    outputs = _looks(text, writer, rng)
    chances = [rng.random() + 3 * (model == writer) for model in MODELS]
    return ShownToken(
        text=text,
        model=writer,
        logprob=-rng.random() / 3,
        score=rng.random(),
        models=outputs,
        policy={m: c / sum(chances) for m, c in zip(MODELS, chances, strict=True)},
    )


def answer(row: str, number: int, rng: random.Random, *, right: bool) -> TracedAnswer:
    """One word problem, answered by a row."""
    dose, weight = number % 7 + 2, 10 * (number % 9 + 2)
    product = dose * weight if right else dose + weight
    alone = row if row in MODELS else None
    tokens = tuple(
        token(
            text.format(dose=dose, weight=weight, product=product),
            MIXTURE if row == "average" else alone or writer,
            rng,
        )
        for text, writer in _TEXT
    )
    return TracedAnswer(
        row=row,
        question=f"dose-{number:03d}",
        prompt=f"A patient of {weight} kg gets Loxid.\nHow much of it is needed?",
        gold=f"{dose * weight} mg",
        text="".join(token.text for token in tokens),
        quality=float(right),
        finish_reason="stop" if right else "length",
        tokens=tokens,
    )


def odd_answers() -> list[TracedAnswer]:
    """Texts that break careless pages."""
    rng = random.Random(7)

    def odd(question: str, tokens: Sequence[ShownToken], **more: object) -> TracedAnswer:
        base = {
            "row": "confidence",
            "question": question,
            "prompt": "What is <b>odd</b> & \u202ereversed?",
            "gold": '"><img src=x onerror=alert(1)>',
            "text": "".join(t.text for t in tokens),
            "quality": 0.0,
            "finish_reason": "stop",
            "tokens": tuple(tokens),
        }
        return TracedAnswer(**{**base, **more})  # type: ignore[arg-type]

    def plain(text: str, model: str = "facts") -> ShownToken:
        return ShownToken(text=text, model=model, logprob=None)

    scripts = ("</script>", "<script>alert(1)", "<!--")
    controls = ("a\x1b[2J", "\x00", "\u202eevil\u202c", "\u2028", "\x85", "\t|")
    emoji = " \U0001f469\u200d\U0001f52c"
    return [
        odd("odd-script", [token(text, "facts", rng) for text in scripts]),
        odd("odd-controls", [plain(text) for text in controls]),
        odd("odd-rtl", [plain(" שלום"), plain(" עולם", "sums"), plain("!", "generalist")]),
        odd("odd-emoji", [plain(text) for text in (" \ufffd", "", "", emoji)], text=emoji),
        odd("odd-surrogate", [plain("\ud83d"), plain("\ude00")]),
        odd("odd-empty", [], text="", finish_reason="stop"),
        odd("odd-one", [token("42", "sums", rng)], quality=1.0),
        odd("odd-partial", [plain("half", "generalist")], quality=0.5),
    ]  # fmt: skip


def fake_traces(n_questions: int = 13, rows: Sequence[str] = ()) -> list[TracedAnswer]:
    """Answers of four rows to the same questions, and the odd ones."""
    rng = random.Random(0)
    names = rows or ("generalist", "confidence", "cosd-rule", "average")
    answers = [
        answer(row, number, rng, right=(number * 7 + 3 * place) % 5 < place + 1)
        for number in range(n_questions)
        for place, row in enumerate(names)
    ]
    return answers + odd_answers()
