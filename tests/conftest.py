"""What every test begins with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def what_a_test_registers_ends_with_it() -> Iterator[None]:
    """Names that a test registers are unknown to the next one, in whatever order they run."""
    # Imported here: jaxtyping has to come before multicolm.
    from multicolm.plugins import backends, metrics, policies

    registries = (backends, metrics, policies)
    before = [dict(registry._classes) for registry in registries]
    yield
    for registry, classes in zip(registries, before, strict=True):
        registry._classes.clear()
        registry._classes.update(classes)
