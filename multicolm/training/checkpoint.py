"""A learned or tuned policy as a folder that anybody can use.

policy.yaml         what `policy: ./checkpoint` reads
gap.py              the code of a policy of one's own, run only if the user has named it
head.safetensors    (or tree.json, ...) what was learned
provenance.json     which models and data it was made from, and what was measured
README.md           the same for people
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from huggingface_hub import ModelHubMixin

from multicolm.artefacts import Artefact
from multicolm.config.policy_code import code_of
from multicolm.errors import ArtefactError
from multicolm.files import links_out, locked, write_whole
from multicolm.plugins import policies
from multicolm.policy.base import Policy
from multicolm.policy.resolve import resolve_policy
from multicolm.training.card import card
from multicolm.training.own_ensemble import copy_ensemble
from multicolm.training.provenance import read_provenance
from multicolm.transfer import download, hub_errors

__all__ = ["Checkpoint", "finished_checkpoint", "made_once", "unfinished"]


class Checkpoint(
    ModelHubMixin,
    library_name="multicolm",
    tags=["multicolm", "token-level-routing"],
):
    """A policy with what is known of how it was made.

        checkpoint.save_pretrained("router")
        checkpoint.push_to_hub("organisation/router")
        Checkpoint.from_pretrained("organisation/router").policy

    Args:
        policy: learned or tuned.
        provenance: what it was made from; see
            :func:`multicolm.training.provenance.read_provenance`.
        summary: one line for ``policy.yaml``.
        tasks: by task, params that suit it better.
        folder: where it lies; if that is an ensemble of its own, as after a training of the base
            model, its models go where it is saved.
    """

    def __init__(
        self,
        policy: Policy,
        provenance: Mapping[str, Any] | None = None,
        summary: str = "",
        tasks: Mapping[str, Mapping[str, Any]] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.policy = policy
        self.provenance = dict(provenance or {})
        self.summary = summary
        self.tasks = {task: dict(params) for task, params in (tasks or {}).items()}
        self.folder = folder
        # Of config.json, which is what the Hub counts downloads by.
        self._hub_mixin_config = {"library": "multicolm", "kind": policy.name}

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the folder; ``policy.yaml`` last, so that what is half written is not used."""
        save_directory.mkdir(parents=True, exist_ok=True)
        if self.folder is not None and self.folder.resolve() != save_directory.resolve():
            copy_ensemble(self.folder, save_directory)
        params = {}
        for name, value in self.policy.as_config()["params"].items():
            if isinstance(value, Artefact):
                file = f"{name}{value.suffix}"
                value.save(save_directory / file)
                params[name] = file
            else:
                params[name] = _plain(value)
        config = {"summary": self.summary, **self._kind(save_directory), "params": params}
        if self.tasks:
            config["tasks"] = self.tasks
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)
        provenance = json.dumps(self.provenance, indent=1, ensure_ascii=False, default=str)
        hub = json.dumps(self._hub_mixin_config, sort_keys=True, indent=2)
        write_whole(save_directory / "config.json", hub)
        write_whole(save_directory / "provenance.json", provenance + "\n")
        write_whole(save_directory / "README.md", card(config, self.provenance))
        write_whole(save_directory / "policy.yaml", text)

    def _kind(self, folder: Path) -> dict[str, str]:
        """What ``policy.yaml`` says of the class; a copy of its code if that is the user's."""
        cls = type(self.policy)
        file = code_of(cls)
        if file is not None:
            write_whole(folder / file.path.name, file.text)
            return {"kind": f"{file.path.name}:{cls.__name__}", "code": file.digest}
        if self.policy.name in policies and policies.get(self.policy.name) is cls:
            return {"kind": self.policy.name}
        return {"kind": f"{cls.__module__}:{cls.__qualname__}"}

    @classmethod
    def from_pretrained(  # type: ignore[override]  # one kind of thing is loaded, and no config
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Checkpoint:
        """A checkpoint from a folder, or from a repository on the Hub.

        Args:
            pretrained_model_name_or_path: a folder, or ``organisation/name``.
            revision: commit, tag or branch of the repository.
            cache_dir: of the Hub's library.
            force_download: whether to fetch what is there already.
            local_files_only: whether to look into the cache alone.
            token: of the Hub; the one that is logged in if not given.

        Raises:
            HubError: if the Hub cannot be reached, or has no such repository.
            ConfigError: if it holds no policy, or a wrong one.
            ArtefactError: if a file is missing or damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(
                str(pretrained_model_name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return super().from_pretrained(folder)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Save to a repository on the Hub; takes what the Hub's mixin takes.

        Args:
            repo_id: ``organisation/name``; made if there is none, private if ``private=True``.
            **settings: see :meth:`huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            HubError: if the Hub cannot be reached, or refuses.
        """
        with hub_errors(repo_id):
            return str(super().push_to_hub(repo_id, **settings))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **_: Any) -> Checkpoint:
        """A checkpoint from a folder, which :meth:`from_pretrained` has fetched if need be."""
        folder = Path(model_id)
        for link in links_out(folder):
            raise ArtefactError(
                f"{link} is a link that leads out of {folder}; put the file itself in its place."
            )
        policy = resolve_policy(folder)
        config = yaml.safe_load((folder / "policy.yaml").read_text(encoding="utf-8"))
        summary, tasks = config.get("summary", ""), config.get("tasks")
        return cls(policy, read_provenance(folder), summary, tasks, folder)

    def bound_to(self, folder: Path) -> Checkpoint:
        """The same checkpoint, its learned params read from the files of ``folder``."""
        parts = self.provenance, self.summary, self.tasks, folder
        if not is_dataclass(self.policy):  # a class without params
            return Checkpoint(self.policy, *parts)
        policy = cast("Any", self.policy)
        moved = {
            field.name: type(value)(folder / f"{field.name}{value.suffix}")
            for field in fields(policy)
            if isinstance(value := getattr(policy, field.name), Artefact)
        }
        return Checkpoint(replace(policy, **moved), *parts)


