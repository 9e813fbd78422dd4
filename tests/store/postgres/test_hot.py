"""The most frequent operations: the plans of their statements, and their order in a batch."""

from __future__ import annotations

import pytest

from shim.core.records import (
    AddTrace,
    CloseOutbox,
    CommandState,
    FindCommand,
    MoveSession,
    Operation,
    Prune,
    PutResult,
    ReadOutbox,
    SessionKey,
    TraceEntry,
)

pytest.importorskip("psycopg")

from shim.config import settings
from shim.store.postgres.database import prepare
from shim.store.postgres.engine import PostgresEngine
from tests.support import postgres as pg
from tests.support.postgres_stores import client_of, stored
from tests.support.stores import KEY, OTHER, mark, put

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


def test_no_operation_of_a_command_reads_a_whole_table(pg_url: str) -> None:
    """Also with plans that were made while the tables were empty."""
    scans = "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ('commands', 'traces', 'outbox')"
    pg.store(pg_url, list)
    before = sorted(pg.query(pg_url, scans))
    client = client_of(pg_url)
    names = [str(number) for number in range(300)]
    for name in names:
        client.submit(put(name))
    for state in (CommandState.OFFERED, CommandState.DELIVERED):
        for name in names:
            client.submit(mark(name, state, 2.0, attempts=1))
    for name in names:
        client.submit(PutResult(KEY, name, {}, 3.0), AddTrace(KEY, (name,), TraceEntry(3.0, "result")))
    entries = client.one(ReadOutbox("default", 0, 1000))
    assert len(entries) == 300
    client.run(CloseOutbox(tuple(entry.seq for entry in entries), 4.0), FindCommand("7"), Prune(500.0))
    client.close()
    assert sorted(pg.query(pg_url, scans)) == before
    assert stored(pg_url) == []


@pytest.mark.parametrize(
    "later, left", [(FindCommand("1"), [KEY]), (MoveSession(KEY, OTHER), [OTHER]), (Prune(99.0), [])]
)
@pytest.mark.parametrize("together", [False, True])
def test_what_follows_in_a_batch_finds_the_step_of_a_command_that_is_not_stored(
    pg_url: str, later: Operation, left: list[SessionKey], together: bool
) -> None:
    """Such a step becomes a row when its operation is finished. One submission or two make no difference."""
    configured = settings.Store(url=pg_url)
    prepare(configured)
    engine = PostgresEngine(configured, pg.lease(pg_url))
    engine.open()
    step = AddTrace(KEY, ("1",), TraceEntry(98.0, "reported", "queue_full"))
    outcomes = engine.commit([[put("2")], *([[step, later]] if together else [[step], [later]]), [put("3")]])
    if later == FindCommand("1") and not together:
        assert [each.trace for each in outcomes[2]] == [[step.entry]]
    (found,) = engine.commit([[FindCommand("1")]])
    assert [(each.record.session, each.trace) for each in found] == [(key, [step.entry]) for key in left]
    engine.close()
    assert stored(pg_url) == ["2", "3"]
