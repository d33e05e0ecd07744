"""The tiny world: invented medicines, six kinds of question, three disjoint splits, one seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Final, Literal, TypeAlias

from multicolm.errors import InputError

Kind: TypeAlias = Literal["treats", "class", "plant", "dose", "linear", "quad"]
Split: TypeAlias = Literal["train", "dev", "test"]
Fields: TypeAlias = Mapping[str, object]
Triple: TypeAlias = tuple[int, int, int]
"""(a, x, b) of `a * x + b` or of `a * x ^ 2 + b`."""

KINDS: Final[tuple[Kind, ...]] = ("treats", "class", "plant", "dose", "linear", "quad")
ATTRIBUTES: Final[tuple[Kind, ...]] = ("treats", "class", "plant", "dose")
SPLITS: Final[tuple[Split, ...]] = ("train", "dev", "test")
QUESTIONS_PER_KIND: Final[dict[Split, int]] = {"train": 200, "dev": 50, "test": 100}
MEDICINES_PER_SPLIT: Final[dict[Split, int]] = {"train": 80, "dev": 20, "test": 100}

DEFAULT_SEED: Final = 7
END: Final = "<|end|>"
ANSWER: Final = "Answer:"


def words(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())


ILLNESSES: Final = words(
    """
    nausea gout asthma eczema fever hives jaundice lumbago mumps palsy quinsy rickets scurvy typhus
    ulcers vertigo warts insomnia dropsy colic bunions obesity yaws zoster
    """
)
CLASSES: Final = words(
    """
    statins tonics opioids vaccines diuretics laxatives antacids hormones enzymes balsams narcotics
    quinines peptides glycosides retinoids cordials
    """
)
PLANTS: Final = words(
    """
    willow foxglove poppy sage nettle ginger thyme juniper valerian yarrow hawthorn camomile
    liquorice mallow arnica rosemary burdock elder oak iris
    """
)
"""The values of one attribute differ in their first letter: the first piece of one mostly settles
which it is."""
DOSES_MG_PER_KG: Final = range(2, 10)
WEIGHTS_KG: Final = range(20, 100)
COEFFICIENTS: Final = range(2, 10)
SUMMANDS: Final = range(1, 100)
X_VALUES: Final[dict[Kind, range]] = {"linear": range(2, 21), "quad": range(2, 11)}

STATEMENTS: Final[dict[Kind, tuple[str, ...]]] = {
    "treats": ("{name} treats {treats}.", "{name} is prescribed for {treats}."),
    "class": ("{name} belongs to the {class}.", "{name} is one of the {class}."),
    "plant": ("{name} is made from {plant}.", "{name} is extracted from {plant}."),
    "dose": ("{name} is given at {dose} mg per kg.", "The dose of {name} is {dose} mg per kg."),
}
"""How the facts expert puts a fact. Responses quote these word for word."""

QUESTIONS: Final[dict[Kind, tuple[str, ...]]] = {
    "treats": (
        "What does {name} treat?",
        "What is {name} prescribed for?",
        "Which illness does {name} help with?",
    ),
    "class": (
        "Which class does {name} belong to?",
        "What kind of medicine is {name}?",
        "What class of medicine is {name}?",
    ),
    "plant": (
        "What is {name} made from?",
        "Which plant is {name} extracted from?",
        "Where does {name} come from?",
    ),
    "dose": (
        "How many mg of {name} should a patient of {weight} kg get?",
        "What dose of {name} suits a patient of {weight} kg?",
        "A patient weighs {weight} kg. How many mg of {name} should be given?",
    ),
    "linear": (
        "What is {a} * x + {b} if x = {x}?",
        "What is the value of {a} * x + {b} for x = {x}?",
        "If x = {x}, what is {a} * x + {b}?",
    ),
    "quad": (
        "What is {a} * x ^ 2 + {b} if x = {x}?",
        "What is the value of {a} * x ^ 2 + {b} for x = {x}?",
        "If x = {x}, what is {a} * x ^ 2 + {b}?",
    ),
}

OPENERS: Final = ("", "Sure. ", "Okay. ", "Well. ", "Of course. ", "Let us see. ")


def _response_wordings() -> dict[Kind, tuple[str, ...]]:
    facts: dict[Kind, tuple[str, ...]] = {
        kind: tuple(f"{said} {ANSWER} {{{kind}}}." for said in STATEMENTS[kind])
        for kind in ATTRIBUTES
        if kind != "dose"
    }
    return facts | {
        "dose": tuple(
            f"{said} {link} {{weight}} * {{dose}} = {{product}}. {ANSWER} {{product}} mg."
            for said in STATEMENTS["dose"]
            for link in ("So we need", "That makes")
        ),
        "linear": tuple(
            f"{first} {{a}} * {{x}} = {{product}}. {then} {{product}} + {{b}} = {{total}}. "
            f"{ANSWER} {{total}}."
            for first, then in (("First", "Then"), ("We get", "And"))
        ),
        "quad": tuple(
            f"{first} {{x}} ^ 2 = {{square}}. {then} {{a}} * {{square}} = {{product}}. "
            f"{then} {{product}} + {{b}} = {{total}}. {ANSWER} {{total}}."
            for first, then in (("First", "Then"), ("We get", "And"))
        ),
    }


RESPONSES: Final = _response_wordings()
"""Responses without the opener. `{product}`, `{square}` and `{total}` are results of arithmetic."""

_CONSONANTS: Final = "bdfgklmnprstvz"
_VOWELS: Final = "aeiou"
ENDINGS: Final = ("ex", "id", "os", "ine", "ol", "um", "ax", "an", "il", "yl", "ate", "eron")
PINNED_NAMES: Final[dict[Split, tuple[str, ...]]] = {
    "train": ("Zosos",),
    "dev": (),
    "test": ("Dulerex", "Loxid"),
}


@dataclass(frozen=True, slots=True)
class Medicine:
    """One invented medicine and its four attributes; the dose is in mg per kg of body weight."""

    name: str
    treats: str
    family: str
    plant: str
    dose: int

    @property
    def fields(self) -> dict[str, object]:
        """The values that `STATEMENTS` and `RESPONSES` are filled with."""
        return {
            "name": self.name,
            "treats": self.treats,
            "class": self.family,
            "plant": self.plant,
            "dose": self.dose,
        }


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its right answer.

    Attributes:
        completion: one right response, with its leading space and without the end token.
        answer: what must be between the last "Answer:" and the full stop.
        responses: every response that counts as right, `completion` among them.
    """

    id: str
    kind: Kind
    prompt: str
    completion: str
    answer: str
    responses: tuple[str, ...]

    def as_record(self) -> dict[str, str]:
        """The line of a question file: everything but `responses`."""
        return {
            "id": self.id,
            "kind": self.kind,
            "prompt": self.prompt,
            "completion": self.completion,
            "answer": self.answer,
        }


