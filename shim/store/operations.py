"""Dispatch of the operations of `core.records` to the methods that carry them out."""

from __future__ import annotations

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
    WriteProbe,
)
from shim.store.commands import CommandOperations
from shim.store.database import Database, Finish, nothing
from shim.store.outbox import OutboxOperations
from shim.store.sessions import SessionOperations


class Operations:
    """All operations on one database, carried out in a transaction that the caller begins and ends."""

    def __init__(
        self,
        database: Database,
        commands: CommandOperations | None = None,
        outbox: OutboxOperations | None = None,
    ) -> None:
        """Register the operations. An engine may pass its own implementation of `commands` and `outbox`."""
        self._commands = on_commands = commands or CommandOperations(database)
        on_outbox, on_sessions = outbox or OutboxOperations(database), SessionOperations(database)
        self._carriers: dict[type[Operation], Callable[[Any], Finish[Any]]] = {
            PutCommand: on_commands.put,
            LookUpCommand: on_commands.look_up,
            MarkCommands: on_commands.mark,
            RequeueCommand: on_commands.requeue,
            AddTrace: on_commands.add_trace,
            Prune: on_commands.prune,
            FindCommand: on_commands.find,
            PutResult: on_outbox.put_result,
            PutOutbox: on_outbox.put,
            CloseOutbox: on_outbox.close,
            ReadOutbox: on_outbox.read,
            SaveSession: on_sessions.save,
            DeleteSession: on_sessions.delete,
            MoveSession: on_sessions.move,
            SaveAlias: on_sessions.save_alias,
            SaveTunnel: on_sessions.save_tunnel,
            WriteProbe: database.touch,
        }

    def carry_out(self, operations: Sequence[Operation]) -> list[Any]:
        """Carry out operations and return one result for each. Raises the engine's exceptions."""
        if len(operations) == 2:
            finish = self._at_once(*operations)
            if finish is not None:
                return [finish(), None]
        carriers = self._carriers
        return [carriers[type(operation)](operation)() for operation in operations]

    def begin(self, operations: Sequence[Operation]) -> list[Finish[Any]]:
        """Queue the statements of operations. The caller takes the results once those of the whole batch are queued."""
        if len(operations) == 2:
            finish = self._at_once(*operations)
            if finish is not None:
                return [finish, nothing]
        return [self._carriers[type(operation)](operation) for operation in operations]

    def _at_once(self, first: Operation, second: Operation) -> Finish[Any] | None:
        """Carry out a change of a command together with its trace step, the most frequent pair of operations.

        Returns `None` for any other pair.
        """
        if not isinstance(second, AddTrace):
            return None
        if isinstance(first, PutCommand):
            return self._commands.put_with_step(first, second)
        if isinstance(first, MarkCommands) and (first.session, first.ids) == (second.session, second.ids):
            return self._commands.mark_with_step(first, second)
        return None
