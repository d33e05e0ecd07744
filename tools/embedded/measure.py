"""Measures tiny models: each alone, and an oracle that may take each token from any of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from multicolm.records import text_lines
from multicolm.tiny.world import KINDS, Kind, Question, World, is_right

TOGETHER: Final = ("generalist", "facts", "math")
"""The models that share one tokenizer, the base model first."""
ALONE_LIMITS: Final = {
    "generalist": 10.0,
    "facts": 5.0,
    "math": 5.0,
    "facts-own": 5.0,
    "math-own": 5.0,
}
"""The largest exact match, in percent, with which a model still counts as unable alone."""
ORACLE_FLOOR: Final = 98.0
"""The least exact match of the oracle, in percent: below it, no policy could be perfect."""
MAX_NEW_TOKENS: Final = 96
MAX_LOOKS: Final = 600
"""How many prefixes of one response the oracle looks at before it gives up."""

Loaded: TypeAlias = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]
Chooser: TypeAlias = Callable[[Sequence[Sequence[int]]], list[int]]
"""Gives the first choice of one model after each prefix, as token ids."""
Step: TypeAlias = Callable[[str], None]
"""Told what is being measured next."""


@dataclass(frozen=True, slots=True)
class Score:
    """Exact match of one system, in percent, over all questions and per kind."""

    overall: float
    by_kind: Mapping[Kind, float]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured: the score of every model by name, and of "oracle"."""

    scores: Mapping[str, Score]

    def shortfalls(self) -> list[str]:
        """One sentence for each threshold that is missed; empty if all is as it should be."""
        found = [
            f"{name} alone reaches {self.scores[name].overall:.1f} %, more than {limit:.0f} %"
            for name, limit in ALONE_LIMITS.items()
            if name in self.scores and self.scores[name].overall > limit
        ]
        best = self.scores["oracle"].overall
        if best < ORACLE_FLOOR:
            found.append(f"the oracle reaches {best:.1f} %, less than {ORACLE_FLOOR:.0f} %")
        return found


def load(folder: Path) -> Loaded:
    """The model and the tokenizer of one folder, on the CPU, in float32.

    Raises:
        FileNotFoundError: if the folder holds no finished model.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors; expected a folder of a trained model"
        )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.train(False), PreTrainedTokenizerFast.from_pretrained(folder)


def read_records(file: Path) -> list[dict[str, str]]:
    """The lines of a question file."""
    return [json.loads(line) for line in text_lines(file.read_text(encoding="utf-8"))]


@torch.no_grad()
def greedy(loaded: Loaded, prompts: Sequence[str], rows: int = 100) -> list[str]:
    """What a model alone writes after each prompt, up to its end token or `MAX_NEW_TOKENS`.

    Args:
        loaded: model and tokenizer.
        prompts: in any order and of any lengths.
        rows: how many prompts are decoded together.
    """
    model, tokenizer = loaded
    texts: list[str] = []
    for start in range(0, len(prompts), rows):
        batch = tokenizer(list(prompts[start : start + rows]), padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        written = model.generate(  # type: ignore[misc]
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS
        )
        texts += tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def score(questions: Sequence[Question], right: Sequence[bool]) -> Score:
    """Turns one verdict per question into percentages."""
    verdicts: dict[Kind, list[bool]] = {kind: [] for kind in KINDS}
    for question, verdict in zip(questions, right, strict=True):
        verdicts[question.kind].append(verdict)
    by_kind = {kind: 100.0 * sum(of) / len(of) for kind, of in verdicts.items() if of}
    return Score(100.0 * sum(right) / len(right), by_kind)


def alone(loaded: Loaded, questions: Sequence[Question]) -> Score:
    """Exact match of one model that writes whole responses greedily."""
    texts = greedy(loaded, [question.prompt for question in questions])
    return score(
        questions,
        [is_right(text, question.answer) for text, question in zip(texts, questions, strict=True)],
    )


@dataclass(slots=True)
class _Search:
    """A depth-first search for one right response among the first choices of all models."""

    question: Question
    prompt_ids: list[int]
    stack: list[list[int]] = field(default_factory=lambda: [[]])
    looks: int = 0
    found: bool = False

    @property
    def open(self) -> bool:
        return not self.found and bool(self.stack) and self.looks < MAX_LOOKS

    def extend(
        self, written: list[int], choices: Sequence[int], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """Follows each choice that keeps the text part of a right response, the base's first."""
        for token in reversed(list(dict.fromkeys(choices))):
            if token == tokenizer.eos_token_id:
                self.found |= str(tokenizer.decode(written)) in self.question.responses
                continue
            text = str(tokenizer.decode([*written, token]))
            if any(response.startswith(text) for response in self.question.responses):
                self.stack.append([*written, token])


