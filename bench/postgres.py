"""The store on PostgreSQL against bare psycopg, and against the file.

A command that finds a held poll is stored as offered, then delivered: two submissions, each confirmed before the next
comes. One that waits for a poll is stored, offered, delivered: three. Bare psycopg inserts a row of the same columns
and deletes it, in pipelines of as many commands as are outstanding, with a commit for each of the two: the least that a
durable queue can do.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import psycopg
from msgspec.structs import replace

from bench import database
from bench.durable import _records
from bench.figures import Figure, Log, compared
from bench.servers import Bench
from shim.core.records import CommandRecord, CommandState, MarkCommands, Operation, PutCommand, TraceEntry
from shim.ports import CommandStore
from shim.process import tune_gc
from shim.store.sqlite import SqliteStore
from tests.support import postgres

PART = database.STORE_PART
ROUNDS = 5
OUTSTANDING = {1: 300, 10: 3000, 100: 10_000}
AIMS = {1: 0.5, 10: 0.8, 100: 0.6}
TABLE = (
    "CREATE TABLE IF NOT EXISTS bare (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, session text, id text,"
    " request_id text, state text, attempts bigint, arrived float8, expires float8, type text, created_at text,"
    " payload bytea, UNIQUE (session, id))"
)
INSERT = (
    "INSERT INTO bare (session, id, request_id, state, attempts, arrived, expires, type, created_at, payload)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
)
DELETE = "DELETE FROM bare WHERE session = %s AND id = %s"


def through_store(
    make: Callable[[Any], CommandStore], records: Sequence[CommandRecord], outstanding: int, *, held: bool
) -> float:
    """Commands per second, each stored, offered and delivered. If `held`, a held poll waits for each."""
    posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
    store = make(posted.put)
    store.open()
    coming = list(reversed(records))
    done = 0

    def steps(record: CommandRecord) -> list[Operation]:
        key, name = record.session, (record.id,)
        offer = TraceEntry(2.0, "offered", "attempt 1")
        delivered = MarkCommands(key, name, CommandState.DELIVERED, TraceEntry(3.0, "delivered"))
        if held:
            return [delivered, PutCommand(replace(record, state=CommandState.OFFERED, attempts=1), offer)]
        return [delivered, MarkCommands(key, name, CommandState.OFFERED, offer, attempts=1), PutCommand(record)]

    def go_on(left: list[Operation]) -> None:
        nonlocal done
        if left:
            store.submit(left.pop(), done=lambda _outcome: go_on(left))
            return
        done += 1
        if coming:
            go_on(steps(coming.pop()))

    started_s = time.perf_counter()
    for _ in range(outstanding):
        go_on(steps(coming.pop()))
    while done < len(records):
        posted.get()()
    took_s = time.perf_counter() - started_s
    store.close()
    return len(records) / took_s


def bare(url: str, records: Sequence[CommandRecord], outstanding: int) -> float:
    """Commands per second, each inserted and deleted."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=1) as connection:
        connection.execute(TABLE)
        connection.execute("TRUNCATE bare")
        started_s = time.perf_counter()
        for first in range(0, len(records), outstanding):
            batch = records[first : first + outstanding]
            with connection.pipeline(), connection.transaction():
                connection.cursor().executemany(INSERT, [bare_row(each) for each in batch])
            with connection.pipeline(), connection.transaction():
                connection.cursor().executemany(DELETE, [(str(each.session), each.id) for each in batch])
        return len(records) / (time.perf_counter() - started_s)


def bare_row(record: CommandRecord) -> tuple[Any, ...]:
    """Return the parameters of `INSERT`, those of `DELETE` first."""
    return (
        *(str(record.session), record.id, record.request_id, "queued", 0, record.arrived_unix, record.expires_unix),
        *(record.type, record.created_at, b'{"replicas":3,"deployment":"web","namespace":"default"}'),
    )


def measure(bench: Bench, log: Log) -> list[Figure]:
    """The store against both baselines, in alternating rounds."""
    tune_gc()  # as the shim does
    figures = []
    with database.running() as server:
        for outstanding, all_of_them in OUTSTANDING.items():
            records = _records(bench.pick(all_of_them, max(outstanding, all_of_them // 10)))
            plain: list[float] = []
            found: dict[tuple[str, bool], list[float]] = defaultdict(list)
            for _ in range(bench.pick(ROUNDS, 1)):
                plain.append(bare(server.create(), records, outstanding))
                for held in (True, False):
                    path = Path(tempfile.mkdtemp(dir=bench.folder)) / "shim.db"
                    for name, made in (
                        ("postgresql", partial(postgres.store, server.create())),
                        ("sqlite", partial(SqliteStore, path)),
                    ):
                        found[name, held].append(through_store(made, records, outstanding, held=held))
            for held in (True, False):
                ours, file = found["postgresql", held], found["sqlite", held]
                what = f"{outstanding} at a time, {'polls held' if held else 'polls later'}"
                log(f"postgres, {what}: {median(ours):,.0f}/s, bare {median(plain):,.0f}/s, file {median(file):,.0f}/s")
                rest: dict[str, Any] = {"against": "bare psycopg", "better": "more", "aim": AIMS[outstanding]}
                figures.append(compared(PART, what, "1/s", ours, plain, **rest))
                figures.append(compared(PART, what, "1/s", ours, file, against="the file", better="more"))
    return figures
