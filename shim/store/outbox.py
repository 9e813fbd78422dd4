"""SQL for results and the outbox: part of the operations of `core.records`."""

from __future__ import annotations

from functools import partial
from typing import Any

from shim.core.records import (
    CloseOutbox,
    CommandState,
    OutboxEntry,
    PutOutbox,
    PutResult,
    ReadOutbox,
    ResultOutcome,
    SessionKey,
)
from shim.store import quarantine
from shim.store.database import Database, Finish, nothing
from shim.store.rows import UndecodableRow, decode_object, encode_json, parse_key

_SELECT_COMMAND = "SELECT seq, state, request_id, result FROM commands WHERE session = ?1 AND id = ?2"
_ANSWER_COMMAND = "UPDATE commands SET state = 'answered', updated = ?1, result = ?2 WHERE seq = ?3"
_INSERT_UNKNOWN = "INSERT INTO unknown_results (session, command_id, wall) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING"
INSERT_OUTBOX = "INSERT INTO outbox (owner, session, command_id, request_id, payload) VALUES (?1, ?2, ?3, ?4, ?5)"
_ANSWER_QUARANTINED = "UPDATE quarantine SET pending = false WHERE pending AND session = ?1 AND command_id = ?2"
# Close the command if entry ?1, which the next statement deletes, is its last one in the outbox.
_CLOSE_COMMAND = (
    "UPDATE commands SET state = 'closed', updated = ?2"
    " WHERE (session, id) = (SELECT session, command_id FROM outbox WHERE seq = ?1) AND state = 'answered'"
    " AND NOT EXISTS (SELECT 1 FROM outbox AS other"
    " WHERE other.session = commands.session AND other.command_id = commands.id AND other.seq <> ?1)"
)
_DELETE_ENTRY = "DELETE FROM outbox WHERE seq = ?1"
_READ = (
    "SELECT seq, session, command_id, request_id, payload FROM outbox WHERE owner = ?1 AND seq > ?2"
    " ORDER BY seq LIMIT ?3"
)
_REPLACE_PAYLOAD = "UPDATE outbox SET payload = ?1 WHERE seq = ?2"


class OutboxOperations:
    """The operations on results, carried out in a transaction that the caller begins and ends."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._execute = database.execute

    def put_result(self, operation: PutResult) -> Finish[ResultOutcome]:
        session, command_id = str(operation.session), operation.command_id
        row = self._execute(_SELECT_COMMAND, (session, command_id)).fetchone()
        if row is None:
            return self._put_unknown_result(operation)
        seq, state_text, request_id, result = row
        state = CommandState(state_text)
        if result is not None:
            return partial(ResultOutcome, None, known=True, state=state)
        payload = encode_json(operation.payload)
        self._execute(_ANSWER_COMMAND, (operation.wall, payload, seq))
        entry = self._insert(operation.session, command_id, request_id, operation.payload, payload)()
        return partial(ResultOutcome, entry, known=True, state=state)

    def _put_unknown_result(self, operation: PutResult) -> Finish[ResultOutcome]:
        known = self._execute(_INSERT_UNKNOWN, (str(operation.session), operation.command_id, operation.wall))
        if not known.rowcount:
            return partial(ResultOutcome, None, known=False)
        payload = as_unknown(operation.payload)
        entry = self._insert(operation.session, operation.command_id, "", payload, encode_json(payload))()
        return partial(ResultOutcome, entry, known=False)

    def put(self, operation: PutOutbox) -> Finish[OutboxEntry]:
        key, command_id, payload = operation.session, operation.command_id, operation.payload
        self._execute(_ANSWER_QUARANTINED, (str(key), command_id))
        return self._insert(key, command_id, operation.request_id, payload, encode_json(payload))

    def _insert(
        self, key: SessionKey, command_id: str, request_id: str, payload: dict[str, Any], encoded: bytes
    ) -> Finish[OutboxEntry]:
        seq = self._database.insert(INSERT_OUTBOX, (key.owner, str(key), command_id, request_id, encoded))
        return partial(OutboxEntry, seq or 0, key, command_id, request_id, payload)

    def close(self, operation: CloseOutbox) -> Finish[None]:
        for seq in operation.seqs:
            self._execute(_CLOSE_COMMAND, (seq, operation.wall))
            self._execute(_DELETE_ENTRY, (seq,))
        return nothing

    def read(self, operation: ReadOutbox) -> Finish[list[OutboxEntry]]:
        page = self._execute(_READ, (operation.owner, operation.after, operation.limit))
        return lambda: [self._entry(*row) for row in page.fetchall()]

    def _entry(self, seq: int, session: str, command_id: str, request_id: str, column: Any) -> OutboxEntry:
        try:
            payload = decode_object(column)
        except UndecodableRow as error:
            # The controller waits for a result of this command: send an error in place of the unreadable one.
            content = {"session": session, "command_id": command_id, "request_id": request_id, "payload": column}
            quarantine.keep(self._database, "outbox", content, str(error))
            payload = {
                "command_id": command_id,
                "success": False,
                "code": "malformed",
                "error": "the stored result cannot be read",
            }
            self._execute(_REPLACE_PAYLOAD, (encode_json(payload), seq))
        return OutboxEntry(seq, parse_key(session), command_id, request_id, payload)


def as_unknown(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the result of an unknown command in the form that the controller receives."""
    return payload | {"code": "unknown_command"}
