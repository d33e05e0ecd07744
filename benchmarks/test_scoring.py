"""Scoring: its memory stays where it is as the corpus grows, and its speed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from multicolm import Ensemble
from multicolm.catalog import registry
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.reading import Text, read_texts
from multicolm.scoring.score import score

SCORE = """
import resource, sys
import multicolm
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
ensemble = multicolm.load("tiny")
score(ensemble, open_corpus(sys.argv[1]), sys.argv[2], features=["hidden"], shard_positions=4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def texts(n: int) -> str:
    lines = (registry() / "tiny/questions/train.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join((lines * (n // len(lines) + 1))[:n])


def test_ten_times_the_corpus_takes_about_the_same_memory(
    tmp_path: Path, benchmark: object
) -> None:
    """The peak of the whole process, torch and models included; each in a process of its own."""
    peaks: dict[int, int] = {}

    def measure() -> None:
        for n in (600, 6000):
            data = tmp_path / f"{n}.jsonl"
            data.write_text(texts(n), encoding="utf-8")
            command = [sys.executable, "-c", SCORE, str(data), str(tmp_path / f"scores-{n}")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[n] = int(done.stdout)

    benchmark.pedantic(measure, rounds=1)
    ratio = peaks[6000] / peaks[600]
    benchmark.extra_info.update(peak_kib=json.dumps(peaks), ratio=ratio, aim="< 1.2")
    assert ratio < 1.2, peaks


@pytest.mark.parametrize("name", ["tiny", "medium"])
def test_scoring_costs_little_more_than_the_forward_passes(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, compare: Callable[..., float]
) -> None:
    """Against the same batches, read and thrown away."""
    ensemble: Ensemble = request.getfixturevalue(name)
    data = tmp_path / "train.jsonl"
    data.write_text(texts(128), encoding="utf-8")
    corpus = open_corpus(data)
    runs = iter(range(1000))
    ends = sorted(ensemble.vocabulary.end_ids(0))[:1]

    def scoring() -> None:
        score(ensemble, corpus, tmp_path / f"scores-{next(runs)}", end_of_text=bool(ends))

    def reading() -> None:
        for k, model in enumerate(ensemble.backends):
            read = [
                Text(
                    model.tokenizer.encode(str(example.prompt)),
                    [*model.tokenizer.encode_continuation(example.completion), *ends],
                )
                for example in corpus
            ]
            for _ in read_texts(model, k, ensemble.vocabulary, read):
                pass

    compare(
        scoring,
        reading,
        what=f"128 texts scored and written ({name})",
        against="the same forward passes",
    )
