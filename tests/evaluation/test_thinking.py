"""Tasks judge what models answer, not what they thought before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from thinkers import thinker

from multicolm import Ensemble
from multicolm.config import GenerationConfig
from multicolm.evaluation.compare import compare
from multicolm.evaluation.harness_model import EnsembleLM
from multicolm.evaluation.task import load_task

SETTINGS = GenerationConfig(think_end_token="</think>")


def test_thoughts_are_stripped_before_a_task_judges(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"id": 1, "ask": "Q", "answer": "2."}\n')
    task = tmp_path / "task.yaml"
    task.write_text(
        'data: {test: test.jsonl}\nprompt: "{ask}"\ngold: "{answer}"\nstop: ["\\n\\n"]\n'
        "max_new_tokens: 20\nmetric: {kind: exact-match}\n"
    )
    quality = {}
    for name, settings in (("stripped", SETTINGS), ("whole", GenerationConfig())):
        ensemble = Ensemble([thinker("t")], generation=settings)
        options = {"alone": False, "random": False, "oracle": False, "sweep": 0, "traces": 1}
        found = compare(ensemble, ["single"], load_task(task), out=tmp_path / name, **options)
        quality[name] = found.rows[0].quality
    # A stop string within the thoughts, or after their end, would have ended the text there.
    assert quality == {"stripped": 1.0, "whole": 0.0}


def test_thoughts_are_stripped_before_the_harness_sees_an_answer() -> None:
    request = SimpleNamespace(args=("Q", {"until": ["\n\n"], "max_gen_toks": 20}))
    for settings, wanted in ((SETTINGS, "2."), (GenerationConfig(), "<think>abcd</think>")):
        lm = EnsembleLM(Ensemble([thinker("t")], generation=settings))
        assert lm.generate_until([request]) == [wanted]