def oracle(
    models: Sequence[LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
) -> Score:
    """Exact match of an oracle that knows the right responses but may write first choices only.

    A question counts if some right response, its end token included, can be written so that every
    token is the first choice of one of the models after the prompt and the tokens before it.

    Args:
        models: in the order in which their choices are tried.
        tokenizer: of all of them.
        questions: each brings its right responses.
    """
    choosers = [partial(_first_choices, model) for model in models]
    return score(questions, can_be_written(choosers, tokenizer, questions))


def can_be_written(
    choosers: Sequence[Chooser], tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> list[bool]:
    """For each question, whether first choices alone can write a right response (see `oracle`)."""
    searches = [
        _Search(question, list(tokenizer(question.prompt)["input_ids"])) for question in questions
    ]
    while active := [search for search in searches if search.open]:
        written = [search.stack.pop() for search in active]
        prefixes = [search.prompt_ids + ids for search, ids in zip(active, written, strict=True)]
        choices = zip(*(choose(prefixes) for choose in choosers), strict=True)
        for search, ids, chosen in zip(active, written, choices, strict=True):
            search.looks += 1
            search.extend(ids, chosen, tokenizer)
    return [search.found for search in searches]


@torch.no_grad()
def _first_choices(
    model: LlamaForCausalLM, prefixes: Sequence[Sequence[int]], rows: int = 100
) -> list[int]:
    """The most probable next token after each prefix; padding stands where no token looks."""
    chosen: list[int] = []
    for start in range(0, len(prefixes), rows):
        part = [torch.tensor(ids) for ids in prefixes[start : start + rows]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in part])
        logits: Tensor = model.lm_head(hidden[torch.arange(len(part)), last])
        chosen += logits.argmax(-1).tolist()
    return chosen


def measure(
    folder: Path, world: World, questions: Sequence[Question], step: Step = lambda _: None
) -> Measurement:
    """Scores all models of a folder, and the oracle over the three that share a tokenizer.

    Args:
        folder: holds one folder per model, and question files.
        world: which the models were made for.
        questions: of that world.
        step: called with what is measured next.

    Raises:
        FileNotFoundError: if one of the three, or the test questions, are missing.
        ValueError: if the question files are of another world.
    """
    refuse_another_world(folder, world)
    wanted = [name for name in ALONE_LIMITS if name in TOGETHER or (folder / name).is_dir()]
    loaded = {name: load(folder / name) for name in wanted}
    scores: dict[str, Score] = {}
    for name, model in loaded.items():
        step(f"{name} alone")
        scores[name] = alone(model, questions)
    step("the oracle")
    scores["oracle"] = oracle(
        [loaded[name][0] for name in TOGETHER], loaded[TOGETHER[0]][1], questions
    )
    return Measurement(scores)


def refuse_another_world(folder: Path, world: World) -> None:
    """Checks that the test questions in a folder are those of the world.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are others.
    """
    file = folder / "questions" / "test.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; expected a folder with questions and models")
    if read_records(file) != [question.as_record() for question in world.questions("test")]:
        raise ValueError(
            f"{file} does not hold the questions of seed {world.seed}; "
            "give the seed it was made with"
        )
