"""Servers that live as long as their tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fake_vllm import FakeVllm, Manners
from remote_worlds import local


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeVllm]]:
    """Starts servers of embedded models; the test's end is theirs."""
    with ExitStack() as stack:

        def start(name: str = "facts", manners: Manners | None = None, **more: Any) -> FakeVllm:
            return stack.enter_context(FakeVllm(local(name), name, manners, **more))

        yield start
