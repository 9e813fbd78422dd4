"""`agent-shim store copy`: all of it, once, or nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from shim.config import settings
from shim.core.records import (
    AddTrace,
    CommandState,
    FindCommand,
    PutOutbox,
    PutResult,
    ReadOutbox,
    SaveAlias,
    SaveSession,
    SaveTunnel,
    StoreContents,
    TraceEntry,
)
from shim.core.shards import shard_of
from shim.errors import StoreError
from shim.store.copy import copy
from shim.store.sqlite import SqliteStore
from tests.support.stores import KEY, OTHER, STRANGER, StoreClient, mark, put, session

pytest.importorskip("psycopg")

from shim.cli.commands import store as command
from tests.support import postgres as pg

pytestmark = pytest.mark.needs("postgresql")


def fill(client: StoreClient) -> None:
    client.run(put("1"), put("2", type="with\0nul"), put("3", OTHER), put("1", STRANGER), put("4"))
    client.run(SaveSession(session()), SaveSession(session(OTHER)), SaveAlias("default", "pod-1", KEY))
    client.run(SaveTunnel(KEY, {"a": 1}), PutOutbox(KEY, "9", "r-9", {"success": False}))
    client.run(PutResult(KEY, "2", {"ok": True}, 110.0), PutResult(KEY, "unknown", {"ok": False}, 110.0))
    client.run(mark("4", CommandState.DELIVERED, 111.0))
    client.run(AddTrace(KEY, ("refused",), TraceEntry(1.0, "rejected", "why")))


def seen(client: StoreClient) -> Any:
    """All that a bridge would see, whatever numbers it has."""
    found = [client.one(FindCommand(each)) for each in ("1", "2", "3", "4", "refused")]
    return found, client.one(ReadOutbox("default", 0, 10))


OPEN: list[StoreClient] = []


@pytest.fixture(autouse=True)
def _closed(_no_thread_is_left: None) -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def file_client(path: Path) -> tuple[StoreClient, StoreContents]:
    OPEN.append(StoreClient(lambda post: SqliteStore(path, post)))
    return OPEN[-1], OPEN[-1].open()


def test_there_and_back_is_the_same(tmp_path: Path, pg_url: str) -> None:
    before, after = tmp_path / "before.db", tmp_path / "after.db"
    client, _ = file_client(before)
    fill(client)
    client.close()
    database = settings.Store(url=pg_url)
    done = copy(settings.Store(path=str(before)), database)
    assert done["commands"] == (5, 0)
    assert not any(left_out for _, left_out in done.values())
    # Each shard has what its owners have; new numbers come after the old ones.
    shards = {owner: shard_of(owner, 16) for owner in ("default", "0f0f")}
    for owner, shard in shards.items():
        one = StoreClient(lambda post, shard=shard: pg.store(pg_url, post, shard=shard))  # type: ignore[misc]
        loaded = one.open()
        assert {record.session.owner for record in loaded.commands} == {owner}
        assert one.one(put("new", KEY if owner == "default" else STRANGER)).seq > 5
        one.close()
    pg.query(pg_url, "DELETE FROM commands WHERE id = 'new'")
    copy(database, settings.Store(path=str(after)))

    (first, loaded), (second, loaded_again) = file_client(before), file_client(after)
    assert replace(loaded, warnings=()) == replace(loaded_again, warnings=(), commands=loaded.commands)
    assert [each.id for each in loaded.commands] == [each.id for each in loaded_again.commands]
    assert repr(seen(first)).replace("\\x00", "␀") == repr(seen(second))
    first.close()
    second.close()


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path, pg_url: str) -> None:
    path = tmp_path / "shim.db"
    client, _ = file_client(path)
    fill(client)
    client.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE commands SET created_at = x'ff' WHERE id = '4'")
    found = CliRunner().invoke(command, ["copy", "--from", str(path), "--to", pg_url])
    assert found.exit_code == 0, found.output
    assert "commands: 4, and 1 that cannot be read left out" in found.output


def test_nothing_is_copied_into_what_is_used_or_not_empty(tmp_path: Path, pg_url: str) -> None:
    path = tmp_path / "shim.db"
    client, _ = file_client(path)
    fill(client)
    source, target = settings.Store(path=str(path)), settings.Store(url=pg_url)
    with pytest.raises(StoreError):  # a shim is at work on it
        copy(source, target)
    client.close()
    with pytest.raises(StoreError, match="no such file"):
        copy(settings.Store(path=str(tmp_path / "none.db")), target)
    pg.store(pg_url, list)
    pg.query(
        pg_url,
        "INSERT INTO members (process, name, address, fingerprint, lease_s, until, server)"
        " VALUES ('p', 'n', 'a', 'f', 60, now() + interval '1 minute', now())",
    )
    with pytest.raises(StoreError, match=r"--to: replicas use the database \(.*\): stop all of them first"):
        copy(source, target)
    assert pg.query(pg_url, "SELECT count(*) FROM commands") == [(0,)]
    pg.query(pg_url, "DELETE FROM members")
    copy(source, target)
    with pytest.raises(StoreError, match="--to: the store is not empty"):
        copy(source, target)


@pytest.mark.parametrize("damage", ["none", "cut", "overwritten"])
def test_a_file_that_is_no_sound_database_is_left_as_it_is(damage: str, tmp_path: Path) -> None:
    """A path may be a slip of the pen, and a damaged database is evidence: a copy must not rename either."""
    path, sound = tmp_path / "shim.db", tmp_path / "sound.db"
    for each in (path, sound):
        client, _ = file_client(each)
        fill(client)
        client.close()
    if damage == "none":
        path.write_text("mode: websocket\n")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 8192 + path.read_bytes()[12288:])
    before = path.read_bytes()
    for source, target, option in ((path, tmp_path / "new.db", "--from"), (sound, path, "--to")):
        with pytest.raises(StoreError, match=rf"{option}: .*shim\.db is left as it is"):
            copy(settings.Store(path=str(source)), settings.Store(path=str(target)))
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir() if "lock" not in each.name) == ["shim.db", "sound.db"]


def test_a_copy_that_is_interrupted_leaves_nothing(tmp_path: Path, pg_url: str) -> None:
    path = tmp_path / "shim.db"
    client, _ = file_client(path)
    fill(client)
    client.close()
    source, target = settings.Store(path=str(path)), settings.Store(url=pg_url)
    pg.store(pg_url, list)
    pg.query(pg_url, "ALTER TABLE lone_traces ADD CHECK (event <> 'rejected')")
    with pytest.raises(StoreError, match="--to"):
        copy(source, target)
    assert pg.query(pg_url, "SELECT count(*) FROM commands") == [(0,)]
    pg.query(pg_url, "ALTER TABLE lone_traces DROP CONSTRAINT lone_traces_event_check")
    assert copy(source, target)["lone_traces"] == (1, 0)
