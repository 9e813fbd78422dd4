"""Durable commands: the store against plain sqlite3, and the whole way from the controller and back (item 4)."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import msgspec

from bench.controller import Send
from bench.figures import Figure, Log, compared
from bench.requests import cluster
from bench.servers import Bench
from shim.core.records import AddTrace, CommandRecord, PutCommand, SessionKey, TraceEntry
from shim.store.sqlite import SqliteStore

PART = "Durable commands"
ROUNDS = 5
SIZES = {1: 200, 10: 2000, 100: 5000}
AIM = 0.7
FLOOD = 3000
FLOODED = 100
_TABLE = """
CREATE TABLE commands (
    seq INTEGER PRIMARY KEY, session TEXT NOT NULL, id TEXT NOT NULL, request_id TEXT NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL, updated REAL NOT NULL, arrived REAL NOT NULL, expires REAL NOT NULL,
    size_bytes INTEGER NOT NULL, type TEXT NOT NULL, created_at TEXT NOT NULL, payload BLOB NOT NULL,
    UNIQUE (session, id)
)
"""
_INSERT = "INSERT INTO commands VALUES (NULL, ?, ?, ?, 'queued', 0, ?, ?, ?, ?, ?, ?, ?)"


def measure(bench: Bench, log: Log) -> list[Figure]:
    """The store in batches of 1, 10 and 100, then the whole way."""
    figures = []
    for batch, count in SIZES.items():
        ours, bare = [], []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
                ours.append(_through_store(Path(folder) / "ours.db", _records(count), batch))
                bare.append(_through_sqlite(Path(folder) / "bare.db", _records(count), batch))
        log(f"durable, {batch} to a commit: {count / ours[-1]:,.0f}/s")
        rates, bare_rates = [count / each for each in ours], [count / each for each in bare]
        rest = {"against": "plain sqlite3", "better": "more", "aim": AIM}
        figures.append(compared(PART, f"commands, {batch} to a commit", "1/s", rates, bare_rates, **rest))
        if batch == 1:
            latency_ms, bare_ms = ([each / count * 1e3 for each in found] for found in (ours, bare))
            figures.append(compared(PART, "one commit, until told", "ms", latency_ms, bare_ms, against="bare commit"))
    figures.append(flood(bench, log))
    return figures


def flood(bench: Bench, log: Log) -> Figure:
    """Commands as fast as the controller can send them, until all are acknowledged as stored."""
    controller = bench.controller()
    bench.shim(controller, upstream={"send_command_ack": True}, log={"level": "warning"})
    time.sleep(0.5)
    clusters = [cluster(number) for number in range(FLOODED)]
    rates = []
    for round_ in range(3):
        answer = controller.ask(Send(clusters, FLOOD, 0, f"flood-{round_}", acked=True))
        rates.append(FLOOD / answer["acked_s"])
    log(f"flood: {rates[-1]:,.0f}/s")
    return Figure(PART, "the whole way: send to acknowledgement", "1/s", sorted(rates)[1], better="more")


def _records(count: int) -> list[CommandRecord]:
    key = SessionKey("default", "cluster", cluster(1))
    payload = {"replicas": 3, "deployment": "web", "namespace": "default"}
    return [
        CommandRecord(key, f"cmd-{n}", "scale", payload, "2026-11-24T21:28:03Z", 1.0, 86_401.0, f"req-{n}", 60)
        for n in range(count)
    ]


def _through_store(path: Path, records: list[CommandRecord], batch: int) -> float:
    """Seconds; each batch is submitted as commands that arrive together are, and awaited."""
    posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
    store = SqliteStore(path, posted.put)
    store.open()
    done = 0

    def count(_: object) -> None:
        nonlocal done
        done += 1

    started_s = time.perf_counter()
    for first in range(0, len(records), batch):
        for record in records[first : first + batch]:
            step = AddTrace(record.session, (record.id,), TraceEntry(record.arrived_wall, "arrived", record.type))
            store.submit([PutCommand(record), step], count)
        while done < min(first + batch, len(records)):
            posted.get()()
    took_s = time.perf_counter() - started_s
    store.close()
    return took_s


def _through_sqlite(path: Path, records: list[CommandRecord], batch: int) -> float:
    """Seconds; one row each, in transactions of `batch` rows, from the thread that waits."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(_TABLE)
    encode = msgspec.json.encode
    cursor = connection.cursor()
    started_s = time.perf_counter()
    for first in range(0, len(records), batch):
        cursor.execute("BEGIN IMMEDIATE")
        for r in records[first : first + batch]:
            row = (str(r.session), r.id, r.request_id, 1.0, r.arrived_wall, r.expires_wall, r.size_bytes)
            cursor.execute(_INSERT, (*row, r.type, r.created_at, encode(r.payload)))
        cursor.execute("COMMIT")
    took_s = time.perf_counter() - started_s
    connection.close()
    return took_s
