"""`python -m bench.store_cost`: the cost of a command on PostgreSQL, by step, for the store and for bare psycopg.

Batches of 1, 10 and 100 commands are stored, offered and delivered, with a commit for each. CPU is that of the thread
that commits and of the server's process for the connection. An empty batch is a commit without a command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any, NamedTuple

import psycopg

from bench import database
from bench.durable import _records
from bench.postgres import DELETE, INSERT, TABLE, bare_row
from shim.config import settings
from shim.core.records import (
    CheckStore,
    CommandRecord,
    CommandState,
    MarkCommands,
    Operation,
    PutCommand,
    TraceEntry,
)
from shim.process import tune_gc
from shim.store.postgres.database import prepare
from shim.store.postgres.engine import PostgresEngine
from tests.support import postgres

ROUNDS = 5
COUNTS = {1: 300, 10: 2000, 100: 5000}
_WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8"
# The only other connection to the database is the one that is measured.
_PID = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND backend_type = 'client backend'"
)


class Cost(NamedTuple):
    """Microseconds of CPU and bytes of the write-ahead log, for each command."""

    client_us: float
    server_us: float
    wal_bytes: float


def _measured(url: str, count: int, work: Callable[[], None]) -> Cost:
    with psycopg.connect(url, autocommit=True) as observer:
        ((pid,),) = observer.execute(_PID).fetchall()

        def now() -> tuple[float, float, float]:
            server_ns = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
            ((wal_bytes,),) = observer.execute(_WAL).fetchall()
            return thread_time() * 1e6, server_ns / 1e3, wal_bytes

        before = now()
        work()
        return Cost(*((after - first) / count for first, after in zip(before, now(), strict=True)))


def _steps(records: Sequence[CommandRecord]) -> dict[str, list[list[Operation]]]:
    def marked(record: CommandRecord, state: CommandState, wall: float, attempts: int) -> list[Operation]:
        key, names = record.session, (record.id,)
        step = TraceEntry(wall, state.value, f"attempt {attempts}" if attempts else "")
        return [MarkCommands(key, names, state, step, attempts)]

    return {
        "stored": [[PutCommand(each)] for each in records],
        "offered": [marked(each, CommandState.OFFERED, 2.0, 1) for each in records],
        "delivered": [marked(each, CommandState.DELIVERED, 3.0, 0) for each in records],
        "empty batch": [[CheckStore()]],
    }


def through_store(url: str, records: Sequence[CommandRecord], batch: int) -> dict[str, Cost]:
    """Return the cost of each step of commands that go through the store's engine."""
    configured = settings.Store(url=url)
    prepare(configured)
    engine = PostgresEngine(configured, postgres.lease(url))
    engine.open()
    found = {}
    for name, submissions in _steps(records).items():
        batches = [submissions[first : first + batch] for first in range(0, len(submissions), batch)]
        batches *= 100 if name == "empty batch" else 1
        count = len(records) if len(submissions) > 1 else len(batches)

        def work(batches: Sequence[Any] = batches) -> None:
            for each in batches:
                engine.commit(each)

        found[name] = _measured(url, count, work)
    engine.close()
    return found


def bare(url: str, records: Sequence[CommandRecord], batch: int) -> dict[str, Cost]:
    """Return the cost of an insert and a delete for each command."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=1) as connection:
        connection.execute(TABLE)
        found = {}
        for name, statement in (("insert", INSERT), ("delete", DELETE)):

            def work(statement: str = statement) -> None:
                for first in range(0, len(records), batch):
                    rows = [bare_row(each) for each in records[first : first + batch]]
                    values = rows if statement is INSERT else [row[:2] for row in rows]
                    with connection.pipeline(), connection.transaction():
                        connection.cursor().executemany(statement, values)

            found[name] = _measured(url, len(records), work)
    return found


def main() -> None:
    """Print the medians of all rounds."""
    tune_gc()  # as the shim does
    print(f"{'batches of':<12}{'of':<14}{'step':<14}{'client':>10}{'server':>12}{'WAL':>12}")
    with database.running() as server:
        for batch, count in COUNTS.items():
            for name, measure in (("the store", through_store), ("bare psycopg", bare)):
                rounds = [measure(server.create(), _records(count), batch) for _ in range(ROUNDS)]
                medians = {
                    step: Cost(*map(median, zip(*(each[step] for each in rounds), strict=True))) for step in rounds[0]
                }
                whole = [each for step, each in medians.items() if step != "empty batch"]
                medians["all steps"] = Cost(*map(sum, zip(*whole, strict=True)))
                for step, cost in medians.items():
                    print(
                        f"{batch:<12}{name:<14}{step:<14}{cost.client_us:>7.1f} µs{cost.server_us:>9.1f} µs"
                        f"{cost.wal_bytes:>10.0f} B"
                    )


if __name__ == "__main__":
    main()
