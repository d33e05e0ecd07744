"""What can go wrong, as one tree. A message says where, what, what was allowed, what to do next.

    MulticolmError                 anything a user can mend; the command line prints one sentence
    ├── ConfigError                a file or a value that the user wrote (file, line, column)
    │   └── UnknownNameError       a name that no catalogue or registry holds
    ├── ModelError                 weights that are missing, unsafe to load, or of a kind not served
    ├── CapabilityError            a policy asks for what a model or a schedule cannot give
    ├── VocabularyError            tokenizers that cannot be joined, or not be turned into bytes
    ├── ArtefactError              a file of a score table or a checkpoint: missing, damaged, of
    │                              other models or other data
    ├── HubError                   the Hugging Face Hub cannot be reached, or refuses
    ├── TrainingError              training cannot continue: the loss is no number, nothing to learn
    ├── InputError                 a prompt or a setting of one call (empty, too long, out of range)
    ├── PolicyError                a policy broke its contract while the text was being written
    ├── ServerError                a server that runs a model: gone, stalled, refusing, changed
    ├── BusyError                  this server has no place for another text just now
    └── ClosedError                this server is shutting down, or has

Bugs of multicolm itself are not in this tree: they keep their traceback. What is allowed and has to
be known is a :class:`MulticolmWarning`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ArtefactError",
    "BusyError",
    "CapabilityError",
    "ClosedError",
    "ConfigError",
    "HubError",
    "InputError",
    "ModelError",
    "MulticolmError",
    "MulticolmWarning",
    "PolicyError",
    "ServerError",
    "TrainingError",
    "UnknownNameError",
    "VocabularyError",
    "shorten",
    "unknown",
]


class MulticolmError(Exception):
    """Something that the user can mend. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class ConfigError(MulticolmError):
    """A file or a value that the user wrote is not what it should be."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A name that no catalogue or registry holds; the message offers the nearest known one."""


class ModelError(MulticolmError):
    """A model cannot be loaded, or cannot be served rightly and is refused by name."""


class CapabilityError(MulticolmError):
    """A policy needs a signal, a model or a schedule that this ensemble cannot give."""


class VocabularyError(MulticolmError):
    """The tokenizers of an ensemble do not fit together, or one cannot be turned into bytes."""


class ArtefactError(MulticolmError):
    """A file of a score table or a checkpoint is missing, damaged, or made for something else."""


class HubError(MulticolmError):
    """The Hugging Face Hub cannot be reached, or refuses what was asked of it."""


class TrainingError(MulticolmError):
    """Training cannot continue: the loss is no number, or there is nothing to learn from."""


class InputError(MulticolmError):
    """A prompt or a setting of one call cannot be used."""

    exit_code = 2


class ServerError(MulticolmError):
    """A server that runs a model does not answer, or not as it did when it was probed.

    Attributes:
        server: its address.
        status: the HTTP status it answered with; ``None`` if it did not come to that.
        answers: of a call of ``generate``: the answers that were finished before.
        kept: what the message says last: what was kept.
    """

    def __init__(self, message: str, *, server: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.server = server
        self.status = status
        self.answers: Sequence[object] = ()
        self.kept = ""

    def keeping(self, what: str) -> None:
        """Let the message end with what was kept, in the place of what it ended with before."""
        self.kept = what

    def __str__(self) -> str:
        return f"{self.args[0]} {self.kept}".rstrip()


class MulticolmWarning(UserWarning):
    """What is allowed and has to be known, such as how a policy treats what a server hides."""


class PolicyError(MulticolmError):
    """A policy broke its contract: a wrong shape, no such model, an undeclared signal."""


class BusyError(MulticolmError):
    """A server has no place for another text just now.

    Attributes:
        retry_after: in how many seconds it is worth asking again.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(MulticolmError):
    """A server is shutting down, or has."""


def unknown(noun: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known: the nearest known name, then all of them.

    >>> unknown("policy", "entrpy", ["entropy", "single"])
    "unknown policy 'entrpy'. Did you mean 'entropy'? Known: entropy, single."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    listing = ", ".join(names) if names else "none"
    return f"unknown {noun} '{shorten(name)}'.{hint} Known: {listing}."


def shorten(text: str, most: int = 100) -> str:
    """A text of somebody else as messages repeat it: at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
