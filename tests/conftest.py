"""What every test begins with."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shape_checks import check_shapes

# What is imported stays: to look through it for garbage takes a twentieth of the tests' time.
gc.disable()

# Before anything imports multicolm.
check_shapes(Path(__file__).parents[1] / "multicolm")

# What tests run by name is remembered in no list of the user's, nor in that of another run.
_STATE = tempfile.TemporaryDirectory()
os.environ["XDG_STATE_HOME"] = _STATE.name


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


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
