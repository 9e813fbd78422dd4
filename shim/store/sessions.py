"""Sessions, aliases and tunnel state as SQL (the operations of `core.records`)."""

from __future__ import annotations

import sqlite3

from shim.core.records import DeleteSession, MoveSession, SaveAlias, SaveSession, SaveTunnel, Touch
from shim.store import rows
from shim.store.rows import encode_json

_SAVE_SESSION = (
    f"INSERT INTO sessions ({rows.SESSION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
    " ON CONFLICT (session) DO UPDATE SET dialect = excluded.dialect, agent_id = excluded.agent_id,"
    " upstream_cluster_id = excluded.upstream_cluster_id, last_seen = excluded.last_seen,"
    " superseded_by = excluded.superseded_by, registration = excluded.registration, reply = excluded.reply,"
    " hold = excluded.hold"
)
# `OR IGNORE` leaves behind what the target has too; that is deleted afterwards.
_MOVE = (
    "UPDATE OR IGNORE commands SET session = :target WHERE session = :source",
    "DELETE FROM traces WHERE command IN (SELECT seq FROM commands WHERE session = :source)",
    "DELETE FROM commands WHERE session = :source",
    "UPDATE outbox SET session = :target, owner = :owner WHERE session = :source",
    "UPDATE OR IGNORE unknown_results SET session = :target WHERE session = :source",
    "DELETE FROM unknown_results WHERE session = :source",
    "UPDATE lone_traces SET session = :target WHERE session = :source",
    "UPDATE OR IGNORE aliases SET session = :target, owner = :owner WHERE session = :source",
    "DELETE FROM aliases WHERE session = :source",
    "UPDATE OR IGNORE tunnels SET session = :target WHERE session = :source",
    "DELETE FROM tunnels WHERE session = :source",
    "DELETE FROM sessions WHERE session = :source",
)


class SessionOperations:
    """Works on the cursor of a transaction that the caller has begun and will end."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor

    def save(self, operation: SaveSession) -> None:
        record = operation.record
        self._cursor.execute(
            _SAVE_SESSION,
            (
                str(record.key),
                record.dialect,
                record.agent_id,
                record.upstream_cluster_id,
                record.last_seen_wall,
                record.superseded_by,
                encode_json(record.registration),
                encode_json(record.reply),
                encode_json(record.hold),
            ),
        )

    def delete(self, operation: DeleteSession) -> None:
        for table in ("aliases", "tunnels", "sessions"):
            self._cursor.execute(f"DELETE FROM {table} WHERE session = ?", (str(operation.key),))  # noqa: S608 - constants

    def move(self, operation: MoveSession) -> None:
        source, target = operation.source, operation.target
        if source != target:
            names = {"source": str(source), "target": str(target), "owner": target.owner}
            for statement in _MOVE:
                self._cursor.execute(statement, names)

    def save_alias(self, operation: SaveAlias) -> None:
        self._cursor.execute(
            "INSERT INTO aliases (owner, agent_id, session) VALUES (?, ?, ?)"
            " ON CONFLICT (owner, agent_id) DO UPDATE SET session = excluded.session",
            (operation.owner, operation.agent_id, str(operation.session)),
        )

    def touch(self, operation: Touch) -> None:
        self._cursor.execute(
            "INSERT INTO meta (key, value) VALUES ('touched', ?)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (operation.wall,),
        )

    def save_tunnel(self, operation: SaveTunnel) -> None:
        self._cursor.execute(
            "INSERT INTO tunnels (session, payload) VALUES (?, ?)"
            " ON CONFLICT (session) DO UPDATE SET payload = excluded.payload",
            (str(operation.session), encode_json(operation.payload)),
        )
