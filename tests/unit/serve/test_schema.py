"""Schemathesis over the OpenAPI document: whatever it allows, and much that it does not, gives no 5xx."""

from __future__ import annotations

import warnings
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # schemathesis' own dependencies have some
def test_nothing_that_schemathesis_finds_is_a_server_error(live):
    schemathesis = pytest.importorskip("schemathesis")
    asked: dict[str, set[int]] = defaultdict(set)
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{live.port}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            try:
                explore(operation.as_strategy(generation_mode=mode), asked)
            except Unsatisfiable:  # an operation that takes nothing cannot be asked wrongly
                assert mode.is_negative
                assert operation.method == "get"
    assert len(asked) >= 10
    for path in ("/v1/embed/text", "/v1/search", "/v1/info"):
        assert 200 in asked[path], path
    assert 422 in asked["/v1/embed/text"]


def explore(strategy, asked) -> None:
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=strategy)
    def run(case):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = case.call(timeout=10)
        asked[case.operation.path].add(answer.status_code)
        assert answer.status_code < 500, answer.text

    run()
