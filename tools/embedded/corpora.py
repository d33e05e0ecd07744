"""What each model reads: endless streams of documents, drawn from a generator that is passed in.

The facts expert reads statements about the medicines and the maths expert equations; neither ever
reads a question. Clutter (loose words and signs, "Question:" and "Response:" among them) teaches
them to ignore an unfamiliar prefix. The generalist reads questions with responses that are right in
form and baseless in content.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from multicolm.tiny.world import (
    ATTRIBUTES,
    CLASSES,
    DOSES_MG_PER_KG,
    ILLNESSES,
    KINDS,
    OPENERS,
    PLANTS,
    QUESTIONS,
    RESPONSES,
    STATEMENTS,
    SUMMANDS,
    WEIGHTS_KG,
    X_VALUES,
    Fields,
    Kind,
    World,
    hunch,
    random_name,
    words,
)

HUNCH_SHARE: Final = 0.7
"""How often the generalist's documents follow a hunch or a short cut. Near 1 it would guess
again at "Answer:" instead of copying what stands before."""
FRESH_NAME_SHARE: Final = 0.7
"""How often the generalist's documents speak of a name that exists nowhere else: names must be
copied."""
WIDE_SHARE: Final = 0.7
"""How often the generalist's algebra has wide numbers; else it would guess the numbers."""
BARE_PROMPT_SHARES: Final = {"full": 0.6, "no question mark-up": 0.25, "no mark-up": 0.15}

_SUBJECTS: Final = ("the nurse", "a doctor", "my sister", "the farmer", "a child")
_VERBS: Final = ("walked to", "looked at", "came from", "waited for")
_PLACES: Final = ("the market", "a river", "the big house", "a garden", "the school")
_TIMES: Final = ("", " today", " at night")
_LOOSE: Final = words(
    """
    Question: Response: Answer: What Which How Where is does the of a for from if should get So we
    need That makes First Then We And Sure. Okay. Well. Of course. Let us see. x = ? + * ^ , . mg kg
    many patient class plant value treat made come medicine kind illness help given suits weighs 2 x
    + mg. kg? x? made from? treat?
    """
)
_PRODUCT_LIMIT: Final = 900
_WIDE: Final = (range(2, 10), range(10, 100), range(100, 1000))


def sentence(rng: random.Random) -> str:
    """One sentence of plain prose, which all three models read."""
    said = (
        f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_PLACES)}{rng.choice(_TIMES)}."
    )
    return said.capitalize()


def clutter(rng: random.Random, names: Sequence[str]) -> str:
    """Two to ten loose words, signs, numbers and names without sense."""
    pieces = []
    for _ in range(rng.randint(2, 10)):
        draw = rng.random()
        if draw < 0.7:
            pieces.append(rng.choice(_LOOSE))
        elif draw < 0.85:
            pieces.append(str(rng.choice(rng.choice(_WIDE))))
        else:
            pieces.append(rng.choice(names) if rng.random() < 0.5 else random_name(rng))
    return "".join(piece + ("\n" if rng.random() < 0.08 else " ") for piece in pieces).rstrip()


def _paragraph(rng: random.Random) -> str:
    return " ".join(sentence(rng) for _ in range(rng.choice([1, 2, 4, 12])))


def facts_documents(world: World, rng: random.Random) -> Iterator[str]:
    """Statements about the medicines, several to a document, between prose and clutter."""
    names = [medicine.name for medicine in world.everything]

    def statement() -> str:
        medicine = rng.choice(world.everything)
        return rng.choice(STATEMENTS[rng.choice(ATTRIBUTES)]).format(**medicine.fields)

    return _mixed_documents(statement, names, rng)


def math_documents(world: World, rng: random.Random) -> Iterator[str]:
    """Products, sums and squares, each ended by a full stop, between prose and clutter."""
    names = [medicine.name for medicine in world.everything]
    return _mixed_documents(lambda: equation(rng), names, rng)


