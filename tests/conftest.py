"""What every test begins with."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "multicolm"


def modules_with_shapes() -> list[str]:
    """The modules whose signatures name shapes; checking any other one costs time for nothing."""
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if "from jaxtyping import" in path.read_text()
    ]


# Before anything imports multicolm. On Python 3.10 beartype cannot read `**settings` with typed
# keys; there the tests run without it.
if sys.version_info >= (3, 11):
    install_import_hook(modules_with_shapes(), "beartype.beartype")


# What tests run by name is remembered in no list of the user's, nor in that of another run.
_STATE = tempfile.TemporaryDirectory()
os.environ["XDG_STATE_HOME"] = _STATE.name


@pytest.fixture(autouse=True)
def what_a_test_registers_ends_with_it() -> Iterator[None]:
    """Names that a test registers are unknown to the next one, in whatever order they run."""
    # Imported here: the hook has to come before multicolm.
    from multicolm.plugins import backends, metrics, policies

    registries = (backends, metrics, policies)
    before = [dict(registry._classes) for registry in registries]
    yield
    for registry, classes in zip(registries, before, strict=True):
        registry._classes.clear()
        registry._classes.update(classes)
