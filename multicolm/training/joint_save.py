"""What joint training leaves in a checkpoint besides the policy.

base/ or adapter/    the trained base model: all of it, or a PEFT adapter for the original one
ensemble.yaml        the trained base model with the assistants that it was trained for
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from multicolm import catalog
from multicolm.config import EnsembleConfig, ModelConfig
from multicolm.errors import ArtefactError, TrainingError
from multicolm.files import write_whole

__all__ = ["refuse_foreign", "save_adapter", "save_base", "trained_base", "write_ensemble"]

_FOLDERS = {"full": "base", "lora": "adapter"}


def refuse_foreign(folder: Path, how: str) -> None:
    """Do not write over what somebody else has put there.

    Raises:
        ArtefactError: naming it.
    """
    for name in (_FOLDERS[how], "ensemble.yaml"):
        if (folder / name).exists():
            raise ArtefactError(
                f"{folder} holds another {name}, which would be written over; choose another "
                "folder, or move it away."
            )


def trained_base(config: ModelConfig, how: str, folder: Path) -> ModelConfig:
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
        settings["adapter"] = f"./{_FOLDERS[how]}"
    else:
        # What was trained has no revision on the Hub, and is in safetensors whatever it was in.
        settings = {k: v for k, v in settings.items() if k not in _OF_THE_OLD_WEIGHTS}
        settings["model"] = f"./{_FOLDERS[how]}"
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


def save_base(folder: Path, model: Any, tokenizer: Any, scratch: Path) -> None:
    """Write the whole model and its tokenizer to ``base/``, in safetensors.

    Raises:
        TrainingError: if they cannot be written; the training's last state is kept.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    _mend(model.generation_config)
    try:
        with _no_bar():
            model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"the trained model cannot be written to {folder}: {reason}. Nothing is lost: mend "
            "that and give the same command once more."
        ) from error
    _move(scratch, folder / _FOLDERS["full"])


def _mend(settings: Any) -> None:
    """Published models come with settings of sampling and without sampling, which cannot be saved.

    How multicolm writes texts does not hang on them.
    """
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


@contextmanager
def _no_bar() -> Iterator[None]:
    """Writing a file is no work that needs a progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def save_adapter(folder: Path, peft_model: Any, config: ModelConfig, scratch: Path) -> None:
    """Write a PEFT adapter to ``adapter/``, in safetensors.

    Args:
        folder: of the checkpoint.
        peft_model: that holds the adapter.
        config: of the model that it was trained for.
        scratch: folder to write it in first.
    """
    from peft import get_peft_model_state_dict

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    settings = peft_model.peft_config["default"]
    # A folder of this machine means nothing elsewhere; ensemble.yaml says which model it is.
    resolved = config.resolved
    settings.base_model_name_or_path = None if resolved.is_local else resolved.location
    settings.revision = None if resolved.is_local else resolved.revision
    settings.inference_mode = True
    if not isinstance(settings.target_modules, str):
        settings.target_modules = sorted(settings.target_modules)  # a set has no order
    settings.save_pretrained(str(scratch))
    tensors = get_peft_model_state_dict(peft_model)
    plain = {n: tensors[n].detach().to("cpu", torch.float32).clone() for n in sorted(tensors)}
    write_whole(scratch / "adapter_model.safetensors", save(plain, metadata={"format": "pt"}))
    _move(scratch, folder / _FOLDERS["lora"])


def _move(scratch: Path, place: Path) -> None:
    """Put a folder that is whole in its place; what an earlier try has left there goes."""
    if place.exists():
        shutil.rmtree(place)
    os.replace(scratch, place)


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
