"""Schemathesis over the OpenAPI document: whatever the document allows, and much that it does not, gives no 5xx."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow
def test_nothing_that_schemathesis_finds_is_a_server_error(live):
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{live.port}/openapi.json")
    asked: dict[str, set[int]] = {}
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @schemathesis.pytest.parametrize if False else (lambda function: function)
        def unused():
            pass

        strategy = operation.as_strategy()
        check(strategy, asked)
    assert len(asked) >= 10
    assert any(200 in statuses for path, statuses in asked.items() if path.startswith("/v1/embed"))
    assert not {status for statuses in asked.values() for status in statuses if status >= 500}


def check(strategy, asked):
    from hypothesis import given

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=strategy)
    def run(case):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = case.call()
        asked.setdefault(case.operation.path, set()).add(answer.status_code)
        assert answer.status_code < 500, answer.text

    run()
