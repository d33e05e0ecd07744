"""Requests that are made from the OpenAPI document, right and wrong ones, by schemathesis."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    status_code_conformance,
)
from serving_worlds import ask

from multicolm.serving.server import Server

CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_dict(ask(server, "/openapi.json").json)


POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("method", "path", "mode", "n"),
    [
        ("POST", "/v1/completions", POSITIVE, 20),
        ("POST", "/v1/completions", NEGATIVE, 30),
        ("POST", "/v1/chat/completions", POSITIVE, 20),
        ("POST", "/v1/chat/completions", NEGATIVE, 30),
        ("GET", "/v1/models/{name}", POSITIVE, 10),
        ("GET", "/v1/models", POSITIVE, 1),
        ("GET", "/metrics", POSITIVE, 1),
        ("GET", "/health", POSITIVE, 1),
        ("GET", "/", POSITIVE, 1),
    ],
)
def test_every_request_gets_an_answer_that_the_document_names(
    document: Any, server: Server, method: str, path: str, mode: GenerationMode, n: int
) -> None:
    operation = document[path][method]
    assert "422" not in operation.definition.raw["responses"]  # which is FastAPI's, not ours

    @settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        body = case.body
        name = body.get("model") if isinstance(body, dict) else None
        if isinstance(name, str) and len(name) <= 256:
            body["model"] = "tiny"  # of other names little would be read
            if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
                body["max_tokens"] = 1
        case.call_and_validate(base_url=server.address, checks=CHECKS)

    check()