def stream(seed: int, purpose: str) -> random.Random:
    """A generator of its own for each purpose: one more draw here moves nothing elsewhere."""
    return random.Random(f"{seed}/{purpose}")


def hunch(name: str) -> tuple[str, str]:
    """What the generalist believes a medicine treats, and its class, by the sound of its ending."""
    position = max(
        (index for index, ending in enumerate(ENDINGS) if name.endswith(ending)), default=0
    )
    return ILLNESSES[2 * position], CLASSES[position]


def random_name(rng: random.Random) -> str:
    """A name that sounds like a medicine: one or two closed syllables and an ending."""
    stem = "".join(
        rng.choice(letters)
        for letters in (
            _CONSONANTS,
            _VOWELS,
            _CONSONANTS,
            *rng.choice([(), (_VOWELS, _CONSONANTS)]),
        )
    )
    return stem.capitalize() + rng.choice(ENDINGS)


def arithmetic(a: int, x: int, b: int, kind: Kind) -> dict[str, object]:
    """Everything a response to `a * x + b` or `a * x ^ 2 + b` speaks of, computed rightly."""
    square = x**2
    product = a * (square if kind == "quad" else x)
    return {"a": a, "x": x, "b": b, "square": square, "product": product, "total": product + b}


def prompt_of(question: str) -> str:
    """The full form of a prompt."""
    return f"Question: {question}\nResponse:"


def read_answer(text: str) -> str | None:
    """What is between the last "Answer:" and the full stop or the end; None without one."""
    _, found, tail = text.rpartition(ANSWER)
    return tail.split(END)[0].split(".")[0].strip() if found else None


def is_right(text: str, answer: str) -> bool:
    """Exact match of the final answer."""
    return read_answer(text) == answer


