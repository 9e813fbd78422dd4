"""Which operation of `core.records` is carried out by what."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from shim.core.records import (
    AddTrace,
    CloseOutbox,
    DeleteSession,
    FindCommand,
    LookUpCommand,
    MarkCommands,
    MoveSession,
    Operation,
    Prune,
    PutCommand,
    PutOutbox,
    PutResult,
    ReadOutbox,
    RequeueCommand,
    SaveAlias,
    SaveSession,
    SaveTunnel,
    Touch,
)
from shim.store.commands import CommandOperations
from shim.store.outbox import OutboxOperations
from shim.store.sessions import SessionOperations


class Operations:
    """Carries operations out on the cursor of a transaction that the caller has begun and will end."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        commands, outbox, sessions = CommandOperations(cursor), OutboxOperations(cursor), SessionOperations(cursor)
        self._commands = commands
        self._carriers: dict[type[Operation], Callable[[Any], Any]] = {
            PutCommand: commands.put,
            LookUpCommand: commands.look_up,
            MarkCommands: commands.mark,
            RequeueCommand: commands.requeue,
            AddTrace: commands.add_trace,
            Prune: commands.prune,
            FindCommand: commands.find,
            PutResult: outbox.put_result,
            PutOutbox: outbox.put,
            CloseOutbox: outbox.close,
            ReadOutbox: outbox.read,
            SaveSession: sessions.save,
            DeleteSession: sessions.delete,
            MoveSession: sessions.move,
            SaveAlias: sessions.save_alias,
            SaveTunnel: sessions.save_tunnel,
            Touch: sessions.touch,
        }

    def carry_out(self, operations: Sequence[Operation]) -> list[Any]:
        """One result per operation. Raises whatever makes one of them impossible."""
        carriers = self._carriers
        if len(operations) == 2:
            first, second = operations
            if isinstance(first, PutCommand) and isinstance(second, AddTrace):
                return [self._commands.put_with_step(first, second), None]
        return [carriers[type(operation)](operation) for operation in operations]
