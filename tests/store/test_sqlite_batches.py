"""Batches on SQLite: few statements, with the outcomes of the same operations one by one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.records import CommandState, FindCommand, Operation, PutResult, TraceEntry
from shim.store import schema
from shim.store.sqlite import SqliteDatabase, SqliteOperations
from tests.support.stores import KEY, mark, put

Batch = Sequence[Sequence[Operation]]


OFFERED = TraceEntry(5.0, "offered", "attempt 1")


@contextmanager
def operations() -> Iterator[tuple[SqliteOperations, list[str]]]:
    """Operations on a database in memory, and the statements that it carries out."""
    statements: list[str] = []
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        schema.migrate(connection)
        connection.set_trace_callback(statements.append)
        yield SqliteOperations(SqliteDatabase(connection)), statements


def contents(store: SqliteOperations, names: Sequence[str]) -> list[Any]:
    """What is stored of commands, without the numbers of their rows, which may have gaps, but in their order."""
    found = [each for name in names for each in store.carry_out([FindCommand(name)])]
    by_number = sorted(found, key=lambda each: each.record.seq)
    return [(each.record.id, each.record.state, each.record.attempts, each.result, each.trace) for each in by_number]


def plain(outcome: Any, seqs: dict[str, int]) -> Any:
    """An outcome, with the first occurrence of a number in place of the number."""
    if not hasattr(outcome, "duplicate"):
        return outcome
    return seqs.setdefault(str(outcome.seq), len(seqs)), outcome.duplicate, outcome.state, outcome.result


@pytest.mark.parametrize("count, most", [(1, 1), (32, 1), (100, 5), (256, 8)])
def test_commands_that_arrive_together_take_few_statements(count: int, most: int) -> None:
    with operations() as (store, statements):
        outcomes = store.carry_out_batch([[put(f"k{number}")] for number in range(count)])
        assert [outcome.seq for outcome in outcomes] == list(range(1, count + 1))
        assert not any(outcome.duplicate for outcome in outcomes)
        assert len(statements) <= most


NAMES = [f"k{number}" for number in range(6)]
submission = st.one_of(
    st.sampled_from(NAMES).map(lambda name: [put(name)]),
    st.sampled_from(NAMES).map(lambda name: [put(name, offered=OFFERED, state=CommandState.OFFERED, attempts=1)]),
    st.sampled_from(NAMES).map(lambda name: [mark(name, CommandState.OFFERED, 5.0, attempts=1)]),
    st.sampled_from(NAMES).map(lambda name: [PutResult(KEY, name, {"success": True}, 6.0)]),
)


@given(st.lists(st.lists(submission, max_size=12), max_size=4))
def test_a_batch_is_the_same_as_its_submissions_one_by_one(batches: list[Batch]) -> None:
    with operations() as (together, _), operations() as (alone, _):
        numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for batch in batches:
            found = [plain(each, numbers[0]) for each in together.carry_out_batch(batch)]
            wanted = [plain(alone.carry_out(each), numbers[1]) for each in batch]
            assert [each for each in found if isinstance(each, tuple)] == [
                each for each in wanted if isinstance(each, tuple)
            ]
        assert contents(together, NAMES) == contents(alone, NAMES)
