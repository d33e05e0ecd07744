"""Which of the things that can be shared a folder holds; push and pull of any of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from huggingface_hub.errors import RepositoryNotFoundError

from multicolm import catalog
from multicolm.config import load_ensemble
from multicolm.config.policy import declared_code
from multicolm.errors import ArtefactError, ConfigError, HubError, InputError
from multicolm.files import leads_out, write_whole
from multicolm.hub.saved import SharedEnsemble, SharedScores
from multicolm.training.checkpoint import Checkpoint
from multicolm.transfer import download, upload_saved

__all__ = ["Kind", "Shared", "kind_of", "pull", "push"]

_CACHE = ".cache"  # where the Hub's library notes what it has fetched into a folder

Kind: TypeAlias = Literal["router", "ensemble", "score table"]
"""A policy with what it has learned; models that write together; what models gave to a corpus."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What was pushed or pulled.

    Attributes:
        kind: what it is.
        place: the repository's address, or the folder.
        warnings: what one has to know before using it, one sentence each.
    """

    kind: Kind
    place: str
    warnings: tuple[str, ...] = ()

    @property
    def noun(self) -> str:
        """The kind with its article, for sentences."""
        return f"an {self.kind}" if self.kind == "ensemble" else f"a {self.kind}"


def kind_of(folder: Path) -> Kind:
    """What a folder holds, by its files.

    Raises:
        ArtefactError: if it is nothing that can be shared.
    """
    if (folder / "index.json").is_file() and (folder / "text").is_dir():
        return "score table"
    # An ensemble whose base model was trained is the checkpoint of that training.
    if (folder / "policy.yaml").is_file():
        return "router"
    if (folder / "ensemble.yaml").is_file():
        return "ensemble"
    raise ArtefactError(
        f"{folder} holds nothing that multicolm shares: neither a policy.yaml (a router), nor an "
        "ensemble.yaml, nor a score table's index.json and text/."
    )


def push(
    source: str | Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    with_models: bool = False,
    results: Path | None = None,
    license: str = "",
) -> Shared:
    """Push a router, an ensemble or a score table to the Hub, with its card.

    Args:
        source: a folder; or an ensemble, by its file or its name in the catalogue.
        repo: ``organisation/name``; made if there is none.
        private: whether a repository that is made now is private.
        revision: a branch to write to.
        message: of the commit.
        with_models: of an ensemble, whether models go along that lie elsewhere on this disk.
        results: of an ensemble, folder of a comparison whose table the card shows.
        license: for the card; a router's is written when it is trained.

    Raises:
        HubError: if the Hub cannot be reached, or refuses.
        ArtefactError: if it is nothing that can be shared, or damaged.
        ConfigError: if it is wrong, or would not work elsewhere.
        InputError: if something was asked for that it does not have.
    """
    folder = Path(source)
    kind: Kind = kind_of(folder) if folder.is_dir() else "ensemble"
    if kind != "ensemble" and (with_models or results is not None):
        raise InputError(
            f"{source} is a {kind}; models and results go along with an ensemble only."
        )
    if kind == "router":
        if license:
            raise InputError(f"{source} is a router, whose licence `multicolm train` writes.")
        return Shared(kind, _push_router(folder, repo, private, revision, message))
    shared: SharedEnsemble | SharedScores
    if kind == "score table":
        shared = SharedScores(folder, license=license)
    else:
        # Read as the folder's own file, wherever that may come to lie.
        where = folder / "ensemble.yaml" if folder.is_dir() else source
        shared = SharedEnsemble(where, with_models=with_models, results=results, license=license)
    place = shared.push_to_hub(repo, private=private, revision=revision, commit_message=message)
    return Shared(kind, place)


def _push_router(
    folder: Path, repo: str, private: bool, revision: str | None, message: str | None
) -> str:
    if (folder / "ensemble.yaml").is_file():
        _refuse_elsewhere(folder)
    checkpoint = Checkpoint.from_pretrained(folder)
    return upload_saved(
        checkpoint.save_pretrained, repo, private=private, revision=revision, message=message
    )


def _refuse_elsewhere(folder: Path) -> None:
    """Refuse a trained ensemble whose other models lie where nobody else has them.

    Raises:
        ConfigError: naming the model.
    """
    config = load_ensemble(folder / "ensemble.yaml")
    for name, model in config.models.items():
        resolved = model.resolved
        is_named = not resolved.is_local or model.model in catalog.names("models")
        if not is_named and leads_out(Path(resolved.location), folder):
            raise ConfigError(
                f"model '{name}' lies in {resolved.location}, on this machine only; push it to "
                f"the Hub and name it by its id in {folder / 'ensemble.yaml'}."
            )


def pull(repo: str, folder: str | Path, *, revision: str | None = None) -> Shared:
    """Fetch a router, an ensemble or a score table from the Hub, and see that it is whole.

    Args:
        repo: ``organisation/name``.
        folder: that is not there, or empty, or was begun by the same command.
        revision: commit, tag or branch.

    Raises:
        HubError: if the Hub cannot be reached, or has no such repository.
        ArtefactError: if it is nothing that multicolm shares, or damaged.
        ConfigError: if it is wrong, or an ensemble that would run code of others.
        InputError: if the folder holds something else.
    """
    target = Path(folder)
    _claim(target, repo)
    try:
        download(repo, "model", folder=target, revision=revision)
    except HubError as error:
        # A score table is a repository of data.
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
        download(repo, "dataset", folder=target, revision=revision)
    kind = kind_of(target)
    if kind == "score table":
        SharedScores.from_pretrained(target)
        return Shared(kind, str(target))
    return Shared(kind, str(target), tuple(_check_declared(target, kind)))


def _check_declared(folder: Path, kind: Kind) -> list[str]:
    """Read what the YAML files say; one that would run code of others is put out of use.

    Returns:
        To which servers what one asks would go, and which code was not run, one sentence each.

    Raises:
        MulticolmError: naming what is wrong.
    """
    servers: list[str] = []
    if (folder / "ensemble.yaml").is_file():
        try:
            models = SharedEnsemble.from_pretrained(folder).config.models
            servers = [
                f"model '{name}' runs in a server at {model.url}: what you ask goes there."
                for name, model in models.items()
                if model.url is not None
            ]
        except ConfigError as error:
            (folder / "ensemble.yaml").rename(folder / "ensemble.yaml.refused")
            raise ConfigError(f"{error} It is kept as ensemble.yaml.refused.") from error
    code = declared_code(folder / "policy.yaml") if kind == "router" else None
    if code is not None and not code.is_trusted:
        return [
            *servers,
            f"it comes with its own code, {code.path}, which is not run unless you allow it: "
            f"read it, then `multicolm show {folder} --trust`.",
        ]
    if kind == "router":
        for value in Checkpoint.from_pretrained(folder).policy.as_config()["params"].values():
            _ = getattr(value, "content", None)  # read now what would be missed only later
    return servers


def _claim(folder: Path, repo: str) -> None:
    """Take a folder for one repository, whose files no others are to be mixed with.

    Raises:
        InputError: if it holds files already, and not of that repository.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder to pull into.")
    claim = folder / _CACHE / "huggingface" / "multicolm-repository"
    is_empty = not folder.exists() or all(path.name == _CACHE for path in folder.iterdir())
    if not is_empty and not (claim.is_file() and claim.read_text(encoding="utf-8") == repo):
        raise InputError(
            f"{folder} is not empty, and what it holds is not from {repo}; name another folder to "
            "pull into."
        )
    write_whole(claim, repo)
