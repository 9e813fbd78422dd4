"""`python -m bench.postgres [--json FILE]`: the store on PostgreSQL against bare psycopg, and against the file.

A command goes in (stored), is offered, is delivered: three submissions, each told before the next one comes. Bare
psycopg inserts a row of the same columns and deletes it, in pipelines of as many commands as are outstanding, with
a commit for each of the two: the least that a durable queue can do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import psycopg

from bench.durable import _records
from shim.core.records import AddTrace, CommandRecord, CommandState, MarkCommands, Operation, PutCommand, TraceEntry
from shim.ports import CommandStore
from shim.store.sqlite import SqliteStore
from tests.support import postgres

ROUNDS = 5
OUTSTANDING = {1: 300, 10: 3000, 100: 10_000}
AIMS = {1: 0.5, 10: 0.8, 100: 0.6}
_TABLE = (
    "CREATE TABLE IF NOT EXISTS bare (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, session text, id text,"
    " request_id text, state text, attempts bigint, arrived float8, expires float8, type text, created_at text,"
    " payload bytea, UNIQUE (session, id))"
)
_INSERT = (
    "INSERT INTO bare (session, id, request_id, state, attempts, arrived, expires, type, created_at, payload)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
)
_DELETE = "DELETE FROM bare WHERE session = %s AND id = %s"


def through_store(make: Callable[[Any], CommandStore], records: Sequence[CommandRecord], outstanding: int) -> float:
    """Commands per second, each stored, offered and delivered."""
    posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
    store = make(posted.put)
    store.open()
    coming = list(reversed(records))
    done = 0

    def steps(record: CommandRecord) -> list[list[Operation]]:
        key, name = record.session, (record.id,)
        arrived = AddTrace(key, name, TraceEntry(record.arrived_unix, "arrived", record.type))
        offered = MarkCommands(key, name, CommandState.OFFERED, 2.0, attempts=1)
        delivered = MarkCommands(key, name, CommandState.DELIVERED, 3.0)
        return [
            [delivered, AddTrace(key, name, TraceEntry(3.0, "delivered"))],
            [offered, AddTrace(key, name, TraceEntry(2.0, "offered", "attempt 1"))],
            [PutCommand(record), arrived],
        ]

    def go_on(left: list[list[Operation]]) -> None:
        nonlocal done
        if left:
            store.submit(left.pop(), lambda _outcome: go_on(left))
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
        connection.execute(_TABLE)
        connection.execute("TRUNCATE bare")
        started_s = time.perf_counter()
        for first in range(0, len(records), outstanding):
            batch = records[first : first + outstanding]
            with connection.pipeline(), connection.transaction():
                connection.cursor().executemany(_INSERT, [_row(each) for each in batch])
            with connection.pipeline(), connection.transaction():
                connection.cursor().executemany(_DELETE, [(str(each.session), each.id) for each in batch])
        return len(records) / (time.perf_counter() - started_s)


def _row(record: CommandRecord) -> tuple[Any, ...]:
    return (
        *(str(record.session), record.id, record.request_id, "queued", 0, record.arrived_unix, record.expires_unix),
        *(record.type, record.created_at, b'{"replicas":3,"deployment":"web","namespace":"default"}'),
    )


def measure(rounds: int, scale: float) -> list[dict[str, Any]]:
    """One row for each number of outstanding commands: the medians, and the median of the ratios round by round."""
    rows = []
    with postgres.running("shared_buffers = 128MB", "max_wal_size = 2GB") as server:
        for outstanding, all_of_them in OUTSTANDING.items():
            count = max(outstanding, int(all_of_them * scale))
            found: dict[str, list[float]] = {"bare": [], "postgresql": [], "sqlite": []}
            for _ in range(rounds):
                records = _records(count)
                url = server.create()
                found["bare"].append(bare(url, records, outstanding))
                found["postgresql"].append(
                    through_store(lambda post, url=url: postgres.store(url, post), records, outstanding)
                )
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "shim.db"
                    found["sqlite"].append(
                        through_store(lambda post, path=path: SqliteStore(path, post), records, outstanding)
                    )
            ratio = median(ours / theirs for ours, theirs in zip(found["postgresql"], found["bare"], strict=True))
            row = {"outstanding": outstanding, "ratio": ratio, "aim": AIMS[outstanding]}
            rows.append(row | {name: median(each) for name, each in found.items()})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> int:
    """Measure, and print or keep the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.postgres", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there")
    parser.add_argument("--quick", action="store_true", help="one round of a tenth")
    given = parser.parse_args()
    rows = measure(1 if given.quick else ROUNDS, 0.1 if given.quick else 1.0)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
