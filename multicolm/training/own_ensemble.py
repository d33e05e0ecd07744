"""The ensemble that a checkpoint holds after a training of the base model.

base/ or adapter/    the trained base model: all of it, or a PEFT adapter for the original one
ensemble.yaml        the trained base model with the assistants that it was trained for
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import yaml

from multicolm import catalog
from multicolm.config import EnsembleConfig, ModelConfig, load_ensemble
from multicolm.errors import ArtefactError, TrainingError
from multicolm.files import write_whole

__all__ = ["FOLDERS", "How", "copy_ensemble", "refuse_foreign", "trained_base", "write_ensemble"]

How = Literal["lora", "full"]
"""What of the base model is trained: an adapter for it, or all its weights."""

FOLDERS: dict[How, str] = {"full": "base", "lora": "adapter"}
"""Where in the checkpoint that lies."""


def refuse_foreign(folder: Path, how: How) -> None:
    """Do not write over what somebody else has put there.

    Raises:
        ArtefactError: naming it.
    """
    for name in (FOLDERS[how], "ensemble.yaml"):
        if (folder / name).exists():
            raise ArtefactError(
                f"{folder} holds another {name}, which would be written over; choose another "
                "folder, or move it away."
            )


def trained_base(config: ModelConfig, how: How, folder: Path) -> ModelConfig:
    """The base model's settings, with the trained weights of a checkpoint's folder.

    Args:
        config: of the base model as it was.
        how: ``lora`` or ``full``.
        folder: of the checkpoint; its weights are there.

    Raises:
        TrainingError: if they are not.
    """
    settings = _portable(config, folder)
    if how == "lora":
        settings["adapter"] = f"./{FOLDERS[how]}"
    else:
        # What was trained has no revision on the Hub, and is in safetensors whatever it was in.
        settings = {k: v for k, v in settings.items() if k not in _OF_THE_OLD_WEIGHTS}
        settings["model"] = f"./{FOLDERS[how]}"
    trained = ModelConfig(**settings)
    problems = trained.resolve(folder)
    if problems:
        raise TrainingError(f"the trained model cannot be used: {problems[0].text}")
    return trained


_OF_THE_OLD_WEIGHTS = ("revision", "allow_pickled_weights")


def write_ensemble(folder: Path, config: EnsembleConfig, base: ModelConfig) -> None:
    """Write ``ensemble.yaml``: the trained base model, the same assistants, the trained policy.

    Paths that were relative are relative again, from this folder; absolute ones stay.

    Args:
        folder: of the checkpoint.
        config: of the ensemble as it was.
        base: of the trained base model.
    """
    settings = {
        name: _portable(model, folder) if name != config.base_model else _given(base)
        for name, model in config.models.items()
    }
    data = {
        "summary": f"With base model '{config.base_model}' trained for it.",
        "base_model": config.base_model,
        "models": settings,
        "policy": ".",
    }
    generation = config.generation.model_dump(mode="json", exclude_defaults=True)
    if generation:
        data["generation"] = generation
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    write_whole(folder / "ensemble.yaml", text)


def copy_ensemble(source: Path, target: Path) -> None:
    """Write the ensemble of one checkpoint, if it is one, to the folder of another.

    Args:
        source: folder of the checkpoint.
        target: folder to write to; models that do not lie in ``source`` stay where they are.

    Raises:
        MulticolmError: if the ensemble cannot be read.
    """
    if not (source / "ensemble.yaml").is_file():
        return
    config = load_ensemble(source / "ensemble.yaml")
    [how] = [how for how, name in FOLDERS.items() if (source / name).is_dir()]
    name = FOLDERS[how]
    shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    write_ensemble(target, config, trained_base(config.models[config.base_model], how, target))


def _portable(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """The settings of a model as they can stand in an ensemble file of another folder."""
    settings, resolved = _given(config), config.resolved
    if resolved.is_local and config.model not in catalog.names("models"):
        settings["model"] = _path(config.model, resolved.location, folder)
    if config.adapter is not None and resolved.adapter is not None:
        settings["adapter"] = _path(config.adapter, resolved.adapter, folder)
    if config.chat_template is not None:
        settings["chat_template"] = resolved.chat_template
    return settings


def _given(config: ModelConfig) -> dict[str, Any]:
    """What a model's settings say that is not so anyway."""
    return config.model_dump(mode="json", exclude_defaults=True)


def _path(written: str, found: str, folder: Path) -> str:
    if Path(written).expanduser().is_absolute():
        return found
    relative = Path(os.path.relpath(found, folder.resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"
