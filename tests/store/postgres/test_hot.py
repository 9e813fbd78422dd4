"""Plans of the most frequent statements."""

from __future__ import annotations

import pytest

from shim.core.records import (
    AddTrace,
    CloseOutbox,
    CommandState,
    FindCommand,
    MarkCommands,
    Prune,
    PutResult,
    ReadOutbox,
    TraceEntry,
)

pytest.importorskip("psycopg")

from tests.support import postgres as pg
from tests.support.postgres_stores import client_of, stored
from tests.support.stores import KEY, put

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


def test_no_operation_of_a_command_reads_a_whole_table(pg_url: str) -> None:
    """Also with plans that were made while the tables were empty."""
    scans = "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ('commands', 'traces', 'outbox')"
    pg.store(pg_url, list)
    before = sorted(pg.query(pg_url, scans))
    client = client_of(pg_url)
    names = [str(number) for number in range(300)]
    for name in names:
        client.submit(put(name), AddTrace(KEY, (name,), TraceEntry(100.0, "arrived", "exec")))
    for state in (CommandState.OFFERED, CommandState.DELIVERED):
        for name in names:
            client.submit(MarkCommands(KEY, (name,), state, 2.0, 1), AddTrace(KEY, (name,), TraceEntry(2.0, "step")))
    for name in names:
        client.submit(PutResult(KEY, name, {}, 3.0), AddTrace(KEY, (name,), TraceEntry(3.0, "result")))
    entries = client.one(ReadOutbox("default", 0, 1000))
    assert len(entries) == 300
    client.run(CloseOutbox(tuple(entry.seq for entry in entries), 4.0), FindCommand("7"), Prune(500.0))
    client.close()
    assert sorted(pg.query(pg_url, scans)) == before
    assert stored(pg_url) == []