def finished_checkpoint(
    folder: Path, key: str, part: Literal["train", "tune"] = "train"
) -> Checkpoint | None:
    """The checkpoint that is in a folder already, if the training or tuning of this key made it.

    Raises:
        ArtefactError: if another one did.
    """
    if not (folder / "policy.yaml").is_file():
        return None
    if read_provenance(folder).get(part, {}).get("key") == key:
        return Checkpoint.from_pretrained(folder)
    raise ArtefactError(
        f"{folder} holds another checkpoint (of other data, params or settings); choose another "
        "folder, or delete this one."
    )


def made_once(
    folder: Path,
    key: str,
    make: Callable[[], Checkpoint],
    part: Literal["train", "tune"] = "train",
) -> Checkpoint:
    """The checkpoint of a key in a folder, made and saved if it is not there yet.

    The folder belongs to this process until then. What an unfinished making kept in it is removed
    in the end.

    Args:
        folder: of the checkpoint.
        key: what decides it; see :func:`finished_checkpoint`.
        make: makes it; may keep what it has so far in :func:`unfinished`.
        part: whether it is trained or tuned.

    Raises:
        InputError: if another process is at work in the folder.
        ArtefactError: if it holds another checkpoint.
    """
    with locked(folder):
        checkpoint = finished_checkpoint(folder, key, part)
        if checkpoint is None:
            made = make()
            made.save_pretrained(folder)
            checkpoint = made.bound_to(folder)
        shutil.rmtree(unfinished(folder, part), ignore_errors=True)
        return checkpoint


def unfinished(folder: Path, part: Literal["train", "tune"] = "train") -> Path:
    """Where a training or tuning keeps what it needs to resume."""
    return folder / {"train": ".training", "tune": ".tune"}[part]


def _plain(value: Any) -> Any:
    """A param as YAML can hold it."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return str(value) if isinstance(value, Path) else value
