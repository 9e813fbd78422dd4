"""Databases on SQLite that refuse for a while, are full, replaced, read-only or pinned by a reader."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from shim.config import settings
from shim.core.records import (
    CheckStore,
    CommandState,
    FindCommand,
    MoveSession,
    Prune,
    PutOutcome,
    ReadOutbox,
    SessionKey,
    WriteProbe,
)
from shim.errors import StoreError
from shim.store import CommitProbe, open_store
from shim.store.sqlite import LOG_LIMIT_BYTES, SqliteEngine, SqliteStore
from shim.store.writer import QueuedStore
from tests.store.conftest import Gate
from tests.support.stores import KEY, OTHER, TIMEOUT_S, StoreClient, mark, put, until


def test_closing_checkpoints(client: StoreClient, path: Path) -> None:
    client.run(*(put(str(n)) for n in range(100)))
    client.close()
    assert sorted(each.name for each in path.parent.iterdir()) == ["shim.db", "shim.db.lock"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM commands").fetchone() == (100,)
    connection.close()


def test_a_store_in_memory_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        client = StoreClient(lambda post: open_store(settings.Store(path=":memory:"), post))
        assert client.open().commands == ()
        assert client.one(put("1")) == PutOutcome(1)
        assert [found.record.id for found in client.one(FindCommand("1"))] == ["1"]
        assert client.one(WriteProbe(1.0)) is None
        client.close()
    assert list(tmp_path.iterdir()) == []


def test_a_store_in_memory_releases_the_memory_of_deleted_commands() -> None:
    client = StoreClient(lambda post: open_store(settings.Store(path=":memory:"), post))
    client.open()
    connection = connection_of(client)
    large = [str(number) for number in range(15)]
    client.run(*(put(each, payload={"x": "x" * 1_000_000}) for each in large))
    client.one(mark(tuple(large), CommandState.DELIVERED, 200.0))
    (full,) = connection.execute("PRAGMA page_count").fetchone()
    for _ in range(3):
        client.one(Prune(1e9))
    assert connection.execute("PRAGMA page_count").fetchone()[0] < full - 1000
    client.close()


# --- databases that refuse ----------------------------------------------------------------------------------------


def test_a_locked_database_costs_one_batch(client: StoreClient, path: Path) -> None:
    client.run(put("1"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="SQLITE_BUSY"):
        client.run(put("2"))
    other.execute("ROLLBACK")
    other.close()
    assert not client.one(put("2")).duplicate
    assert client.one(put("1")).duplicate


def test_a_lock_that_is_given_up_in_time_costs_nothing(path: Path, gate: Gate) -> None:
    client = StoreClient(lambda post: SqliteStore(path, post, gate.probe, busy_timeout_s=TIMEOUT_S))
    client.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    outcome = client.submit(put("1"))
    gate.wait_until_busy()
    gate.open()
    other.execute("COMMIT")
    other.close()
    assert isinstance(client.wait(outcome), PutOutcome)
    client.close()


def put_until_refused(client: StoreClient) -> None:
    for n in count():
        client.run(put(f"unnoticed-{n}"))


@pytest.mark.parametrize("what", ["shim.db", "shim.db-wal"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_was_replaced_underneath_takes_nothing_more(
    client: StoreClient, path: Path, what: str, how: str
) -> None:
    """SQLite would go on writing to the file without a name, and all of that would be gone after a restart.

    The files are checked again after `CHECK_INTERVAL_S`.
    """
    client.run(put("before"))
    file, aside = path.with_name(what), path.with_name("aside")
    file.rename(aside)
    if how == "replaced":
        file.touch()
    with pytest.raises(StoreError, match="removed while it was in use" if how == "removed" else "taken the place of"):
        put_until_refused(client)
    with pytest.raises(StoreError):
        client.run(put("refused"))
    aside.replace(file)
    assert not client.one(put("refused")).duplicate


def look_until(client: StoreClient, true: Callable[[], bool]) -> None:
    """Have the store look at its files until a condition is true; it looks at most once per `CHECK_INTERVAL_S`."""
    while not true():
        client.run(CheckStore())
        client.drain()


def test_a_reader_that_pins_the_log_is_told_and_the_log_emptied_when_it_goes(path: Path) -> None:
    told: list[tuple[int, bool]] = []
    probe = CommitProbe(lambda: 0.0, lambda commit_s, operations: None, log=lambda *each: told.append(each))
    client = StoreClient(lambda post: SqliteStore(path, post, probe))
    client.open()
    client.run(put("first"))
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM commands").fetchone()
    for n in range(40):
        client.run(put(str(n), payload={"x": "x" * 1_000_000}))
    wal = path.with_name("shim.db-wal")
    assert wal.stat().st_size > 2 * LOG_LIMIT_BYTES
    look_until(client, lambda: told[-1] == (pytest.approx(wal.stat().st_size, abs=2 * 1024 * 1024), True))

    reader.execute("ROLLBACK")
    look_until(client, lambda: told[-1] == (0, False))
    assert wal.stat().st_size == 0
    reader.close()
    client.close()


def connection_of(client: StoreClient) -> sqlite3.Connection:
    """The connection of an open store, which waits for its next submission."""
    store = client.store
    assert isinstance(store, QueuedStore)
    assert store._writer is not None
    assert isinstance(store._writer._engine, SqliteEngine)
    return store._writer._engine._connection


def limit_pages(client: StoreClient, more: int) -> None:
    """Let the database grow by so many pages: then it is full."""
    connection = connection_of(client)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + more}").fetchall()


def test_a_full_database_refuses_reads_on_and_recovers(client: StoreClient) -> None:
    client.run(put("1"))
    limit_pages(client, 2)
    for attempt in range(3):
        with pytest.raises(StoreError, match="SQLITE_FULL"):
            client.run(put(f"big-{attempt}", payload={"x": "x" * 100_000}))
    assert client.one(FindCommand("big-0")) == []
    assert client.one(ReadOutbox("default", 0, 10)) == []
    client.run(mark("1", CommandState.DELIVERED, 1.0))

    limit_pages(client, 1000)
    assert not client.one(put("big-0", payload={"x": "x" * 100_000})).duplicate


def test_what_fits_is_stored_beside_what_does_not(gated: StoreClient, gate: Gate) -> None:
    limit_pages(gated, 8)
    small = [gated.submit(put("1")), gated.submit(put("2"))]
    big = gated.submit(put("big", payload={"x": "x" * 100_000}))
    small.append(gated.submit(put("3")))
    gate.open()
    assert isinstance(gated.wait(big), StoreError)
    assert all(isinstance(gated.wait(outcome), PutOutcome) for outcome in small)


def test_the_file_shrinks_again(client: StoreClient, path: Path) -> None:
    for n in range(20):
        client.run(*(put(f"{n}-{m}", payload={"x": "x" * 20_000}, state=CommandState.DEAD) for m in range(50)))
    store = client.store
    assert isinstance(store, SqliteStore)

    def pages() -> int:
        with sqlite3.connect(path) as connection:
            (count,) = connection.execute("PRAGMA page_count").fetchone()
        connection.close()
        return int(count)

    grown = pages()
    for _ in range(10):
        client.run(Prune(1000.0))
    assert grown > 5000
    assert pages() < grown * 0.6
    assert not client.one(put("0-0")).duplicate


# --- file systems that refuse, in a mount namespace of their own ----------------------------------------------------


ROOT = Path(__file__).parents[2]


IN_NAMESPACE = """
import json, os, sys
from contextlib import suppress
from pathlib import Path
from subprocess import run
from shim.core.records import CommandState, MoveSession, Prune
from shim.errors import StoreError
from shim.store.sqlite import SqliteEngine, SqliteStore
from tests.support.stores import KEY, OTHER, StoreClient, mark, put

