"""Rows that cannot be decoded: put aside, counted, answered; never a reason to stop."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shim.core.records import (
    CommandState,
    FindCommand,
    MarkCommands,
    OutboxEntry,
    PutOutbox,
    PutResult,
    ReadOutbox,
    SaveAlias,
    SaveSession,
    SaveTunnel,
)
from shim.store.quarantine import MAX_COLUMN_CHARS, MAX_ROWS
from tests.support.stores import KEY, OTHER, Stores, put, session


def change(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute(statement, values).rowcount == 1


def rows(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT origin, reason, content FROM quarantine ORDER BY id").fetchall()


@pytest.fixture
def filled(stores: Stores, path: Path) -> Path:
    """Command `1` and some more, one row in each table."""
    client, _ = stores.open(path)
    client.run(put("1"), put("2"), put("3", OTHER))
    client.run(SaveSession(session()), SaveSession(session(OTHER)), SaveAlias("default", "pod-1", KEY))
    client.run(SaveTunnel(KEY, {"a": 1}), PutOutbox(KEY, "1", "r-1", {"success": False}))
    client.close()
    return path


@pytest.mark.parametrize(
    "column, value, known",
    [
        ("payload", b"{", (KEY, "1", "r-1")),
        ("payload", "[]", (KEY, "1", "r-1")),
        ("payload", 7, (KEY, "1", "r-1")),
        ("payload", b"\xff", (KEY, "1", "r-1")),
        ("payload", b'{"a":' * 5000, (KEY, "1", "r-1")),
        ("state", "dreaming", (KEY, "1", "r-1")),
        ("type", b"x", (KEY, "1", "r-1")),
        ("attempts", "many", (KEY, "1", "r-1")),
        ("arrived", "now", (KEY, "1", "r-1")),
        ("request_id", b"\xff", (KEY, "1", "")),
        ("id", b"\xff", (KEY, "", "r-1")),
        ("session", "no key", (None, "1", "r-1")),
        ("session", b"\xff", (None, "1", "r-1")),
    ],
)
def test_a_command_that_cannot_be_decoded_is_put_aside_and_named(
    stores: Stores, filled: Path, column: str, value: Any, known: tuple[Any, str, str]
) -> None:
    change(filled, f"UPDATE commands SET {column} = ? WHERE id = '1'", value)  # noqa: S608
    loaded = stores.loaded(filled)
    assert [record.id for record in loaded.commands] == ["2", "3"]
    assert (loaded.quarantined, loaded.quarantined_commands) == (1, (known,))
    ((origin, reason, content),) = rows(filled)
    assert origin == "commands"
    assert reason
    assert column in msgspec.json.decode(content)


def test_text_that_is_not_utf8_is_put_aside(stores: Stores, filled: Path) -> None:
    change(filled, "UPDATE commands SET type = CAST(x'ff' AS TEXT) WHERE id = '1'")
    assert stores.loaded(filled).quarantined_commands == ((KEY, "1", "r-1"),)


def test_a_quarantined_command_is_named_until_it_is_answered(stores: Stores, filled: Path) -> None:
    change(filled, "UPDATE commands SET payload = '' WHERE id = '1'")
    change(filled, "UPDATE commands SET session = '' WHERE id = '2'")
    assert stores.loaded(filled).quarantined_commands == ((None, "2", "r-2"), (KEY, "1", "r-1"))
    client, loaded = stores.open(filled)
    # Nobody can be told about a command without a session: it is named once, for the log.
    assert (loaded.quarantined, loaded.quarantined_commands) == (0, ((KEY, "1", "r-1"),))
    client.run(PutOutbox(OTHER, "1", "r-1", {"code": "malformed"}))
    client.close()
    assert len(stores.loaded(filled).quarantined_commands) == 1

    client, _ = stores.open(filled)
    client.run(PutOutbox(KEY, "1", "r-1", {"code": "malformed"}))
    assert not client.one(put("1")).duplicate
    client.close()
    assert stores.loaded(filled).quarantined_commands == ()
    assert len(rows(filled)) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sessions SET registration = '{' WHERE session = 'default/cluster/c-1'",
        "UPDATE sessions SET hold = 1 WHERE session = 'default/cluster/c-1'",
        "UPDATE sessions SET last_seen = 'x' WHERE session = 'default/cluster/c-1'",
        "UPDATE sessions SET superseded_by = 'x' WHERE session = 'default/cluster/c-1'",
        "UPDATE aliases SET session = 'x'",
        "UPDATE aliases SET owner = x'00'",
        "UPDATE tunnels SET payload = 'null'",
        "UPDATE tunnels SET session = 'a/b/c/d'",
        "UPDATE outbox SET session = 'x'",
        "UPDATE outbox SET command_id = x'00'",
    ],
)
def test_any_row_that_cannot_be_decoded_is_put_aside(stores: Stores, filled: Path, statement: str) -> None:
    change(filled, statement)
    before = stores.loaded(filled)
    assert (before.quarantined, before.quarantined_commands) == (1, ())
    assert len(before.commands) == 3
    (kept,) = rows(filled)
    assert kept[0] == statement.split()[1]

    again = stores.loaded(filled)
    assert again.quarantined == 0
    counts = (len(again.sessions), len(again.aliases), len(again.tunnels), len(again.outbox_owners))
    assert sum(counts) == 4


@pytest.mark.parametrize("value", ["short", b"short"])
def test_a_damaged_key_is_replaced_and_not_copied(stores: Stores, filled: Path, value: Any) -> None:
    change(filled, "UPDATE meta SET value = ? WHERE key = 'owner_key'", value)
    loaded = stores.loaded(filled)
    assert (len(loaded.key), loaded.quarantined) == (32, 1)
    assert "short" not in str(rows(filled))
    assert stores.loaded(filled).key == loaded.key


def test_a_result_that_cannot_be_read_is_answered_in_its_place(stores: Stores, filled: Path) -> None:
    client, _ = stores.open(filled)
    client.run(PutResult(KEY, "2", {"success": True}, wall=110.0), PutOutbox(KEY, "9", "r-9", {"n": 1}))
    client.close()
    change(filled, "UPDATE outbox SET payload = '{' WHERE command_id = '2'")

    client, loaded = stores.open(filled)
    assert loaded.quarantined == 0
    page: list[OutboxEntry] = client.one(ReadOutbox("default", 0, 10))
    assert [entry.command_id for entry in page] == ["1", "2", "9"]
    answer = page[1]
    assert (answer.request_id, answer.payload["success"], answer.payload["code"]) == ("r-2", False, "malformed")
    assert client.one(ReadOutbox("default", 0, 10)) == page
    client.close()
    assert [row[0] for row in rows(filled)] == ["outbox"]


def test_an_ended_command_that_cannot_be_decoded_stays_a_duplicate(stores: Stores, filled: Path) -> None:
    client, _ = stores.open(filled)
    client.run(PutResult(KEY, "1", {"success": True}, wall=110.0))
    client.run(MarkCommands(KEY, ("2",), CommandState.DELIVERED, wall=110.0))
    client.close()
    change(filled, "UPDATE commands SET result = '{' WHERE id = '1'")
    change(filled, "UPDATE commands SET payload = '{' WHERE id = '2'")

    client, loaded = stores.open(filled)
    assert [record.id for record in loaded.commands] == ["3"]
    outcome = client.one(put("1"))
    assert (outcome.duplicate, outcome.state, outcome.result) == (True, CommandState.ANSWERED, None)
    assert client.one(put("2")).duplicate
    assert client.one(FindCommand("2")) == []
    client.close()


def test_the_quarantine_keeps_the_newest_rows_and_what_nobody_was_told_of(stores: Stores, path: Path) -> None:
    client, _ = stores.open(path)
    client.run(put("told"), *(SaveSession(session(KEY._replace(ident=f"c-{n}"))) for n in range(MAX_ROWS + 2)))
    client.close()
    change(path, "UPDATE commands SET state = 'dreaming'")
    stores.loaded(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE sessions SET dialect = x'00'")
    assert stores.loaded(path).quarantined == MAX_ROWS + 2

    kept = rows(path)
    assert [origin for origin, _, _ in kept] == ["commands"] + ["sessions"] * MAX_ROWS
    assert '"c-0"' not in str(kept[1])


def test_a_huge_row_is_kept_in_part(stores: Stores, filled: Path) -> None:
    change(filled, "UPDATE sessions SET reply = ? WHERE id = 1", "{" + "x" * 5_000_000)
    assert stores.loaded(filled).quarantined == 1
    ((_, _, content),) = rows(filled)
    assert len(content) < 2 * MAX_COLUMN_CHARS
    assert msgspec.json.decode(content)["reply"].startswith("{xx")
