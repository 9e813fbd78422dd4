"""Results and the outbox as SQL (the operations of `core.records`)."""

from __future__ import annotations

import sqlite3
from typing import Any

from shim.core.records import (
    CloseOutbox,
    OutboxEntry,
    PutOutbox,
    PutResult,
    ReadOutbox,
    ResultOutcome,
    SessionKey,
    State,
)
from shim.store import quarantine
from shim.store.rows import UndecodableRow, decode_object, encode_json, parse_key

_SELECT_COMMAND = "SELECT seq, state, request_id, result FROM commands WHERE session = ? AND id = ?"
_INSERT_OUTBOX = "INSERT INTO outbox (owner, session, command_id, request_id, payload) VALUES (?, ?, ?, ?, ?)"
_CLOSE = (
    "UPDATE commands SET state = 'closed', updated = ? WHERE session = ? AND id = ? AND state = 'answered'"
    " AND NOT EXISTS (SELECT 1 FROM outbox WHERE session = commands.session AND command_id = commands.id)"
)


class OutboxOperations:
    """Works on the cursor of a transaction that the caller has begun and will end."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor

    def put_result(self, operation: PutResult) -> ResultOutcome:
        session, command_id = str(operation.session), operation.command_id
        row = self._cursor.execute(_SELECT_COMMAND, (session, command_id)).fetchone()
        if row is None:
            return self._put_unknown_result(operation)
        seq, state_text, request_id, result = row
        state = State(state_text)
        if result is not None:
            return ResultOutcome(None, known=True, state=state)
        payload = encode_json(operation.payload)
        self._cursor.execute(
            "UPDATE commands SET state = ?, updated = ?, result = ? WHERE seq = ?",
            (State.ANSWERED.value, operation.wall, payload, seq),
        )
        entry = self._insert_outbox(operation.session, command_id, request_id, operation.payload, payload)
        return ResultOutcome(entry, known=True, state=state)

    def _put_unknown_result(self, operation: PutResult) -> ResultOutcome:
        self._cursor.execute(
            "INSERT INTO unknown_results (session, command_id, wall) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (str(operation.session), operation.command_id, operation.wall),
        )
        if not self._cursor.rowcount:
            return ResultOutcome(None, known=False)
        payload = operation.payload | {"code": "unknown_command"}
        entry = self._insert_outbox(operation.session, operation.command_id, "", payload, encode_json(payload))
        return ResultOutcome(entry, known=False)

    def put(self, operation: PutOutbox) -> OutboxEntry:
        self._cursor.execute(
            "UPDATE quarantine SET pending = 0 WHERE pending AND session = ? AND command_id = ?",
            (str(operation.session), operation.command_id),
        )
        return self._insert_outbox(
            operation.session,
            operation.command_id,
            operation.request_id,
            operation.payload,
            encode_json(operation.payload),
        )

    def _insert_outbox(
        self, key: SessionKey, command_id: str, request_id: str, payload: dict[str, Any], encoded: bytes
    ) -> OutboxEntry:
        self._cursor.execute(_INSERT_OUTBOX, (key.owner, str(key), command_id, request_id, encoded))
        return OutboxEntry(self._cursor.lastrowid or 0, key, command_id, request_id, payload)

    def close(self, operation: CloseOutbox) -> None:
        commands = set()
        for seq in operation.seqs:
            commands.update(
                self._cursor.execute("SELECT session, command_id FROM outbox WHERE seq = ?", (seq,)).fetchall()
            )
            self._cursor.execute("DELETE FROM outbox WHERE seq = ?", (seq,))
        self._cursor.executemany(_CLOSE, [(operation.wall, *command) for command in commands])

    def read(self, operation: ReadOutbox) -> list[OutboxEntry]:
        page = self._cursor.execute(
            "SELECT seq, session, command_id, request_id, payload FROM outbox WHERE owner = ? AND seq > ?"
            " ORDER BY seq LIMIT ?",
            (operation.owner, operation.after, operation.limit),
        ).fetchall()
        return [self._outbox_entry(*row) for row in page]

    def _outbox_entry(self, seq: int, session: str, command_id: str, request_id: str, column: Any) -> OutboxEntry:
        try:
            payload = decode_object(column)
        except UndecodableRow as error:
            # The controller waits for an answer to this command; it gets the one that is left.
            content = {"session": session, "command_id": command_id, "request_id": request_id, "payload": column}
            quarantine.keep(self._cursor, "outbox", content, str(error))
            payload = {
                "command_id": command_id,
                "success": False,
                "code": "malformed",
                "error": "the stored result cannot be read",
            }
            self._cursor.execute("UPDATE outbox SET payload = ? WHERE seq = ?", (encode_json(payload), seq))
        return OutboxEntry(seq, parse_key(session), command_id, request_id, payload)
