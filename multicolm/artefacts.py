"""What a policy has learned, as a param: a file that is read when it is first needed.

In YAML such a param is a path, beside the ``policy.yaml`` that names it. In Python it is made from
what was learned; saving the policy writes the file. Only safetensors and JSON: nothing is ever
unpickled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from multicolm.errors import ArtefactError
from multicolm.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Artefact", "Weights"]

T = TypeVar("T")


class Artefact(ABC, Generic[T]):
    """A learned thing that lives in a file of a checkpoint.

    Args:
        content: what was learned, or the path of the file that holds it.
    """

    suffix: ClassVar[str]
    """How the file's name ends, such as ``.safetensors``."""

    def __init__(self, content: T | str | Path) -> None:
        self.path = Path(content) if isinstance(content, str | Path) else None
        self._content: T | None = None if isinstance(content, str | Path) else content

    @property
    def content(self) -> T:
        """What was learned; read from the file when it is first asked for.

        Raises:
            ArtefactError: if the file is missing or damaged.
        """
        if self._content is None:
            assert self.path is not None
            if not self.path.is_file():
                raise ArtefactError(f"{self.path} is missing; keep a checkpoint's files together.")
            self._content = self.read(self.path)
        return self._content

    @classmethod
    @abstractmethod
    def read(cls, path: Path) -> T:
        """What a file holds.

        Raises:
            ArtefactError: if it is damaged.
        """

    @classmethod
    @abstractmethod
    def write(cls, content: T, path: Path) -> None:
        """Write a file; equal contents give equal bytes."""

    def save(self, path: Path) -> Artefact[T]:
        """Write the file, and return the same thing as read from there."""
        self.write(self.content, path)
        saved = type(self)(path)
        saved._content = self._content
        return saved

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Artefact)
            and type(self) is type(other)
            and (self is other or (self.path is not None and self.path == other.path))
        )

    def __hash__(self) -> int:
        return hash(self.path) if self.path is not None else id(self)

    def __repr__(self) -> str:
        where = f"{str(self.path)!r}" if self.path is not None else "..."
        return f"{type(self).__name__}({where})"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """A param takes an instance, or a path."""

        def make(value: object) -> Artefact[T]:
            if isinstance(value, cls):
                return value
            if isinstance(value, str | Path) and str(value):
                return cls(value)
            raise ValueError(f"must be the path of a {cls.suffix} file.")

        return core_schema.no_info_plain_validator_function(make)


class Weights(Artefact["Mapping[str, Tensor]"]):
    """Named tensors, in a safetensors file: ``Weights({"weight": torch.zeros(3, 96)})``."""

    suffix: ClassVar[str] = ".safetensors"

    def __getitem__(self, name: str) -> Tensor:
        """One tensor by name.

        Raises:
            ArtefactError: if there is none of that name.
        """
        if name not in self.content:
            known = ", ".join(sorted(self.content))
            raise ArtefactError(f"{self.path or 'these weights'}: no tensor '{name}'; has {known}.")
        return self.content[name]

    def __contains__(self, name: object) -> bool:
        return name in self.content

    @classmethod
    def read(cls, path: Path) -> Mapping[str, Tensor]:
        """See :meth:`Artefact.read`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path} cannot be read ({error}); is it whole?") from error

    @classmethod
    def write(cls, content: Mapping[str, Tensor], path: Path) -> None:
        """See :meth:`Artefact.write`."""
        import torch
        from safetensors.torch import save

        # Copies in one piece, as the format takes neither shared memory nor strides.
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in content.items()
        }
        write_whole(path, save(plain))
