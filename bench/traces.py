"""`python -m bench.traces`: the cost of a command's trace, with other ways to keep it, on SQLite and PostgreSQL.

A command is inserted, offered and delivered, in batches of a hundred with a commit for each of the three, by bare SQL
on tables with the columns and indexes of the store. Its two later steps are kept as rows of `traces`, as such rows with
one index instead of two, as text that grows in the command's own row (as the store does), or not at all. CPU is that of
all threads and of the server, which does not depend on the disk.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import database
from bench.durable import ROUNDS, _records
from shim.core.records import PutCommand
from shim.store import schema
from shim.store.operations import COMMAND_COLUMNS
from shim.store.rows import insert_parameters

COUNT = 5000
BATCH = 100
STEPS = (("offered", 2.0), ("delivered", 3.0))
_INSERT = f"INSERT INTO commands ({COMMAND_COLUMNS}) VALUES ({', '.join('?' * 14)})"  # noqa: S608 - constants
_MARK = "UPDATE commands SET state = ?, updated = ?{more} WHERE session = ? AND id = ?"
_TRACE = (
    "INSERT INTO traces (command, wall, event, detail) SELECT seq, ?, ?, '' FROM commands WHERE session = ? AND id = ?"
)
WAYS = ("rows of a table", "rows with one index", "text in the command's row", "none")
_ONE_INDEX = {
    "sqlite": (
        "DROP TABLE traces",
        (
            "CREATE TABLE traces (command INTEGER NOT NULL, wall REAL NOT NULL, event TEXT NOT NULL,"
            " detail TEXT NOT NULL, PRIMARY KEY (command, wall, event)) WITHOUT ROWID"
        ),
    ),
    "postgresql": (
        "ALTER TABLE traces DROP CONSTRAINT traces_pkey",
        "DROP INDEX traces_by_command",
        "ALTER TABLE traces ADD PRIMARY KEY (command, id)",
    ),
}

Execute = Callable[[str, Sequence[Sequence[Any]]], object]
Transact = Callable[[Callable[[Execute], object]], None]


def _lives(way: str, rows: Sequence[Sequence[Any]], transact: Transact) -> None:
    """Carry the commands of these rows from their arrival to their delivery."""
    keys = [row[:2] for row in rows]
    transact(lambda execute: execute(_INSERT, rows))
    for event, wall in STEPS:

        def step(execute: Execute, event: str = event, wall: float = wall) -> None:
            kept = way == WAYS[2]
            text = (f'{{"wall":{wall},"event":"{event}","detail":""}},',) if kept else ()
            more = ", steps = steps || ?" if kept else ""
            execute(_MARK.format(more=more), [(event, wall, *text, *key) for key in keys])
            if way in WAYS[:2]:
                execute(_TRACE, [(wall, event, *key) for key in keys])

        transact(step)


def _batches() -> list[list[tuple[Any, ...]]]:
    rows = [insert_parameters(PutCommand(record)) for record in _records(COUNT)]
    return [rows[first : first + BATCH] for first in range(0, COUNT, BATCH)]


def on_sqlite(way: str) -> float:
    """CPU microseconds for each command."""
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(Path(folder) / "a.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        schema.migrate(connection)
        for statement in _ONE_INDEX["sqlite"] if way == WAYS[1] else ():
            connection.execute(statement)

        def transact(work: Callable[[Execute], object]) -> None:
            connection.execute("BEGIN IMMEDIATE")
            work(connection.executemany)
            connection.execute("COMMIT")

        started_s = time.process_time()
        for rows in _batches():
            _lives(way, rows, transact)
        used_s = time.process_time() - started_s
        connection.close()
    return used_s / COUNT * 1e6


def on_postgres(server: Any, way: str) -> float:
    """CPU microseconds of the server for each command."""
    import psycopg  # noqa: PLC0415 - an extra

    from shim.config import settings  # noqa: PLC0415
    from shim.store.postgres.database import prepare  # noqa: PLC0415
    from shim.store.postgres.dsn import SCHEMA  # noqa: PLC0415

    url = server.create()
    prepare(settings.Store(url=url))
    options = f"-c search_path={SCHEMA} -c agent_shim.shard=0 -c enable_seqscan=off"
    with psycopg.connect(url, autocommit=True, prepare_threshold=1, options=options) as connection:
        for statement in _ONE_INDEX["postgresql"] if way == WAYS[1] else ():
            connection.execute(statement)

        def transact(work: Callable[[Execute], object]) -> None:
            with connection.pipeline(), connection.transaction(), connection.cursor() as cursor:
                work(lambda statement, rows: cursor.executemany(statement.replace("?", "%s"), rows))

        before_s = database.cpu_s(server)
        for rows in _batches():
            _lives(way, rows, transact)
        used_s = database.cpu_s(server) - before_s
    return used_s / COUNT * 1e6


def _show(place: str, measure: Callable[[str], float]) -> None:
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            found[way].append(measure(way))
    for way, costs_us in found.items():
        ratio = median(costs_us) / median(found[WAYS[-1]])
        print(f"{place:<22}{way:<28}{median(costs_us):>8.1f} µs{ratio:>8.2f}")


def main() -> None:
    print(f"{'CPU per command of':<22}{'the trace as':<28}{'median':>11}{'ratio':>8}")
    _show("SQLite", on_sqlite)
    if not database.missing():
        with database.running() as server:
            _show("PostgreSQL's server", lambda way: on_postgres(server, way))


if __name__ == "__main__":
    main()
