"""Rows of the mirror's tables to JSON and back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from shim.store.jetstream.layout import Kind, RowKey
from shim.store.rows import encode_json


@dataclass(frozen=True, slots=True)
class _Table:
    """Where a kind of row comes from. `key` names the columns of `RowKey`; `json` those that hold JSON as it is."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    json: frozenset[str] = frozenset()

    @property
    def select(self) -> str:
        # Constants of this module only; nothing that was ever input becomes SQL.
        condition = " AND ".join(f"{column} = ?" for column in self.key)
        return f"SELECT {', '.join(self.columns)} FROM {self.name} WHERE {condition}"  # noqa: S608 - names of ours


def _table(name: str, columns: str, key: str, json: str = "") -> _Table:
    return _Table(name, tuple(columns.split()), tuple(key.split()), frozenset(json.split()))


_COMMAND_COLUMNS = "seq session id request_id arrived size_bytes type created_at payload via first_step"
_TABLES = {
    Kind.COMMAND: _table("commands", _COMMAND_COLUMNS, "session id", "payload"),
    Kind.STATE: _table("commands", "seq session id state attempts updated expires", "session id"),
    Kind.RESULT: _table("commands", "seq session id result", "session id", "result"),
    Kind.UNKNOWN_RESULT: _table("unknown_results", "session command_id wall", "session command_id"),
    Kind.LONE_TRACE: _table("lone_traces", "session command_id", "session command_id"),
    Kind.QUARANTINE: _table(
        "quarantine", "id origin session command_id request_id reason content pending", "id", "content"
    ),
    Kind.OUTBOX: _table("outbox", "seq owner session command_id request_id payload", "session seq", "payload"),
    Kind.SESSION: _table(
        "sessions",
        "session dialect agent_id upstream_cluster_id last_seen superseded_by registration reply hold",
        "session",
        "registration reply hold",
    ),
    Kind.ALIAS: _table("aliases", "owner agent_id session", "owner agent_id"),
    Kind.TUNNEL: _table("tunnels", "session payload", "session", "payload"),
    Kind.META: _table("meta", "key value", "key"),
}
_TRACE = "trace"
_INSERT_LONE_TRACE = "INSERT INTO lone_traces (id, session, command_id, wall, event, detail) VALUES (?, ?, ?, ?, ?, ?)"
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class UnreadableRow(Exception):
    """A message that is no row of this store."""


def read(cursor: sqlite3.Cursor, key: RowKey) -> bytes | None:
    """The row as JSON, `None` where there is none."""
    table = _TABLES[key.kind]
    row = cursor.execute(table.select, key[1 : 1 + len(table.key)]).fetchone()
    if row is None:
        return None
    image: dict[str, Any] = dict(zip(table.columns, row, strict=True))
    if key.kind is Kind.RESULT and image["result"] is None:
        return None
    for column in table.json:
        image[column] = msgspec.Raw(image[column])
    if key.kind is Kind.META:
        image["value"] = image["value"].hex()
    elif key.kind is Kind.STATE:
        steps = "SELECT id, wall, event, detail FROM traces WHERE command = ? ORDER BY id"
        image[_TRACE] = cursor.execute(steps, (image["seq"],)).fetchall()
    elif key.kind is Kind.LONE_TRACE:
        steps = "SELECT id, wall, event, detail FROM lone_traces WHERE session = ? AND command_id = ? ORDER BY id"
        image[_TRACE] = cursor.execute(steps, key[1:]).fetchall()
    return encode_json(image)


@dataclass(frozen=True, slots=True)
class Image:
    """A decoded row: its columns as SQLite takes them, and the steps of its trace."""

    key: RowKey
    columns: dict[str, Any]
    trace: tuple[tuple[Any, ...], ...] = ()


def decode(kind: Kind, value: bytes) -> Image:
    """Raises `UnreadableRow`. Types of columns are not checked: `loading` believes no row anyway."""
    table = _TABLES[kind]
    try:
        raw = _decode(value)
        trace = tuple(tuple(step) for step in msgspec.json.decode(raw.pop(_TRACE, b"[]"), type=list[list[Any]]))
        columns: dict[str, Any] = {
            name: bytes(raw[name]) if name in table.json else msgspec.json.decode(raw[name]) for name in table.columns
        }
        if kind is Kind.META:
            columns["value"] = bytes.fromhex(columns["value"])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise UnreadableRow(type(error).__name__) from None
    first, *second = (str(columns[name]) for name in table.key)
    return Image(RowKey(kind, first, *second) if second else RowKey(kind, first, ""), columns, trace)


def insert(cursor: sqlite3.Cursor, images: Iterable[Image]) -> int:
    """Insert rows; those of a command (its content, state and result) belong together. Returns how many do not fit."""
    commands: dict[tuple[str, str], dict[Kind, Image]] = {}
    refused = 0
    for image in images:
        if image.key.kind in (Kind.COMMAND, Kind.STATE, Kind.RESULT):
            commands.setdefault(image.key[1:], {})[image.key.kind] = image
        elif image.key.kind is Kind.LONE_TRACE:
            session, command_id = image.columns["session"], image.columns["command_id"]
            rows = [(number, session, command_id, *step) for number, *step in image.trace]
            refused += not _insert_all(cursor, _INSERT_LONE_TRACE, rows)
        else:
            refused += not _insert(cursor, _TABLES[image.key.kind].name, image.columns)
    for parts in commands.values():
        refused += not _insert_command(cursor, parts)
    return refused


def _insert_command(cursor: sqlite3.Cursor, parts: dict[Kind, Image]) -> bool:
    content, state, result = parts.get(Kind.COMMAND), parts.get(Kind.STATE), parts.get(Kind.RESULT)
    if content is None or state is None or state.columns["seq"] != content.columns["seq"]:
        return False
    # A result may be left of an earlier command with the same id only where somebody else wrote.
    fits = result is not None and result.columns["seq"] == content.columns["seq"]
    kept = result.columns["result"] if result is not None and fits else None
    columns = content.columns | state.columns | {"result": kept}
    rows = [(number, columns["seq"], *step) for number, *step in state.trace]
    return _insert(cursor, "commands", columns) and _insert_all(
        cursor, "INSERT INTO traces (id, command, wall, event, detail) VALUES (?, ?, ?, ?, ?)", rows
    )


def _insert(cursor: sqlite3.Cursor, table: str, columns: dict[str, Any]) -> bool:
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    return _insert_all(cursor, f"INSERT INTO {table} ({names}) VALUES ({marks})", [tuple(columns.values())])  # noqa: S608 - names of ours


def _insert_all(cursor: sqlite3.Cursor, statement: str, rows: list[tuple[Any, ...]]) -> bool:
    try:
        cursor.executemany(statement, rows)
    except (sqlite3.Error, OverflowError):
        return False
    return True
