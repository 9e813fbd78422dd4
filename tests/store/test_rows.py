"""Rows that cannot be decoded: put aside, counted, answered; never a reason to stop. On both engines."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shim.core.records import (
    CommandState,
    FindCommand,
    OutboxEntry,
    PutOutbox,
    PutResult,
    ReadOutbox,
    SaveAlias,
    SaveSession,
    SaveTunnel,
)
from shim.store.rows import MAX_COLUMN_CHARS, MAX_QUARANTINED
from tests.support.databases import TestedDatabase
from tests.support.stores import KEY, OTHER, mark, put, session

# PostgreSQL's columns have types: a value of another one, or text that is not UTF-8, cannot be in them.
only_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def filled(database: TestedDatabase) -> TestedDatabase:
    """Command `1` and some more, one row in each table."""
    client, _ = database.open()
    client.run(put("1"), put("2"), put("3", OTHER))
    client.run(SaveSession(session()), SaveSession(session(OTHER)), SaveAlias("default", "pod-1", KEY))
    client.run(SaveTunnel(KEY, {"a": 1}), PutOutbox(KEY, "1", "r-1", {"success": False}))
    client.close()
    return database


def assert_command_put_aside(filled: TestedDatabase, column: str, value: Any, known: tuple[Any, str, str]) -> None:
    filled.change(f"UPDATE commands SET {column} = ? WHERE id = '1'", value)  # noqa: S608
    loaded = filled.loaded()
    assert [record.id for record in loaded.commands] == ["2", "3"]
    assert (loaded.quarantined, loaded.quarantined_commands) == (1, (known,))
    ((origin, reason, content),) = filled.quarantined()
    assert origin == "commands"
    assert reason
    assert column in msgspec.json.decode(content)


@pytest.mark.parametrize(
    "column, value, known",
    [
        ("payload", b"{", (KEY, "1", "r-1")),
        ("payload", b"[]", (KEY, "1", "r-1")),
        ("payload", b"\xff", (KEY, "1", "r-1")),
        ("payload", b'{"a":' * 5000, (KEY, "1", "r-1")),
        ("state", "dreaming", (KEY, "1", "r-1")),
        ("session", "no key", (None, "1", "r-1")),
    ],
)
def test_a_command_that_cannot_be_decoded_is_put_aside_and_named(
    filled: TestedDatabase, column: str, value: Any, known: tuple[Any, str, str]
) -> None:
    assert_command_put_aside(filled, column, value, known)


@only_sqlite
@pytest.mark.parametrize(
    "column, value, known",
    [
        ("payload", "[]", (KEY, "1", "r-1")),
        ("payload", 7, (KEY, "1", "r-1")),
        ("type", b"x", (KEY, "1", "r-1")),
        ("attempts", "many", (KEY, "1", "r-1")),
        ("arrived", "now", (KEY, "1", "r-1")),
        ("request_id", b"\xff", (KEY, "1", "")),
        ("id", b"\xff", (KEY, "", "r-1")),
        ("session", b"\xff", (None, "1", "r-1")),
    ],
)
def test_a_value_of_another_type_is_put_aside(
    filled: TestedDatabase, column: str, value: Any, known: tuple[Any, str, str]
) -> None:
    assert_command_put_aside(filled, column, value, known)


@only_sqlite
def test_text_that_is_not_utf8_is_put_aside(filled: TestedDatabase) -> None:
    filled.change("UPDATE commands SET type = CAST(x'ff' AS TEXT) WHERE id = '1'")
    assert filled.loaded().quarantined_commands == ((KEY, "1", "r-1"),)


def test_a_quarantined_command_is_named_until_it_is_answered(filled: TestedDatabase) -> None:
    filled.change("UPDATE commands SET payload = '' WHERE id = '1'")
    filled.change("UPDATE commands SET session = '' WHERE id = '2'")
    assert filled.loaded().quarantined_commands == ((None, "2", "r-2"), (KEY, "1", "r-1"))
    client, loaded = filled.open()
    # Nobody can be told about a command without a session: it is named once, for the log.
    assert (loaded.quarantined, loaded.quarantined_commands) == (0, ((KEY, "1", "r-1"),))
    client.run(PutOutbox(OTHER, "1", "r-1", {"code": "malformed"}))
    client.close()
    assert len(filled.loaded().quarantined_commands) == 1

    client, _ = filled.open()
    client.run(PutOutbox(KEY, "1", "r-1", {"code": "malformed"}))
    assert not client.one(put("1")).duplicate
    client.close()
    assert filled.loaded().quarantined_commands == ()
    assert len(filled.quarantined()) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sessions SET registration = '{' WHERE session = 'default/cluster/c-1'",
        "UPDATE sessions SET hold = '1' WHERE session = 'default/cluster/c-1'",
        "UPDATE sessions SET superseded_by = 'x' WHERE session = 'default/cluster/c-1'",
        "UPDATE aliases SET session = 'x'",
        "UPDATE tunnels SET payload = 'null'",
        "UPDATE tunnels SET session = 'a/b/c/d'",
        "UPDATE outbox SET session = 'x'",
    ],
)
def test_any_row_that_cannot_be_decoded_is_put_aside(filled: TestedDatabase, statement: str) -> None:
    assert_row_put_aside(filled, statement)


@only_sqlite
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sessions SET last_seen = 'x' WHERE session = 'default/cluster/c-1'",
        "UPDATE aliases SET owner = x'00'",
        "UPDATE outbox SET command_id = x'00'",
    ],
)
def test_any_row_with_a_value_of_another_type_is_put_aside(filled: TestedDatabase, statement: str) -> None:
    assert_row_put_aside(filled, statement)


def assert_row_put_aside(filled: TestedDatabase, statement: str) -> None:
    filled.change(statement)
    before = filled.loaded()
    assert (before.quarantined, before.quarantined_commands) == (1, ())
    assert len(before.commands) == 3
    (kept,) = filled.quarantined()
    assert kept[0] == statement.split()[1]

    again = filled.loaded()
    assert again.quarantined == 0
    counts = (len(again.sessions), len(again.aliases), len(again.tunnels), len(again.outbox_owners))
    assert sum(counts) == 4


@only_sqlite  # in PostgreSQL the key belongs to all replicas, and stands in the table `cluster`
@pytest.mark.parametrize("value", ["short", b"short"])
def test_a_damaged_key_is_replaced_and_not_copied(filled: TestedDatabase, value: Any) -> None:
    filled.change("UPDATE meta SET value = ? WHERE key = 'owner_key'", value)
    loaded = filled.loaded()
    assert (len(loaded.key), loaded.quarantined) == (32, 1)
    assert "short" not in str(filled.quarantined())
    assert filled.loaded().key == loaded.key


def test_a_result_that_cannot_be_read_is_answered_in_its_place(filled: TestedDatabase) -> None:
    client, _ = filled.open()
    client.run(PutResult(KEY, "2", {"success": True}, wall=110.0), PutOutbox(KEY, "9", "r-9", {"n": 1}))
    client.close()
    filled.change("UPDATE outbox SET payload = '{' WHERE command_id = '2'")

    client, loaded = filled.open()
    assert loaded.quarantined == 0
    page: list[OutboxEntry] = client.one(ReadOutbox("default", 0, 10))
    assert [entry.command_id for entry in page] == ["1", "2", "9"]
    answer = page[1]
    assert (answer.request_id, answer.payload["success"], answer.payload["code"]) == ("r-2", False, "malformed")
    assert client.one(ReadOutbox("default", 0, 10)) == page
    client.close()
    assert [row[0] for row in filled.quarantined()] == ["outbox"]


def test_an_ended_command_that_cannot_be_decoded_stays_a_duplicate(filled: TestedDatabase) -> None:
    client, _ = filled.open()
    client.run(PutResult(KEY, "1", {"success": True}, wall=110.0))
    client.run(mark("2", CommandState.DELIVERED))
    client.close()
    filled.change("UPDATE commands SET result = '{' WHERE id = '1'")
    filled.change("UPDATE commands SET payload = '{' WHERE id = '2'")

    client, loaded = filled.open()
    assert [record.id for record in loaded.commands] == ["3"]
    outcome = client.one(put("1"))
    assert (outcome.duplicate, outcome.state, outcome.result) == (True, CommandState.ANSWERED, None)
    assert client.one(put("2")).duplicate
    assert client.one(FindCommand("2")) == []
    client.close()


def test_the_quarantine_keeps_the_newest_rows_and_what_nobody_was_told_of(database: TestedDatabase) -> None:
    client, _ = database.open()
    client.run(put("told"), *(SaveSession(session(KEY._replace(ident=f"c-{n}"))) for n in range(MAX_QUARANTINED + 2)))
    client.close()
    database.change("UPDATE commands SET state = 'dreaming'")
    database.loaded()
    database.execute("UPDATE sessions SET registration = '{'")
    assert database.loaded().quarantined == MAX_QUARANTINED + 2

    kept = database.quarantined()
    assert [origin for origin, _, _ in kept] == ["commands"] + ["sessions"] * MAX_QUARANTINED
    assert '"c-0"' not in str(kept[1])


def test_a_huge_row_is_kept_in_part(filled: TestedDatabase) -> None:
    filled.change("UPDATE sessions SET reply = ? WHERE session = 'default/cluster/c-1'", b"{" + b"x" * 5_000_000)
    assert filled.loaded().quarantined == 1
    ((_, _, content),) = filled.quarantined()
    assert len(content) < 2 * MAX_COLUMN_CHARS
    assert msgspec.json.decode(content)["reply"].startswith("e3h4")  # in base64, as all bytes
