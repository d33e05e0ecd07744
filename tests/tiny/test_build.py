"""Building: what is refused, what is kept, and one run through worker processes."""

import json
import multiprocessing

import pytest
from click.testing import CliRunner
from embedded.build import BuildError, build, missing, prepare
from embedded.training import PLANS
from make_embedded import main

from multicolm.tiny.world import SPLITS, build_world

WORLD = build_world()


def finish(folder, name):
    (folder / name).mkdir()
    (folder / name / "model.safetensors").write_bytes(b"whole")


def test_a_new_folder_gets_the_question_files(tmp_path):
    prepare(tmp_path / "new", WORLD)
    for split in SPLITS:
        lines = (tmp_path / "new" / "questions" / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            question.as_record() for question in WORLD.questions(split)
        ]


def test_a_folder_made_by_somebody_else_is_left_as_it_is(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BuildError, match="is not empty and was not made by this command"):
        prepare(tmp_path, WORLD)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_a_folder_of_another_seed_is_refused(tmp_path):
    prepare(tmp_path, build_world(3))
    with pytest.raises(BuildError, match="was built with seed 3, not 7; give that --seed"):
        prepare(tmp_path, WORLD)


def test_finished_models_are_not_trained_again(tmp_path):
    prepare(tmp_path, WORLD)
    finish(tmp_path, "facts")
    prepare(tmp_path, WORLD)
    assert missing(tmp_path) == [name for name in PLANS if name != "facts"]
    assert (tmp_path / "facts" / "model.safetensors").read_bytes() == b"whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "start"), [(("facts", "facts-own"), "fork"), (("math",), "spawn")]
)
def test_a_build_of_two_steps_runs_through_worker_processes(tmp_path, monkeypatch, made, start):
    prepare(tmp_path, WORLD)
    for name in set(PLANS) - set(made):
        finish(tmp_path, name)
    if start == "fork":  # which starts at once
        fork = multiprocessing.get_context("fork")
        monkeypatch.setattr("multiprocessing.get_context", lambda _: fork)
    reports = list(build(WORLD, tmp_path, workers=2, steps=2))
    assert {(report.model, report.step) for report in reports} == {(name, 2) for name in made}
    assert not missing(tmp_path)
    assert not list(tmp_path.glob(".*.unfinished"))


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_build_with_its_name(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # it starts at once, and fails as any other
    monkeypatch.setattr("multiprocessing.get_context", lambda _: fork)
    prepare(tmp_path, WORLD)
    for name in set(PLANS) - {"facts"}:
        finish(tmp_path, name)
    (tmp_path / ".facts.unfinished").write_text("a file where the worker needs a folder")
    with pytest.raises(BuildError, match="the training of facts ended with exit code 1"):
        list(build(WORLD, tmp_path, workers=1, steps=1))


def test_the_command_refuses_in_one_sentence(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    run = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert run.exit_code == 1
    assert run.output.startswith("Error: ")
    assert len(run.output.splitlines()) == 1


def test_measuring_an_empty_folder_is_refused_in_one_sentence(tmp_path):
    run = CliRunner().invoke(main, ["--only-measure", str(tmp_path)])
    assert run.exit_code == 1
    assert "test.jsonl is missing; expected a folder with questions and models" in " ".join(
        run.output.split()
    )
    assert "Traceback" not in run.output
