"""Policies that are Python code of the user's: where their classes come from, and when it runs.

A file is run if the user names it, as in ``--policy file.py:Class``. A checkpoint of such a policy
holds a copy of the file and names it in its ``policy.yaml``. The copy is run only if the user has
named a file with the same bytes before on this machine (a list of digests remembers that, as
Jupyter and direnv keep one), or says so with ``multicolm show CHECKPOINT --trust`` or in the
environment variable ``MULTICOLM_TRUST_CODE``. So no code comes from the Hub unasked.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from multicolm.errors import ConfigError, MulticolmError, UnknownNameError, unknown
from multicolm.plugins import policies

__all__ = [
    "CodeFile",
    "code_of",
    "is_code",
    "policy_class",
    "run_named_file",
    "split_address",
    "trust",
    "with_absolute_code",
]

_TRUST_VARIABLE = "MULTICOLM_TRUST_CODE"
_named: set[str] = set()  # digests of files that were named in this process
_files: dict[str, CodeFile] = {}  # per module that was made of a file


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A file of Python code.

    Attributes:
        path: where it is.
        text: what was read there, and is run.
    """

    path: Path
    text: bytes

    @classmethod
    def read(cls, path: Path) -> CodeFile:
        """Read a file.

        Raises:
            ConfigError: if there is none.
        """
        try:
            return cls(path, path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}).") from error

    @property
    def digest(self) -> str:
        """SHA-256 of its bytes."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def is_trusted(self) -> bool:
        """Whether the user has named a file with these bytes."""
        in_environment = os.environ.get(_TRUST_VARIABLE, "").replace(",", " ").split()
        return self.digest in {*_named, *in_environment, *_remembered()}


def is_code(kind: str) -> bool:
    """Whether a policy's kind is ``file.py:Class``."""
    return ".py:" in kind


def split_address(address: str) -> tuple[Path, str]:
    """File and class of ``file.py:Class``."""
    path, _, name = address.rpartition(":")
    return Path(path).expanduser(), name


def with_absolute_code(kind: str, base_dir: Path) -> str:
    """The same kind; a file's path starts from ``base_dir``."""
    if not is_code(kind):
        return kind
    path, name = split_address(kind)
    return f"{(base_dir / path).absolute()}:{name}"


def run_named_file(path: Path) -> ModuleType:
    """Run a file that the user has named, and remember that for the copies in checkpoints.

    Raises:
        ConfigError: if there is no such file, or it fails.
    """
    file = CodeFile.read(path)
    module = _run(file)
    trust(file)
    return module


def policy_class(kind: str) -> type:
    """The class of a kind: a known name, or ``file.py:Class`` if that file may be run.

    ``module:Class`` is a class of a module that is imported already; none is imported for it.

    Raises:
        UnknownNameError: if there is no such kind or class.
        ConfigError: if the file is missing, fails, or was never named by the user.
    """
    if kind in policies or ":" not in kind:
        return policies.get(kind)
    if is_code(kind):
        path, name = split_address(kind)
        file = CodeFile.read(path)
        if not file.is_trusted:
            raise ConfigError(
                f"{file.path} is code that comes with this policy and was not run here before. "
                f"Read it; `multicolm show {file.path.parent} --trust` then allows it, and so does "
                f"naming it yourself ({file.path}:{name})."
            )
        module: ModuleType | None = _run(file)
    else:
        module_name, _, name = kind.rpartition(":")
        module = sys.modules.get(module_name)
        if module is None:
            raise UnknownNameError(
                f"policy '{kind}' is a class of the Python module {module_name}, which is not "
                "imported; import it before, or train and tune with --policy file.py:Class, which "
                "keeps the code."
            )
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        own = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UnknownNameError(f"policy {kind}: " + unknown("policy class", name, own))
    return cls


def code_of(cls: type) -> CodeFile | None:
    """The file that was run for a class; ``None`` if it is of an imported module."""
    return _files.get(cls.__module__)


def trust(file: CodeFile) -> None:
    """Remember that the user allows this code to be run."""
    is_new = not file.is_trusted
    _named.add(file.digest)
    if is_new:
        try:
            _trust_file().parent.mkdir(parents=True, exist_ok=True)
            with _trust_file().open("a", encoding="utf-8") as stream:
                stream.write(f"{file.digest}  {file.path.absolute()}\n")
        except OSError:
            pass  # Without a place to remember it, it holds for this process.


def _trust_file() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "multicolm" / "trusted-code"


def _remembered() -> set[str]:
    try:
        lines = _trust_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {line.split()[0] for line in lines if line.strip()}


def _run(file: CodeFile) -> ModuleType:
    """The module of a file; what was run once is not run again.

    Raises:
        ConfigError: naming the line that failed.
    """
    place = hashlib.sha256(f"{file.path.absolute()} {file.digest}".encode()).hexdigest()[:12]
    name = f"multicolm_policy_{file.path.stem}_{place}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file.path)
    # pydantic looks annotations up in the module that a class says it is from.
    sys.modules[name] = module
    _files[name] = file
    try:
        # Not by an import: that would run a compiled file that lies beside it.
        exec(compile(file.text, str(file.path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name], _files[name]
        if isinstance(error, MulticolmError):
            raise
        where = _line_in(file.path, error)
        raise ConfigError(f"{file.path}{where}: {type(error).__name__}: {error}") from error
    return module


def _line_in(path: Path, error: Exception) -> str:
    """``, line 3`` for the last line of a file that an error went through."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"