root = Path(sys.argv[1])
run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", root], check=True)
print(json.dumps("mounted"), flush=True)
client = StoreClient(lambda post: SqliteStore(root / "shim.db", post))
client.open()

def attempt(command_id, size):
    try:
        return client.one(put(command_id, payload={"x": "x" * size})).duplicate
    except StoreError as error:
        return str(error)

answers = {}
"""


FULL = """
answers["before"] = attempt("before", 10)
filler = root / "filler"
with filler.open("wb", buffering=0) as file:
    try:
        while file.write(b"x" * 4096):
            pass
    except OSError:
        pass
answers["full"] = [attempt(f"full-{n}", 200_000) for n in range(3)]
other = StoreClient(lambda post: SqliteStore(root / "other.db", post))
try:
    other.open()
except StoreError as error:
    answers["opened when full"] = str(error)
filler.unlink()
answers["after"] = [attempt("full-0", 200_000), attempt("before", 10)]
client.close()
client = StoreClient(lambda post: SqliteStore(root / "shim.db", post))
answers["kept"] = [record.id for record in client.open().commands]
answers["files"] = sorted(each.name for each in root.iterdir() if "corrupt" in each.name)
client.close()
print(json.dumps(answers))
"""


NO_ROOM_FOR_A_LONGER_LOG = """
connection = client.store._writer._engine._connection
connection.execute("PRAGMA wal_autocheckpoint = 100").fetchall()
for n in range(300):
    client.one(put(f"old-{n}", payload={"x": "x" * 2000}, state=CommandState.DEAD))
client.one(Prune(1e9))
client.run(*(put(str(n)) for n in range(300)))
connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
for _ in range(100):
    client.one(mark("1", CommandState.QUEUED))
fd = os.open(root / "filler", os.O_CREAT | os.O_WRONLY)
for size in (4096, 1):
    with suppress(OSError):
        while True:
            os.write(fd, b"x" * size)
answers["refused"] = []
for n in range(60):
    source, target = (KEY, OTHER) if n % 2 == 0 else (OTHER, KEY)
    try:
        client.run(MoveSession(source, target), mark("1", CommandState.QUEUED, session=target))
    except StoreError as error:
        answers["refused"].append(f"{n}: {error}")
