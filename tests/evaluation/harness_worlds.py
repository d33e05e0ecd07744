"""Small tasks of the lm-evaluation-harness over the embedded models' questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multicolm.evaluation.harness_results import HarnessFigure

__all__ = ["Request", "records", "without_times", "write_tasks"]

QUESTIONS = Path(__file__).parents[2] / "registry/tiny/questions/test.jsonl"

CHOICE = """
task: tiny_choice
tag: tiny_tag
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.5}
"""
ANSWER = """
task: tiny_answer
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: " Zosos"
generation_kwargs: {until: [".", " is"], max_gen_toks: 24, do_sample: false, temperature: 0.0}
metric_list:
  - {metric: chars, aggregation: mean, higher_is_better: true}
process_results: !function measure.length
metadata: {version: 1.0}
"""
ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
metadata: {version: 1.0}
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_other_choice]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""
MEASURE = """
def length(doc, results):
    return {"chars": sum(map(ord, results[0])) / 1000}
"""


def records(n: int = 8) -> list[dict[str, Any]]:
    """Questions about medicines, each with four answers to choose from."""
    lines = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    treats = [line for line in lines if line["kind"] == "treats"]
    answers = sorted({line["answer"] for line in treats})
    for line in treats[:n]:
        first = answers.index(line["answer"])
        chosen = [answers[(first + i) % len(answers)] for i in range(4)]
        line["choices"] = [f" Answer: {answer}." for answer in chosen]
        line["gold"] = 0
        line["text"] = line["prompt"] + line["completion"]
    return treats[:n]


def write_tasks(folder: Path, data: Sequence[Mapping[str, Any]]) -> Path:
    """Task files over some records; what the harness caches of them lies beside."""
    folder.mkdir(exist_ok=True)
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in data), encoding="utf-8")
    where = (
        f"dataset_path: json\ntest_split: test\nfewshot_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {folder / 'cache'}}}\n"
    )
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text + where, encoding="utf-8")
    other = CHOICE.replace("tiny_choice", "tiny_other_choice").replace("tag: tiny_tag\n", "")
    (folder / "other.yaml").write_text(other + where, encoding="utf-8")
    (folder / "group.yaml").write_text(GROUP, encoding="utf-8")
    (folder / "measure.py").write_text(MEASURE, encoding="utf-8")
    return folder


class Request:
    """What the harness asks, as far as a model looks at it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def without_times(figures: Sequence[HarnessFigure]) -> list[Any]:
    return [{**vars_of(f), "seconds": 0.0} for f in figures]


def vars_of(figure: HarnessFigure) -> dict[str, Any]:
    return {name: getattr(figure, name) for name in HarnessFigure.__slots__}
