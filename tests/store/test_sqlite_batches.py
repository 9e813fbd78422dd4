"""Batches on SQLite: few statements, with the outcomes of the same operations one by one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.records import AddTrace, CommandState, FindCommand, MarkCommands, Operation, PutResult, TraceEntry
from shim.store import schema
from shim.store.sqlite import SqliteDatabase, SqliteOperations
from tests.support.stores import KEY, put

Batch = Sequence[Sequence[Operation]]


def arrived(command_id: str, detail: str = "") -> list[Operation]:
    """A command with its first step, which its row holds if `detail` is its type."""
    operation = put(command_id)
    step = TraceEntry(operation.record.arrived_unix, "arrived", detail or operation.record.type)
    return [operation, AddTrace(KEY, (command_id,), step)]


def offered(command_id: str) -> list[Operation]:
    step = AddTrace(KEY, (command_id,), TraceEntry(5.0, "offered"))
    return [MarkCommands(KEY, (command_id,), CommandState.OFFERED, 5.0, 1), step]


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
        outcomes = store.carry_out_batch([arrived(f"k{number}") for number in range(count)])
        assert [outcome.seq for outcome in outcomes] == list(range(1, count + 1))
        assert not any(outcome.duplicate for outcome in outcomes)
        assert len(statements) <= most


NAMES = [f"k{number}" for number in range(6)]
submission = st.one_of(
    st.sampled_from(NAMES).map(arrived),
    st.sampled_from(NAMES).map(arrived),
    st.sampled_from(NAMES).map(lambda name: arrived(name, "another detail")),
    st.sampled_from(NAMES).map(offered),
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
