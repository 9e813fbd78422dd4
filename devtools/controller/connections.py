"""The open connections: selection by target, and faults that affect connections already open."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from aiohttp import WSMsgType

from devtools.controller.active_faults import ActiveFault
from devtools.controller.commands import Command, CommandSpec, Target
from devtools.controller.connection import Connection
from devtools.controller.faults import CloseCode, Drop, Forget, How
from devtools.controller.history import Condition, Event, EventKind
from devtools.controller.message_handler import MessageHandler
from devtools.controller.outbox import Outgoing
from devtools.controller.state import ControllerState
from shim.errors import OperatorError
from shim.protocol.upstream_message import Message


class RawSpec(Target, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /control/send`: a message or a raw frame.

    A `message` is any object and passes through the faults. A raw frame, as `text` or as `base64`, is sent unchanged in
    a frame of the type `frame`.
    """

    message: dict[str, Any] | None = None
    text: str | None = None
    base64: str | None = None
    frame: Literal["text", "binary"] = "text"

    def raw(self) -> bytes:
        """Return the bytes of the raw frame. Raises `OperatorError` 400."""
        if self.text is not None:
            return self.text.encode()
        try:
            return base64.b64decode(self.base64 or "", validate=True)
        except binascii.Error:
            raise OperatorError(400, "base64 is malformed") from None


class DropSpec(Target, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /control/drop`; without a target all connections are dropped."""

    how: How = How.CLOSE
    code: CloseCode = 1001
    reason: str = ""


class Connections:
    """All connections by number. A number is never reused."""

    def __init__(self, state: ControllerState) -> None:
        self.state = state
        self.message_handler = MessageHandler(state)
        self.by_number: dict[int, Connection] = {}
        self.next_number = 1
        self.changed = Condition()
        state.faults.on_start = self._fault_starts
        state.faults.on_end = self._fault_ends

    # --- selection ----------------------------------------------------------------------------------------------------

    def connection_for(self, target: Target) -> Connection:
        """Return the open connection of a target. Raises `OperatorError` 409 if there is none."""
        connection = self.by_number.get(self._number_for(target))
        if connection is None:
            raise OperatorError(409, "no open connection speaks for this target")
        return connection

    def _number_for(self, target: Target) -> int:
        registry = self.state.registry
        if target.connection is not None:
            return target.connection
        if target.cluster_id is not None:
            return registry.presence(target.cluster_id).connection
        if target.agent_id is not None:
            known = registry.by_agent(target.agent_id)
            return registry.presence(known.cluster_id).connection if known else 0
        speaking = [number for number, connection in self.by_number.items() if connection.clusters]
        return max(speaking or self.by_number, default=0)

    # --- sending and dropping -----------------------------------------------------------------------------------------

    def push(self, spec: CommandSpec) -> list[tuple[Command, Outgoing]]:
        """Queue commands on the connection of their target. Raises `OperatorError`."""
        connection = self.connection_for(spec)
        pushed = []
        for command_id in spec.ids():
            message = spec.message(command_id)
            command = self.state.commands.pushed(str(command_id), spec.type, message.request_id)
            pushed.append((command, connection.send(message, command_id=command.id)))
        return pushed

    def send(self, spec: RawSpec) -> Outgoing:
        """Queue a message or a raw frame. Raises `OperatorError`."""
        given = [value is not None for value in (spec.message, spec.text, spec.base64)]
        if sum(given) != 1:
            raise OperatorError(400, "give one of message, text, base64")
        connection = self.connection_for(spec)
        opcode = WSMsgType.TEXT if spec.frame == "text" else WSMsgType.BINARY
        if spec.message is None:
            item = Outgoing(spec.raw(), opcode)
            connection.outbox.put(item)
            return item
        try:
            message = msgspec.convert(spec.message, Message, strict=True)
        except msgspec.ValidationError as error:
            raise OperatorError(400, f"no such message: {error}; send it as text") from None
        return connection.send(message)

    def drop(self, spec: DropSpec) -> list[int]:
        """End connections and return their numbers. Raises `OperatorError` 409 if the target has none."""
        everyone = spec.connection is None and spec.cluster_id is None and spec.agent_id is None
        chosen = list(self.by_number.values()) if everyone else [self.connection_for(spec)]
        for connection in chosen:
            connection.drop(spec.how, spec.code, spec.reason)
        return [connection.number for connection in chosen]

    # --- faults -------------------------------------------------------------------------------------------------------

    def _fault_starts(self, entry: ActiveFault) -> None:
        entry.connections_before = self.next_number
        self.state.history.record(EventKind.FAULT_SET, fault=entry.to_json())
        fault = entry.fault
        if isinstance(fault, Drop) and not fault.on:
            for connection in list(self.by_number.values()):
                if self.state.faults.peek(Drop, connection.scope()) is fault:
                    connection.drop(fault.how, fault.code, fault.reason)
            self.state.faults.clear(entry.id)
        elif isinstance(fault, Forget):
            self.state.registry.forget(cluster_id=fault.cluster_id, agent_id=fault.agent_id)
            self.state.faults.clear(entry.id)
        self._tell_connections()

    def _fault_ends(self, entry: ActiveFault) -> None:
        self.state.history.record(EventKind.FAULT_ENDED, fault=entry.to_json())
        self._tell_connections()

    def _tell_connections(self) -> None:
        for connection in list(self.by_number.values()):
            connection.faults_changed()
        self.changed.wake()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def serve(self, connection: Connection) -> None:
        """Register a connection until it ends."""
        self.by_number[connection.number] = connection
        try:
            await connection.run()
        finally:
            del self.by_number[connection.number]
            self.changed.wake()

    async def drop_all(self, how: How) -> None:
        """End all connections and return when they have ended; each does within `close_timeout_s`."""
        for connection in list(self.by_number.values()):
            connection.drop(how, 1001, "going away")
        await self.changed.until(lambda: not self.by_number)


async def written(items: Sequence[Outgoing], timeout_s: float = 1) -> list[Event | None]:
    """Wait for the events of sending. An entry is `None` if it was not sent in time, because a fault holds it back."""
    if items:
        await asyncio.wait([item.written for item in items], timeout=timeout_s)
    return [item.written.result() if item.written.done() else None for item in items]
