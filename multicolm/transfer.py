"""One folder to the Hugging Face Hub, or from there; what goes wrong is one sentence.

Only files of known kinds travel in either direction: nothing that is unpickled or run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub import errors as hub
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library

from multicolm.errors import HubError

__all__ = [
    "FILES",
    "RepoKind",
    "download",
    "folder_of",
    "hub_errors",
    "upload",
    "upload_saved",
]

RepoKind: TypeAlias = Literal["model", "dataset"]
"""Of a repository: routers and ensembles are models of the Hub, score tables are data sets."""

FILES: Sequence[str] = (
    *("*.yaml", "*.json", "*.md", "*.txt", "*.tree", "*.jinja"),
    *("*.safetensors", "*.gguf", "*.model"),
)
"""What travels: declarations, cards, weights and tokenizers; nothing that could hold code."""


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub's library raises into a :class:`multicolm.errors.HubError`.

    Args:
        repo: the repository, for the message.
    """
    try:
        yield
    except hub.HFValidationError as error:
        raise HubError(
            f"'{repo}' is no name of a repository on the Hub; one is written organisation/name."
        ) from error
    except hub.GatedRepoError as error:
        raise HubError(
            f"{repo} is open only to those who asked for it; ask on its page on the Hub, and log "
            "in with `hf auth login`."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no repository {repo} that you may see; check the name, and log in with "
            "`hf auth login` if it is private."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise HubError(
            f"{repo} has no such revision; give a commit, a tag or a branch that its page lists."
        ) from error
    except hub.LocalTokenNotFoundError as error:
        raise HubError(f"{repo}: not logged in to the Hub; run `hf auth login`.") from (error)
    except hub.HfHubHTTPError as error:
        raise HubError(_refusal(repo, error)) from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, HTTPError) as error:
        raise HubError(
            f"the Hub cannot be reached for {repo} ({_reason(error)}); nothing was changed. Try "
            "again with a network, or name a folder on this disk."
        ) from error


@contextmanager
def _no_hub(repo: str) -> Iterator[None]:
    """Turn what is raised over answers that are not the Hub's into a :class:`HubError`.

    The Hub's library takes answers as it expects them: a page to log in to a network, for example,
    makes it raise whatever comes of that.
    """
    try:
        with hub_errors(repo):
            yield
    except OSError as error:
        raise HubError(f"{repo} cannot be read or kept on this disk: {error}.") from error
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise HubError(
            f"what {constants.ENDPOINT} answers about {repo} is not what the Hub answers "
            f"({_reason(error)[:120]}); nothing was changed. See that this is the Hub, and no page "
            "to log in to a network."
        ) from error


def _refusal(repo: str, error: hub.HfHubHTTPError) -> str:
    code = error.response.status_code
    if code in (401, 403):
        return (
            f"the Hub does not let you do this with {repo}; log in with `hf auth login`, with a "
            "token that may write if you push."
        )
    said = error.server_message or _reason(error)
    return f"the Hub answers {code} for {repo}: {said}; try again later."


def _reason(error: BaseException) -> str:
    """What is behind an error of the Hub's library, in a few words."""
    cause: BaseException = error
    while isinstance(cause, hub.LocalEntryNotFoundError):
        behind = cause.__cause__ or cause.__context__
        if behind is None:
            return "offline mode is on, or files are missing in the cache"
        cause = behind
    if isinstance(cause, hub.OfflineModeIsEnabled):
        return "offline mode is on: HF_HUB_OFFLINE is set"
    lines = str(cause).splitlines()
    return lines[0].rstrip(".") if lines else type(cause).__name__


def upload(
    folder: Path,
    repo: str,
    kind: RepoKind = "model",
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
    files: Sequence[str] = FILES,
) -> str:
    """Make a folder's files the content of a repository, in one commit.

    Args:
        folder: that holds them.
        repo: its name; it is made if there is none.
        kind: of the repository.
        private: whether a repository that is made now is private; one that is there stays as it
            is.
        revision: a branch to write to; the main one if not given.
        message: of the commit.
        token: of the Hub; the one that is logged in if not given.
        files: patterns of what travels.

    Returns:
        The address of the repository.

    Raises:
        HubError: if the Hub cannot be reached, or refuses.
    """
    with _no_hub(repo):
        api = HfApi(token=token)
        made = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            repo_type=kind,
            folder_path=folder,
            revision=revision,
            commit_message=message or "Push with multicolm",
            allow_patterns=list(files),
        )
        return str(made)


def upload_saved(
    save: Callable[[Path], object],
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """:func:`upload` of what ``save`` writes into a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        save(Path(folder))
        return upload(
            Path(folder), repo, private=private, revision=revision, message=message, token=token
        )


def folder_of(
    source: str | Path,
    kind: RepoKind = "model",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """A folder on this disk, or that of a repository which is fetched from the Hub.

    Raises:
        HubError: if there is no such folder, and the Hub cannot be reached or has no such
            repository.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    return download(str(source), kind, revision=revision, token=token)


def download(
    repo: str,
    kind: RepoKind = "model",
    *,
    folder: Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Fetch the files of known kinds of a repository.

    Args:
        repo: its name.
        kind: of the repository.
        folder: where to; the Hub's cache if not given.
        revision: commit, tag or branch.
        cache_dir: of the Hub's cache.
        force_download: whether to fetch what is there already.
        local_files_only: whether to use the cache alone.
        token: of the Hub; the one that is logged in if not given.

    Returns:
        The folder that holds them.

    Raises:
        HubError: if the Hub cannot be reached, or has no such repository.
    """
    with _no_hub(repo):
        if folder is not None:
            # The Hub's library takes a folder that is there for the repository if it cannot see it.
            wanted = revision or constants.DEFAULT_REVISION
            info = HfApi(token=token).repo_info(repo, repo_type=kind, revision=wanted)
            revision = info.sha
        found = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            local_dir=folder,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=list(FILES),
        )
    return Path(str(found))
