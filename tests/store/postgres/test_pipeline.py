"""Statements in a pipeline on a real server: values there and back, errors, and a connection that is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shim.config import settings

pytest.importorskip("psycopg")

from shim.store.postgres.database import connect
from shim.store.postgres.pipeline import ConnectionLost, Pipeline, StatementError
from tests.support import postgres as pg

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(120)]


@pytest.fixture
def pipeline(pg_url: str) -> Iterator[Pipeline]:
    made = Pipeline(connect(settings.Store(url=pg_url), "agent-shim test"), lambda: None)
    yield made
    made.close()


@pytest.mark.parametrize(
    "kind, value, back",
    [
        ("text", "plain", "plain"),
        ("text", "with\0NUL", "with␀NUL"),
        ("bigint", -(2**60), -(2**60)),
        ("double precision", 0.1, 0.1),
        ("bytea", b"\0\xff", b"\0\xff"),
        ("boolean", True, True),
    ],
)
def test_a_value_comes_back_as_it_was(pipeline: Pipeline, kind: str, value: Any, back: Any) -> None:
    assert pipeline.execute(f"SELECT ?1::{kind}", (value,)).fetchone() == (back,)


@pytest.mark.parametrize("count", [1, 3])
def test_rows_come_back_as_they_were(pipeline: Pipeline, count: int) -> None:
    rows = [("ü\0", -(2**60) + number, 0.1 * number, b"\0\xff" * number) for number in range(count)]
    answer = pipeline.execute_columns("SELECT * FROM unnest(?1, ?2, ?3, ?4)", "tifb", rows)
    assert answer.fetchall() == [("ü␀", *row[1:]) for row in rows]


def test_numbers_come_back_as_one_array(pipeline: Pipeline) -> None:
    answer = pipeline.execute("SELECT array_agg(g * ?1::bigint) FROM generate_series(-1, 1) g", (2**60,))
    assert answer.fetchone() == ((-(2**60), 0, 2**60),)


def test_several_statements_share_one_round_trip(pipeline: Pipeline) -> None:
    first, second = pipeline.execute("SELECT 1"), pipeline.execute("SELECT g FROM generate_series(1, 3) g")
    assert first.result is None
    assert [row[0] for row in second.fetchall()] == [1, 2, 3]
    assert first.result is not None
    assert (first.fetchone(), first.fetchone()) == ((1,), None)


def test_an_error_has_its_state_and_the_connection_goes_on(pipeline: Pipeline) -> None:
    pipeline.execute("BEGIN")
    pipeline.execute("SELECT 1 / ?1::bigint", (0,))
    with pytest.raises(StatementError) as refused:
        pipeline.sync()
    assert refused.value.state == "22012"
    pipeline.execute("ROLLBACK")
    pipeline.sync()
    assert pipeline.execute("SELECT 1 / ?1::bigint", (1,)).fetchone() == (1,)


def test_a_warning_is_noted(pipeline: Pipeline) -> None:
    pipeline.execute("COMMIT")  # outside of a transaction
    pipeline.sync()
    assert pipeline.warned


def test_a_connection_that_the_server_ends_is_lost(pipeline: Pipeline, pg_url: str) -> None:
    row = pipeline.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    pg.query(pg_url, f"SELECT pg_terminate_backend({row[0]})")
    with pytest.raises(ConnectionLost):
        pipeline.execute("SELECT 1").fetchone()


def test_a_server_that_does_not_answer_in_time_is_lost(pg_url: str) -> None:
    ticks: list[bool] = []
    pipeline = Pipeline(connect(settings.Store(url=pg_url), "agent-shim test"), lambda: ticks.append(True))
    pipeline.execute("SELECT pg_sleep(60)")
    with pytest.raises(ConnectionLost):
        pipeline.sync(limit_s=1.5)  # the tick comes each second
    assert ticks
    pipeline.close()
