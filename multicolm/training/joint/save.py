"""Writes the trained base model: all of it, or a PEFT adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from multicolm.config import ModelConfig
from multicolm.errors import TrainingError
from multicolm.files import write_whole
from multicolm.training.own_ensemble import FOLDERS

__all__ = ["save_adapter", "save_base"]


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
    _move(scratch, folder / FOLDERS["full"])


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
    _move(scratch, folder / FOLDERS["lora"])


def _move(scratch: Path, place: Path) -> None:
    """Put a folder that is whole in its place; what an earlier try has left there goes."""
    if place.exists():
        shutil.rmtree(place)
    os.replace(scratch, place)
