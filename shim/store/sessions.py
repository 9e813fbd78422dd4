"""SQL for sessions, aliases and tunnel state: part of the operations of `core.records`."""

from __future__ import annotations

from shim.core.records import DeleteSession, MoveSession, SaveAlias, SaveSession, SaveTunnel
from shim.store import rows
from shim.store.database import Database, Finish, nothing
from shim.store.rows import encode_json

_SAVE_SESSION = (
    f"INSERT INTO sessions ({rows.SESSION_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)"  # noqa: S608 - constants
    " ON CONFLICT (session) DO UPDATE SET dialect = excluded.dialect, agent_id = excluded.agent_id,"
    " upstream_cluster_id = excluded.upstream_cluster_id, last_seen = excluded.last_seen,"
    " superseded_by = excluded.superseded_by, registration = excluded.registration, reply = excluded.reply,"
    " hold = excluded.hold"
)
_SAVE_ALIAS = (
    "INSERT INTO aliases (owner, agent_id, session) VALUES (?1, ?2, ?3)"
    " ON CONFLICT (owner, agent_id) DO UPDATE SET session = excluded.session"
)
_SAVE_TUNNEL = (
    "INSERT INTO tunnels (session, payload) VALUES (?1, ?2)"
    " ON CONFLICT (session) DO UPDATE SET payload = excluded.payload"
)
_DELETE = tuple(f"DELETE FROM {table} WHERE session = ?1" for table in ("aliases", "tunnels", "sessions"))  # noqa: S608 - constants


def _move(table: str, key: str) -> str:
    """Return a statement that moves rows to another session, except those whose `key` exists there.

    The remaining rows are deleted afterwards.
    """
    return (
        f"UPDATE {table} SET session = ?2 WHERE session = ?1 AND NOT EXISTS"  # noqa: S608 - constants
        f" (SELECT 1 FROM {table} AS held WHERE held.session = ?2 AND held.{key} = {table}.{key})"
    )


_MOVE = (
    _move("commands", "id"),
    "DELETE FROM traces WHERE command IN (SELECT seq FROM commands WHERE session = ?1)",
    "DELETE FROM commands WHERE session = ?1",
    _move("unknown_results", "command_id"),
    "DELETE FROM unknown_results WHERE session = ?1",
    "UPDATE lone_traces SET session = ?2 WHERE session = ?1",
    "UPDATE tunnels SET session = ?2 WHERE session = ?1 AND NOT EXISTS (SELECT 1 FROM tunnels WHERE session = ?2)",
    "DELETE FROM tunnels WHERE session = ?1",
    "DELETE FROM sessions WHERE session = ?1",
)
# Aliases are unique by owner and agent id, so only a move to another owner can conflict with an existing alias.
_MOVE_OUTBOX = "UPDATE outbox SET session = ?2, owner = ?3 WHERE session = ?1"
_MOVE_ALIASES = (
    "UPDATE aliases SET session = ?2, owner = ?3 WHERE session = ?1 AND (owner = ?3 OR NOT EXISTS"
    " (SELECT 1 FROM aliases AS held WHERE held.owner = ?3 AND held.agent_id = aliases.agent_id))"
)
_DELETE_ALIASES = "DELETE FROM aliases WHERE session = ?1"


class SessionOperations:
    """The operations on sessions, carried out in a transaction that the caller begins and ends."""

    def __init__(self, database: Database) -> None:
        self._execute = database.execute

    def save(self, operation: SaveSession) -> Finish[None]:
        record = operation.record
        self._execute(
            _SAVE_SESSION,
            (
                str(record.key),
                record.dialect,
                record.agent_id,
                record.upstream_cluster_id,
                record.last_seen_unix,
                record.superseded_by,
                encode_json(record.registration),
                encode_json(record.reply),
                encode_json(record.hold),
            ),
        )
        return nothing

    def delete(self, operation: DeleteSession) -> Finish[None]:
        for statement in _DELETE:
            self._execute(statement, (str(operation.key),))
        return nothing

    def move(self, operation: MoveSession) -> Finish[None]:
        source, target = str(operation.source), str(operation.target)
        if source != target:
            for statement in (_MOVE_OUTBOX, _MOVE_ALIASES):
                self._execute(statement, (source, target, operation.target.owner))
            self._execute(_DELETE_ALIASES, (source,))
            for statement in _MOVE:
                self._execute(statement, (source, target) if "?2" in statement else (source,))
        return nothing

    def save_alias(self, operation: SaveAlias) -> Finish[None]:
        self._execute(_SAVE_ALIAS, (operation.owner, operation.agent_id, str(operation.session)))
        return nothing

    def save_tunnel(self, operation: SaveTunnel) -> Finish[None]:
        self._execute(_SAVE_TUNNEL, (str(operation.session), encode_json(operation.payload)))
        return nothing
