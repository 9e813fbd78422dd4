"""Durable commands: the store against plain sqlite3, and the whole way from the controller and back (item 4)."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any, NamedTuple

import msgspec

from bench import loads, requests
from bench.controller import Send
from bench.figures import Figure, Log, compared, spread
from bench.load import Plan
from bench.servers import Bench
from shim.core.records import CommandRecord, PutCommand, SessionKey
from shim.process import tune_gc
from shim.store import CommitProbe
from shim.store.sqlite import SqliteStore

PART = "Durable commands"
ROUNDS = 7
OUTSTANDING = {1: 400, 10: 3000, 100: 8000}
AIMS = {1: 0.7, 10: 0.6, 100: 0.6}  # of the rate of plain sqlite3, by the commands that are on their way at a time
WHOLE_WAY_AIM = 15_000
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
    """The store with 1, 10 and 100 commands on their way at a time, then the whole way.

    What arrives during a commit shares the next: plain sqlite3 is given batches of the size that came of it.
    """
    tune_gc()  # as the shim does
    figures = []
    for outstanding, all_of_them in OUTSTANDING.items():
        count = bench.pick(all_of_them, 100)
        ours, bare, threaded = [], [], []
        sizes: list[float] = []
        for _ in range(bench.pick(ROUNDS, 1)):
            with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
                found, commits = _through_store(Path(folder) / "ours.db", _records(count), outstanding)
                sizes.append(count / commits)
                ours.append(found)
                batch = max(1, round(sizes[-1]))
                bare.append(_through_sqlite(Path(folder) / "bare.db", _records(count), batch, _here))
                with ThreadPoolExecutor(1) as pool:
                    there = partial(_there, pool)
                    threaded.append(_through_sqlite(Path(folder) / "threaded.db", _records(count), batch, there))
        log(f"durable, {outstanding} outstanding: {count / ours[-1].took_s:,.0f}/s, {sizes[-1]:.1f} to a commit")
        rates, bare_rates, threaded_rates = (
            [count / each.took_s for each in found] for found in (ours, bare, threaded)
        )
        what = f"{outstanding} at a time, {median(sizes):.0f} to a commit"
        rest: dict[str, Any] = {"against": "plain sqlite3", "better": "more", "aim": AIMS[outstanding]}
        figures.append(compared(PART, what, "1/s", rates, bare_rates, **rest))
        rest = {"against": "the same in a thread", "better": "more"}
        figures.append(compared(PART, what, "1/s", rates, threaded_rates, **rest))
        costs_us, threaded_us = ([each.cpu_s / count * 1e6 for each in found] for found in (ours, threaded))
        rest = {"against": "the same in a thread", "note": "does not depend on the disk's speed"}
        figures.append(compared(PART, f"CPU per command, {outstanding} at a time", "µs", costs_us, threaded_us, **rest))
        if outstanding == 1:
            latency_ms, bare_ms = ([each.took_s / count * 1e3 for each in found] for found in (ours, bare))
            figures.append(compared(PART, "one commit, acknowledged", "ms", latency_ms, bare_ms, against="bare commit"))
    figures += flood(bench, log)
    return figures


def flood(bench: Bench, log: Log) -> list[Figure]:
    """Commands as fast as the controller can send them, until all are acknowledged as stored."""
    controller = bench.controller()
    server = bench.shim(controller, upstream={"send_command_ack": True}, log={"level": "warning"})
    beats = [requests.heartbeat(server, number) for number in range(FLOODED)]
    loads.run(Plan(host=server.host, port=server.port, requests=beats, connections=FLOODED, total=FLOODED))
    clusters = [requests.cluster(number) for number in range(FLOODED)]
    count = bench.pick(FLOOD, 100)
    rates, costs_us = [], []
    for round_ in range(bench.pick(5, 1)):
        before_s = server.cpu_s()
        answer = controller.ask(Send(clusters, count, 0, f"flood-{round_}", acked=True))
        rates.append(count / answer["acked_s"])
        costs_us.append((server.cpu_s() - before_s) / count * 1e6)
    log(f"flood: {rates[-1]:,.0f}/s")
    what = "the whole way: send to acknowledgement"
    aim: dict[str, Any] = {"better": "more", "aim": WHOLE_WAY_AIM, "absolute": True}
    return [
        Figure(PART, what, "1/s", median(rates), note=spread(rates), **aim),
        Figure(PART, "CPU per command, the whole way", "µs", median(costs_us), note=spread(costs_us)),
    ]


def _records(count: int) -> list[CommandRecord]:
    key = SessionKey("default", "cluster", requests.cluster(1))
    payload = {"replicas": 3, "deployment": "web", "namespace": "default"}
    return [
        CommandRecord(key, f"cmd-{n}", "scale", payload, "2026-11-24T21:28:03Z", 1.0, 86_401.0, f"req-{n}", 60)
        for n in range(count)
    ]


class _Cost(NamedTuple):
    """The time that something took, and the CPU time that all threads of this process used."""

    took_s: float
    cpu_s: float


class _Stopwatch:
    """Measure a `_Cost` from the creation of this object on."""

    def __init__(self) -> None:
        self._cpu_s, self._started_s = time.process_time(), time.perf_counter()

    def read(self) -> _Cost:
        """Return the cost so far."""
        return _Cost(time.perf_counter() - self._started_s, time.process_time() - self._cpu_s)


def _through_store(path: Path, records: list[CommandRecord], outstanding: int) -> tuple[_Cost, int]:
    """Store records, of which so many are on their way at a time; return the cost and the number of commits."""
    posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
    commits = done = 0

    def committed(_seconds: float, _operations: int) -> None:
        nonlocal commits
        commits += 1

    def stored(_: object) -> None:
        nonlocal done
        done += 1
        if coming:
            submit(coming.pop())

    def submit(record: CommandRecord) -> None:
        store.submit(PutCommand(record), done=stored)

    store = SqliteStore(path, posted.put, CommitProbe(time.monotonic, committed))
    store.open()
    coming = records[::-1]
    stopwatch = _Stopwatch()
    for _ in range(outstanding):
        submit(coming.pop())
    while done < len(records):
        posted.get()()
    cost = stopwatch.read()
    store.close()
    return cost, commits


Carry = Callable[[Callable[[], None]], None]


def _here(work: Callable[[], None]) -> None:
    work()


def _there(pool: ThreadPoolExecutor, work: Callable[[], None]) -> None:
    pool.submit(work).result()


def _through_sqlite(path: Path, records: list[CommandRecord], batch: int, carry: Carry) -> _Cost:
    """Insert one row per record, in transactions of `batch` rows, which `carry` carries out; return the cost."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(_TABLE)
    encode = msgspec.json.encode
    cursor = connection.cursor()

    def commit(rows: list[CommandRecord]) -> None:
        cursor.execute("BEGIN IMMEDIATE")
        for r in rows:
            row = (str(r.session), r.id, r.request_id, 1.0, r.arrived_unix, r.expires_unix, r.size_bytes)
            cursor.execute(_INSERT, (*row, r.type, r.created_at, encode(r.payload)))
        cursor.execute("COMMIT")

    stopwatch = _Stopwatch()
    for first in range(0, len(records), batch):
        carry(partial(commit, records[first : first + batch]))
    cost = stopwatch.read()
    connection.close()
    return cost
