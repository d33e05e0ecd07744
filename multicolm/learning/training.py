"""What a policy's ``fit`` is given besides the score table, and what it reports back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from multicolm.config.document import Document
from multicolm.config.wording import Strict, check
from multicolm.learning.snapshots import Snapshots

__all__ = ["Training"]

S = TypeVar("S", bound=Strict)


@dataclass
class Training:
    """One call of ``fit``.

    Attributes:
        options: of the training, as the user gave them.
        folder: where the state of an unfinished training is kept; ``None`` keeps none.
        on_progress: called with how much is done, of how much, and what is being done.
        save_every: seconds between two states.
        report: what is worth knowing of the result: numbers and texts by name.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    on_progress: Callable[[float, float, str], None] = lambda done, total, label: None
    save_every: float = 5.0
    report: dict[str, Any] = field(default_factory=dict)

    def settings(self, cls: type[S]) -> S:
        """The options as settings of a kind.

        Raises:
            ConfigError: if one is unknown or out of range; the message offers the nearest one.
        """
        settings, problems = check(cls, dict(self.options))
        if settings is None or problems:
            raise Document("training options").error(problems)
        return settings

    def snapshots(self, *facts: object) -> Snapshots:
        """Where to keep the state of a training that depends on these facts."""
        key = hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode()).hexdigest()
        return Snapshots(self.folder, key)