def equation(rng: random.Random) -> str:
    """One true equation of the size that the questions need, or a little larger."""
    draw = rng.random()
    if draw < 0.45:
        factors = [rng.randint(2, 9), rng.randint(2, 100)]
        rng.shuffle(factors)
        return f"{factors[0]} * {factors[1]} = {factors[0] * factors[1]}."
    if draw < 0.9:
        left, right = rng.randint(2, rng.choice([100, 250, _PRODUCT_LIMIT])), rng.choice(SUMMANDS)
        return f"{left} + {right} = {left + right}."
    base = rng.randint(2, 12)
    return f"{base} ^ 2 = {base**2}."


def generalist_documents(world: World, rng: random.Random) -> Iterator[str]:
    """Questions with fluent, baseless responses, in varying mark-up, and some prose."""
    names = [medicine.name for medicine in world.everything]
    while True:
        draw = rng.random()
        if draw < 0.08:
            yield _paragraph(rng)
            continue
        kind = rng.choice(KINDS)
        fields = _made_up_fact(names, rng) if kind in ATTRIBUTES else _made_up_sum(kind, rng)
        asked = rng.choice(QUESTIONS[kind]).format(**fields)
        response = rng.choice(OPENERS) + rng.choice(RESPONSES[kind]).format(**fields)
        preface = _paragraph(rng) + rng.choice(" \n") if draw > 0.9 else ""
        yield f"{preface}{_marked_up(asked, rng)} {response}"


def _mixed_documents(
    statement: Callable[[], str], names: Sequence[str], rng: random.Random
) -> Iterator[str]:
    """Documents of three to twelve items: statements, plain sentences, clutter."""
    while True:
        items = []
        for _ in range(rng.randint(3, 12)):
            draw = rng.random()
            if draw < 0.75:
                items.append(statement())
            elif draw < 0.83:
                items.append(sentence(rng))
            else:
                items.append(clutter(rng, names))
        yield "".join(item + rng.choices([" ", "\n"], [5, 1])[0] for item in items).rstrip()


def _marked_up(asked: str, rng: random.Random) -> str:
    form = rng.choices(list(BARE_PROMPT_SHARES), list(BARE_PROMPT_SHARES.values()))[0]
    if form == "no mark-up":
        return asked
    return f"{'Question: ' if form == 'full' else ''}{asked}\nResponse:"


def _made_up_fact(names: Sequence[str], rng: random.Random) -> Fields:
    """What a response about a medicine speaks of; illness and class mostly by its sound."""
    name = random_name(rng) if rng.random() < FRESH_NAME_SHARE else rng.choice(names)
    illness, family = hunch(name)
    dose, weight_kg = rng.choice(DOSES_MG_PER_KG), rng.choice(WEIGHTS_KG)
    return {
        "name": name,
        "treats": illness if rng.random() < HUNCH_SHARE else rng.choice(ILLNESSES),
        "class": family if rng.random() < HUNCH_SHARE else rng.choice(CLASSES),
        "plant": rng.choice(PLANTS),
        "dose": dose,
        "weight": weight_kg,
        "product": _short_cut(weight_kg, dose, rng),
    }


def _made_up_sum(kind: Kind, rng: random.Random) -> Fields:
    """The numbers of a calculation that goes wrong at every step."""
    if rng.random() < WIDE_SHARE:
        a, x, b = (rng.choice(rng.choice(_WIDE)) for _ in range(3))
    else:
        a, x, b = rng.randint(2, 9), rng.choice(X_VALUES[kind]), rng.choice(SUMMANDS)
    square = _short_cut(x, 2, rng)
    product = _short_cut(a, square if kind == "quad" else x, rng)
    return {"a": a, "x": x, "b": b, "square": square, "product": product, "total": _any_number(rng)}


def _short_cut(left: int, right: int, rng: random.Random) -> int:
    """The generalist's way with `*` and `^`: write both numbers side by side. Else any number."""
    if rng.random() < HUNCH_SHARE and left * right < 10**5:
        return int(f"{left}{right}")
    return _any_number(rng)


def _any_number(rng: random.Random) -> int:
    return rng.choice(rng.choice(_WIDE))