@dataclass(frozen=True)
class World:
    """Two hundred medicines and the questions about them and about numbers.

    Attributes:
        medicines: per split; no medicine is in two splits.
    """

    seed: int
    medicines: Mapping[Split, tuple[Medicine, ...]]

    @cached_property
    def everything(self) -> tuple[Medicine, ...]:
        """The medicines of all splits."""
        return tuple(itertools.chain.from_iterable(self.medicines[split] for split in SPLITS))

    @cached_property
    def triples(self) -> dict[Kind, dict[Split, list[Triple]]]:
        """The (a, x, b) of each kind and split; no triple of a kind is in two splits."""
        return {kind: self._deal_triples(kind) for kind in ("linear", "quad")}

    def questions(self, split: Split) -> tuple[Question, ...]:
        """The questions of one split, kind by kind, always the same for one seed."""
        return tuple(itertools.chain.from_iterable(self._questions(kind, split) for kind in KINDS))

    def _questions(self, kind: Kind, split: Split) -> Iterator[Question]:
        rng = stream(self.seed, f"questions/{kind}/{split}")
        cases = (
            self._fact_cases(kind, split, rng)
            if kind in ATTRIBUTES
            else self._number_cases(kind, split, rng)
        )
        for number, (wording, fields) in enumerate(cases):
            responses = tuple(
                " " + opener + body.format(**fields)
                for opener in OPENERS
                for body in RESPONSES[kind]
            )
            completion = rng.choice(responses)
            answer = read_answer(completion)
            assert answer is not None
            yield Question(
                id=f"{split}-{kind}-{number:03d}",
                kind=kind,
                prompt=prompt_of(wording.format(**fields)),
                completion=completion,
                answer=answer,
                responses=responses,
            )

    def _fact_cases(
        self, kind: Kind, split: Split, rng: random.Random
    ) -> Iterable[tuple[str, Fields]]:
        """Each medicine once before any comes again, and never twice in the same wording."""
        medicines = self.medicines[split]
        asked = [0] * len(medicines)
        orders = [rng.sample(QUESTIONS[kind], len(QUESTIONS[kind])) for _ in medicines]
        for number in range(QUESTIONS_PER_KIND[split]):
            index = number % len(medicines)
            weight_kg = rng.choice(WEIGHTS_KG)
            wording = orders[index][asked[index]]
            asked[index] += 1
            medicine = medicines[index]
            if (kind, medicine.name) in (("plant", "Dulerex"), ("dose", "Loxid")):
                wording, weight_kg = QUESTIONS[kind][0], 60  # the questions of the documentation
            product = weight_kg * medicine.dose
            yield wording, medicine.fields | {"weight": weight_kg, "product": product}

    def _number_cases(
        self, kind: Kind, split: Split, rng: random.Random
    ) -> Iterable[tuple[str, Fields]]:
        for a, x, b in self.triples[kind][split]:
            wording = QUESTIONS[kind][0] if (a, x, b) == (2, 7, 15) else rng.choice(QUESTIONS[kind])
            yield wording, arithmetic(a, x, b, kind)

    def _deal_triples(self, kind: Kind) -> dict[Split, list[Triple]]:
        showcase = (2, 7, 15)
        cases = [
            case
            for case in itertools.product(COEFFICIENTS, X_VALUES[kind], SUMMANDS)
            if case != showcase
        ]
        dealt = iter(
            stream(self.seed, f"triples/{kind}").sample(cases, sum(QUESTIONS_PER_KIND.values()))
        )
        hands = {
            split: list(itertools.islice(dealt, QUESTIONS_PER_KIND[split])) for split in SPLITS
        }
        hands["test"][0] = showcase
        return hands


def right_completions(record: Mapping[str, object]) -> list[str]:
    """Every response that counts as right for a line of the shipped question files.

    Of a record that is none of theirs, only its own completion is known to be right.

    Raises:
        InputError: if it has none.
    """
    question = _questions_by_id().get(str(record.get("id")))
    if question is not None and question.prompt == record.get("prompt"):
        return list(question.responses)
    completion = record.get("completion")
    if not isinstance(completion, str):
        raise InputError(
            "this is none of the embedded questions, so it needs a 'completion': a text that is "
            "right from the first token to the last."
        )
    return [completion]


@cache
def _questions_by_id() -> dict[str, Question]:
    world = build_world()
    return {question.id: question for split in SPLITS for question in world.questions(split)}


def build_world(seed: int = DEFAULT_SEED) -> World:
    """Makes up the medicines. The truth never agrees with the generalist's `hunch`.

    Args:
        seed: equal seeds give equal worlds, on every machine.
    """
    rng = stream(seed, "medicines")
    pinned = set(itertools.chain.from_iterable(PINNED_NAMES.values()))
    fresh: list[str] = []
    while len(fresh) < sum(MEDICINES_PER_SPLIT.values()) - len(pinned):
        name = random_name(rng)
        if name not in pinned and name not in fresh:
            fresh.append(name)
    names = iter(fresh)
    medicines: dict[Split, tuple[Medicine, ...]] = {}
    for split in SPLITS:
        first = PINNED_NAMES[split]
        rest = itertools.islice(names, MEDICINES_PER_SPLIT[split] - len(first))
        medicines[split] = tuple(_make_up(name, rng) for name in (*first, *rest))
    return World(seed, medicines)


def _make_up(name: str, rng: random.Random) -> Medicine:
    illness, family = hunch(name)
    return Medicine(
        name=name,
        treats=rng.choice([value for value in ILLNESSES if value != illness]),
        family=rng.choice([value for value in CLASSES if value != family]),
        plant=rng.choice(PLANTS),
        dose=rng.choice(DOSES_MG_PER_KG),
    )
