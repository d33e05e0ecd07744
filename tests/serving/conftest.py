"""The embedded ensemble behind a real socket, and the same once more to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from serving_worlds import running

import multicolm
from multicolm import Ensemble
from multicolm.serving.server import Server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with running(multicolm.load("tiny")) as server:
        yield server


@pytest.fixture(scope="package")
def alone() -> Ensemble:
    """The same models, asked in the usual way."""
    return multicolm.load("tiny")


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        yield client