answers["free"] = os.statvfs(root).f_bavail
client.close()
client = StoreClient(lambda post: SqliteStore(root / "shim.db", post))
answers["kept"] = len(client.open().commands)
client.close()
print(json.dumps(answers))
"""


READ_ONLY = """
answers["before"] = attempt("before", 10)
client.close()
before = (root / "shim.db").read_bytes()
run(["mount", "-o", "remount,ro", root], check=True)
client = StoreClient(lambda post: SqliteStore(root / "shim.db", post))
try:
    client.open()
except StoreError as error:
    answers["opened"] = str(error)
answers["untouched"] = before == (root / "shim.db").read_bytes()
answers["files"] = [each.name for each in root.iterdir()]
run(["mount", "-o", "remount,rw", root], check=True)
client = StoreClient(lambda post: SqliteStore(root / "shim.db", post))
client.open()
answers["after"] = attempt("before", 10)
client.close()
print(json.dumps(answers))
"""


def in_namespace(script: str, root: Path) -> dict[str, Any]:
    """Run a script with a small tmpfs on `root` that nobody else sees; skipped where that is not permitted."""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", IN_NAMESPACE + script, str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if '"mounted"' not in done.stdout:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip().splitlines()[-1:]}")
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def moved(client: StoreClient, command_id: str) -> tuple[SessionKey, CommandState]:
    """The session and state of a command."""
    ((record, _, _),) = client.one(FindCommand(command_id))
    return record.session, record.state


def test_changes_after_a_move_that_does_not_fit_wait_for_it(client: StoreClient) -> None:
    """They name the successor, whose commands they would not find: what was delivered would come again."""
    target = SessionKey("default", "agent", "a" * 200)
    client.run(*(put(str(n)) for n in range(300)))
    limit_pages(client, 0)
    client.store.submit(MoveSession(KEY, target))
    delivered = mark("1", CommandState.DELIVERED, session=target)
    with pytest.raises(StoreError, match="SQLITE_FULL"):
        client.run(delivered)
    assert moved(client, "1") == (KEY, CommandState.QUEUED)
    limit_pages(client, 1000)
    client.run(delivered)
    assert moved(client, "1") == (target, CommandState.DELIVERED)
    assert moved(client, "2") == (target, CommandState.QUEUED)


def test_a_move_that_found_the_database_locked_is_repeated_without_another_submission(
    path: Path, client: StoreClient
) -> None:
    client.run(put("1"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    moving = client.submit(MoveSession(KEY, OTHER))
    with pytest.raises(StoreError, match="SQLITE_BUSY"):
        client.run(put("2"))
    other.execute("COMMIT")
    query = "SELECT count(*) FROM commands WHERE session = ?"
    until(lambda: other.execute(query, (str(OTHER),)).fetchone() == (1,))
    client.run(put("3"))
    assert len(moving) == 1
    other.close()


def test_a_move_that_can_never_be_stored_does_not_stop_the_others(path: Path, client: StoreClient) -> None:
    client.run(put("1"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TRIGGER t BEFORE UPDATE OF session ON commands BEGIN SELECT RAISE(ABORT, 'never'); END")
    moving = client.submit(MoveSession(KEY, OTHER))
    assert not client.one(put("2")).duplicate
    assert isinstance(client.wait(moving), StoreError)
    other.close()


def test_closing_does_not_wait_for_a_move_that_is_refused(path: Path, client: StoreClient) -> None:
    client.run(put("1"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    client.store.submit(MoveSession(KEY, OTHER))
    with pytest.raises(StoreError, match="SQLITE_BUSY"):
        client.run(put("2"))
    client.close()
    other.close()


@pytest.mark.needs("unshare", "mount")
def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    answers = in_namespace(FULL, tmp_path)
    assert answers["before"] is False
    assert len(answers["full"]) == 3
    assert all(str(answer).startswith("the database refused: SQLITE_") for answer in answers["full"])
    told = answers["opened when full"]
    assert told.startswith("store.path /")
    assert "SQLITE_" in told
    assert answers["after"] == [False, True]
    assert answers["kept"] == ["before", "full-0"]
    assert answers["files"] == []


@pytest.mark.needs("unshare", "mount")
def test_on_a_full_disk_a_move_has_the_whole_log(tmp_path: Path) -> None:
    """All changes wait for a move. One that did not fit into what the log had left blocked them: nothing emptied it."""
    answers = in_namespace(NO_ROOM_FOR_A_LONGER_LOG, tmp_path)
    assert answers["refused"] == []
    assert answers["free"] == 0
    assert answers["kept"] == 300


@pytest.mark.needs("unshare", "mount")
def test_a_read_only_disk_is_no_corruption(tmp_path: Path) -> None:
    answers = in_namespace(READ_ONLY, tmp_path)
    assert "Read-only file system" in answers["opened"]
    assert answers["untouched"]
    assert sorted(answers["files"]) == ["shim.db", "shim.db.lock"]
    assert answers["after"] is True
