"""Invented medicines and small sums: what experts read, and what is asked.

An expert reads statements alone ("Zosos treats gout.", "60 * 4 = 240."). Questions are chats, and
of three kinds: a fact, a sum, and a dose, which needs a fact and then a multiplication. No medicine
and no sum of a test question is in a training question.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from multicolm.tiny.world import ILLNESSES, PLANTS, random_name, stream

SPLITS: Final = ("train", "dev", "test")
KINDS: Final = ("fact", "dose", "sum")
MEDICINE_SHARES: Final = {"train": 0.4, "dev": 0.1, "test": 0.5}
DOSES_MG_PER_KG: Final = range(2, 10)
WEIGHTS_KG: Final = range(20, 100, 5)
COEFFICIENTS: Final = range(2, 10)
X_VALUES: Final = range(2, 13)
SUMMANDS: Final = range(1, 51)

STATEMENTS: Final = {
    "treats": ("{name} treats {treats}.", "{name} is prescribed for {treats}."),
    "plant": ("{name} is made from {plant}.", "{name} is extracted from {plant}."),
    "dose": ("The dose of {name} is {dose} mg per kg.", "{name} is given at {dose} mg per kg."),
}
"""How the facts expert reads a fact. Answers use the first wording."""

QUESTIONS: Final = {
    "treats": ("What does {name} treat?", "What is {name} prescribed for?"),
    "plant": ("What is {name} made from?", "Which plant does {name} come from?"),
    "dose": (
        "How many mg of {name} should a patient of {weight} kg get?",
        "A patient weighs {weight} kg. How many mg of {name} should be given?",
    ),
    "sum": ("What is {a} * x + {b} if x = {x}?", "If x = {x}, what is {a} * x + {b}?"),
}
ANSWERS: Final = {
    "treats": STATEMENTS["treats"][0],
    "plant": STATEMENTS["plant"][0],
    "dose": STATEMENTS["dose"][0] + " {weight} * {dose} = {product}.",
    "sum": "{a} * {x} = {product}. {product} + {b} = {total}.",
}


@dataclass(frozen=True, slots=True)
class Statement:
    """What an expert reads: a sentence with the blank or line break before it.

    Attributes:
        given: how many characters are only read; the expert learns what follows them.
    """

    text: str
    given: int


@dataclass(frozen=True, slots=True)
class Medicine:
    """One invented medicine; the dose is in mg per kg of body weight."""

    name: str
    treats: str
    plant: str
    dose: int


@dataclass(frozen=True)
class World:
    """The medicines of each split, and all statements and questions about them.

    Attributes:
        seed: equal seeds give equal worlds, on every machine.
        n_medicines: in all splits together.
    """

    seed: int
    n_medicines: int

    @property
    def medicines(self) -> Mapping[str, tuple[Medicine, ...]]:
        """By split; no medicine is in two."""
        rng = stream(self.seed, "real-experts/medicines")
        names = dict.fromkeys(random_name(rng) for _ in range(2 * self.n_medicines))
        made = [
            Medicine(name, rng.choice(ILLNESSES), rng.choice(PLANTS), rng.choice(DOSES_MG_PER_KG))
            for name in itertools.islice(names, self.n_medicines)
        ]
        n_train = round(self.n_medicines * MEDICINE_SHARES["train"])
        n_dev = round(self.n_medicines * MEDICINE_SHARES["dev"])
        cuts = (0, n_train, n_train + n_dev, self.n_medicines)
        return {
            split: tuple(made[start:end])
            for split, (start, end) in zip(SPLITS, itertools.pairwise(cuts), strict=True)
        }

    def facts(self, purpose: str) -> Iterator[Statement]:
        """Endless statements about all medicines; each fact once before any comes again."""
        rng = stream(self.seed, f"real-experts/facts/{purpose}")
        everything = [medicine for split in SPLITS for medicine in self.medicines[split]]
        facts = list(itertools.product(everything, STATEMENTS))
        while True:
            rng.shuffle(facts)
            for medicine, attribute in facts:
                text = rng.choice(" \n") + rng.choice(STATEMENTS[attribute])
                text = text.format(**asdict(medicine))
                # Which medicine it is cannot be foreseen; the rest of its name can.
                yield Statement(text, text.index(medicine.name) + 1)

    def maths(self, purpose: str) -> Iterator[Statement]:
        """Endless equations of the sizes that questions need."""
        rng = stream(self.seed, f"real-experts/maths/{purpose}")
        while True:
            draw = rng.random()
            if draw < 0.25:
                sides = f"{rng.choice(WEIGHTS_KG)} * {rng.choice(DOSES_MG_PER_KG)}"
            elif draw < 0.4:
                sides = f"{rng.choice(COEFFICIENTS)} * {rng.choice(X_VALUES)}"
            else:
                product = rng.choice(COEFFICIENTS) * rng.choice(X_VALUES)
                sides = f"{product} + {rng.choice(SUMMANDS)}"
            left, sign, right = sides.split()
            result = int(left) * int(right) if sign == "*" else int(left) + int(right)
            text = rng.choice(" \n") + f"{sides} = {result}."
            yield Statement(text, text.index("=") + 1)

    def statements(self, expert: str) -> Iterator[Statement]:
        """What one expert reads: `facts`, `maths`, or both by turns (`everything`)."""
        if expert == "facts":
            return self.facts(expert)
        if expert == "maths":
            return self.maths(expert)
        pairs = zip(self.facts(expert), self.maths(expert), strict=True)
        return itertools.chain.from_iterable(pairs)

    def questions(self, split: str, per_kind: int) -> list[dict[str, str]]:
        """Records with `id`, `kind`, `question`, `answer` and the whole right `completion`."""
        rng = stream(self.seed, f"real-experts/questions/{split}")
        cases = {
            "fact": self._fact_cases(split, rng),
            "dose": self._dose_cases(split, rng),
            "sum": self._sum_cases(split, rng),
        }
        records = []
        for number in range(per_kind):
            for kind in KINDS:
                form, wording, fields = next(cases[kind])
                completion = ANSWERS[form].format(**fields)
                records.append(
                    {
                        "id": f"{split}-{kind}-{number:03d}",
                        "kind": kind,
                        "question": QUESTIONS[form][wording].format(**fields),
                        "completion": completion,
                        "answer": completion.removesuffix(".").split()[-1],
                    }
                )
        return records

    def _fact_cases(self, split: str, rng: random.Random) -> Iterator[Case]:
        for wording in itertools.cycle((0, 1)):
            cases = list(itertools.product(("treats", "plant"), self.medicines[split]))
            rng.shuffle(cases)
            for attribute, medicine in cases:
                yield attribute, wording, asdict(medicine)

    def _dose_cases(self, split: str, rng: random.Random) -> Iterator[Case]:
        for number in itertools.count():
            medicines = list(self.medicines[split])
            rng.shuffle(medicines)
            for medicine in medicines:
                weight = rng.choice(WEIGHTS_KG)
                product = weight * medicine.dose
                fields = asdict(medicine) | {"weight": weight, "product": product}
                yield "dose", number % 2, fields

    def _sum_cases(self, split: str, rng: random.Random) -> Iterator[Case]:
        """No (a, x, b) is in two splits: the shuffled list of all is dealt out by turns."""
        cases = list(itertools.product(COEFFICIENTS, X_VALUES, SUMMANDS))
        stream(self.seed, "real-experts/sums").shuffle(cases)
        for a, x, b in cases[SPLITS.index(split) :: len(SPLITS)]:
            fields = {"a": a, "x": x, "b": b, "product": a * x, "total": a * x + b}
            yield "sum", rng.randrange(2), fields


Case = tuple[str, int, Mapping[str, object]]
"""Form of the answer, which wording of the question, and the values of both."""


def write_questions(world: World, folder: Path, per_kind: Mapping[str, int]) -> None:
    """One file of JSON lines per split, as tasks and `multicolm score` read them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in per_kind.items():
        _write(folder / f"{split}.jsonl", world.questions(split, count))
    chats = [
        {
            "messages": [
                {"role": "user", "content": record["question"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        }
        for record in world.questions("train", per_kind["train"])
    ]
    _write(folder / "train-chats.jsonl", chats)


def _write(file: Path, records: Sequence[Mapping[str, object]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
