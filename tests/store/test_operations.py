"""The SQL of the operations: it stays quick while tables grow."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from shim.core.records import (
    AddTrace,
    CheckStore,
    CloseOutbox,
    CommandState,
    DeleteSession,
    FindCommand,
    LookUpCommand,
    MoveSession,
    Operation,
    Prune,
    PutOutbox,
    PutResult,
    ReadOutbox,
    RequeueCommand,
    SaveAlias,
    SaveSession,
    SaveTunnel,
    TraceEntry,
    WriteProbe,
)
from shim.errors import StoreError
from shim.store import schema, sqlite
from shim.store.operations import Operations
from tests.support.stores import KEY, OTHER, mark, put, session

STEP = TraceEntry(1.0, "arrived")
ALL: list[Operation] = [
    put("1"),
    put("1"),
    mark("1", CommandState.OFFERED, 1.0, attempts=1),
    RequeueCommand(KEY, "1", 1.0, 2.0),
    AddTrace(KEY, ("1", "2"), STEP),
    PutResult(KEY, "1", {}, 1.0),
    PutResult(KEY, "2", {}, 1.0),
    PutOutbox(KEY, "3", "", {}),
    ReadOutbox("default", 0, 10),
    CloseOutbox((1, 2), 2.0),
    SaveSession(session()),
    SaveAlias("default", "a", KEY),
    SaveTunnel(KEY, {}),
    MoveSession(KEY, OTHER),
    DeleteSession(OTHER),
    WriteProbe(1.0),
    CheckStore(),
    Prune(3.0),
]


def scans(operations: list[Operation]) -> set[str]:
    """The tables and indexes that operations read from end to end."""
    traced: list[str] = []
    with closing(schema.connect("file::memory:", 1.0)) as connection:
        schema.migrate(connection)
        connection.set_trace_callback(traced.append)
        Operations(sqlite.SqliteDatabase(connection)).carry_out(operations)
        connection.set_trace_callback(None)
        assert len(traced) >= len(operations)
        steps = [
            detail
            for statement in traced
            if not statement.startswith("PRAGMA")
            for *_, detail in connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
        ]
    assert any(step.startswith("SEARCH commands") for step in steps)
    return {step for step in steps if step.startswith("SCAN")}


def test_no_operation_reads_a_whole_table() -> None:
    # Results for unknown ids are few, and only `Prune` looks at all of them.
    assert scans(ALL) == {"SCAN unknown_results"}


def test_looking_a_command_up_reads_no_table_to_its_end() -> None:
    assert scans([put("1"), LookUpCommand(KEY, "1")]) == set()
    # `known` holds one row per session: the probes of the index that stand for a search in any session.
    assert scans([put("1"), FindCommand("1")]) == {"SCAN known"}


def test_without_a_write_ahead_log_there_is_no_store() -> None:
    with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(StoreError, match="write-ahead log"):
        sqlite._configure(connection)
