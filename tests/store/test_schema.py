"""From every earlier schema to this one, each step whole or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shim.core.records import CommandState, FindCommand
from shim.store.schema import MIGRATIONS, SCHEMA_VERSION, Migration, migrate
from shim.store.sqlite import SqliteStore
from tests.support.stores import KEY, StoreClient, mark, put


def read(path: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def migrate_at(path: Path, migrations: Sequence[Migration]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        migrate(connection, migrations)


def schema_of(path: Path) -> list[tuple[Any, ...]]:
    return read(path, "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name")


@pytest.mark.parametrize("version", range(SCHEMA_VERSION + 1))
def test_every_earlier_schema_becomes_the_present_one(tmp_path: Path, version: int) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    migrate_at(old, MIGRATIONS[:version])
    for path in (old, new):
        client = StoreClient(lambda post, path=path: SqliteStore(path, post))  # type: ignore[misc]
        assert client.open().moved_aside == ""
        assert not client.one(put("1")).duplicate
        client.close()
    assert schema_of(old) == schema_of(new)
    assert read(old, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert read(old, "SELECT value FROM meta WHERE key = 'min_reader_version'") == [
        (max(migration.min_reader_version for migration in MIGRATIONS),)
    ]


def test_what_was_stored_survives_a_migration(tmp_path: Path) -> None:
    path = tmp_path / "shim.db"
    client = StoreClient(lambda post: SqliteStore(path, post))
    client.open()
    client.run(put("1"), put("2"))
    client.close()
    migrate_at(path, [*MIGRATIONS, Migration(1, "ALTER TABLE commands ADD COLUMN later TEXT NOT NULL DEFAULT ''")])

    assert read(path, "SELECT value FROM meta WHERE key = 'min_reader_version'") == [(1,)]
    client = StoreClient(lambda post: SqliteStore(path, post))
    assert [record.id for record in client.open().commands] == ["1", "2"]
    client.close()
    assert read(path, "PRAGMA user_version") == [(SCHEMA_VERSION + 1,)]


def test_steps_of_the_first_schema_come_before_those_that_are_added(tmp_path: Path) -> None:
    path = tmp_path / "shim.db"
    migrate_at(path, MIGRATIONS[:1])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "INSERT INTO commands VALUES"
            " (1, ?, 'old', '', 'offered', 1, 2, 1, 1e9, 2, 'exec', '', '{}', 'ws', 'arrived', NULL)",
            (str(KEY),),
        )
        connection.execute("INSERT INTO traces VALUES (1, 1, 2, 'offered', '')")
        connection.commit()
    client = StoreClient(lambda post: SqliteStore(path, post))
    client.open()
    client.run(mark("old", CommandState.DELIVERED, 3.0))
    ((record, _, trace),) = client.one(FindCommand("old"))
    assert (record.state, [each.event for each in trace]) == (
        CommandState.DELIVERED,
        ["arrived", "offered", "delivered"],
    )
    client.close()


def test_a_migration_that_fails_leaves_the_schema_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "shim.db"
    steps = [*MIGRATIONS, Migration(1, "CREATE TABLE a (x)"), Migration(1, "CREATE TABLE b (x); CREATE TABLE a (x)")]
    with pytest.raises(sqlite3.OperationalError):
        migrate_at(path, steps)
    assert read(path, "PRAGMA user_version") == [(SCHEMA_VERSION + 1,)]
    assert read(path, "SELECT name FROM sqlite_master WHERE name IN ('a', 'b')") == [("a",)]


def test_the_least_reader_is_never_lowered(tmp_path: Path) -> None:
    path = tmp_path / "shim.db"
    migrate_at(path, [*MIGRATIONS, Migration(SCHEMA_VERSION + 1, "CREATE TABLE a (x)"), Migration(1, "SELECT 1")])
    assert read(path, "SELECT value FROM meta WHERE key = 'min_reader_version'") == [(SCHEMA_VERSION + 1,)]


def test_after_a_migration_the_version_stands_in_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "shim.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        migrate(connection)
        uri = f"{path.as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as reader:
            assert reader.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
