"""Trains the policy that ships with the tiny models, by the commands that users are given."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

import yaml

from embedded.build import BuildError
from embedded.measure import TOGETHER
from multicolm.cli import main

HEAD: Final = "co-llm"


def train_head(folder: Path) -> None:
    """Let the models of a folder read its training questions, and train `co-llm` on the scores.

    Everything is at its default. The finished checkpoint appears in the folder as `co-llm`; one
    that is there already stays.

    Raises:
        BuildError: if a command fails; it has said why.
    """
    if (folder / HEAD).exists():
        return
    models = {name: {"model": f"../{name}", "dtype": "float32"} for name in TOGETHER}
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{HEAD}-") as beside:
        ensemble, scores, trained = (f"{beside}/{name}" for name in ("e.yaml", "scores", HEAD))
        text = yaml.safe_dump({"base_model": TOGETHER[0], "models": models})
        Path(ensemble).write_text(text, encoding="utf-8")
        data = str(folder / "questions" / "train.jsonl")
        own = ["--policy", HEAD, "--license", "Apache-2.0"]
        for command in (
            ["score", ensemble, data, "--hidden", "--out", scores],
            ["train", ensemble, scores, *own, "--out", trained],
        ):
            if main(command) != 0:
                raise BuildError(f"this command failed: multicolm {' '.join(command)}")
        Path(trained, ".lock").unlink()
        shutil.move(trained, folder / HEAD)
