"""Pushed commands: their envelopes, acknowledgements and results, independent of connections."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from devtools.controller.faults import Positive
from devtools.controller.history import Event
from shim.errors import OperatorError
from shim.protocol.upstream_message import Message

_MAX_COMMANDS = 100_000


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Recipient of a message: a cluster, an agent or a connection; without any of them the only or the latest one."""

    cluster_id: str | None = None
    agent_id: str | None = None
    connection: Positive | None = None


class CommandSpec(Target, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /control/commands`.

    `cluster_id` and `agent_id` are added to the payload unless `address` is false. `id_as`, `type_as` and `payload_as`
    name the fields that carry each (docs/reference/protocol.md#3-commands). `ttl_seconds`, `expires_at` and
    `created_at` are sent unchanged, and `fields` overrides the finished payload. With `count` the ids are `<id>-1`,
    `<id>-2`, …
    """

    type: str = "test"
    payload: Any = msgspec.field(default_factory=dict)
    id: str | int | None = None
    count: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    address: bool = True
    id_as: Literal["command_id", "id", "request_id", "none"] = "command_id"
    type_as: Literal["type", "command", "action", "none"] = "type"
    payload_as: Literal["payload", "params", "args", "flat"] = "payload"
    message_type: str = "command"
    request_id: str | None = None
    ttl_seconds: Any = msgspec.UNSET
    expires_at: Any = msgspec.UNSET
    created_at: Any = msgspec.UNSET
    timestamp: str = ""
    fields: dict[str, Any] = {}

    def ids(self) -> list[str | int]:
        """Return the ids of the commands; generate those that are not given."""
        if self.id is not None and self.count == 1:
            return [self.id]
        stem = self.id if self.id is not None else f"cmd-{uuid.uuid4().hex[:12]}"
        return [f"{stem}-{number}" for number in range(1, self.count + 1)] if self.count > 1 else [stem]

    def message(self, command_id: str | int) -> Message:
        """Build the envelope of one command."""
        payload: dict[str, Any] = {}
        if self.id_as in ("command_id", "id"):
            payload[self.id_as] = command_id
        if self.type_as != "none":
            payload[self.type_as] = self.type
        if self.payload_as != "flat":
            payload[self.payload_as] = self.payload
        elif isinstance(self.payload, dict):
            payload |= self.payload
        for name in ("cluster_id", "agent_id"):
            if self.address and getattr(self, name) is not None:
                payload[name] = getattr(self, name)
        for name in ("ttl_seconds", "expires_at", "created_at"):
            if getattr(self, name) is not msgspec.UNSET:
                payload[name] = getattr(self, name)
        request_id = str(command_id) if self.id_as == "request_id" else self.request_id
        if request_id is None:
            request_id = "" if self.id_as == "none" else f"req-{uuid.uuid4().hex[:12]}"
        return Message(self.message_type, payload | self.fields, request_id, self.timestamp)


def parse_spec(value: Any) -> CommandSpec:
    """Parse a spec from its JSON object. Raises `OperatorError` 400."""
    try:
        spec = msgspec.convert(value, CommandSpec, strict=True)
    except msgspec.ValidationError as error:
        raise OperatorError(400, f"no such command: {error}") from None
    if spec.payload_as == "flat" and not isinstance(spec.payload, dict):
        raise OperatorError(400, "a flat payload must be an object")
    return spec


@dataclass(slots=True)
class Command:
    """A command with its events. `pushed` is false if only a reply to the command has been received."""

    id: str
    type: str = ""
    request_id: str = ""
    pushed: bool = False
    sent: list[Event] = field(default_factory=list)
    acks: list[Event] = field(default_factory=list)
    results: list[Event] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the command as the control API shows it."""
        return {
            "id": self.id,
            "type": self.type,
            "request_id": self.request_id,
            "pushed": self.pushed,
            "sent": [event.to_json() for event in self.sent],
            "acks": [event.to_json() for event in self.acks],
            "results": [event.to_json() for event in self.results],
        }


class CommandLog:
    """The commands by id, at most 100,000: older ones are dropped."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}
        self._by_request: dict[str, str] = {}

    def pushed(self, command_id: str, kind: str, request_id: str) -> Command:
        """Add a command before it is sent. An id that was used before denotes the same command."""
        command = self._entry(command_id)
        command.pushed, command.type, command.request_id = True, kind, request_id
        if request_id:
            self._by_request[request_id] = command_id
        return command

    def get(self, command_id: str) -> Command | None:
        """Return the command with this id."""
        return self._commands.get(command_id)

    def sent(self, command_id: str, event: Event) -> None:
        """Record that a command was written to a socket, for the first time or again."""
        self._entry(command_id).sent.append(event)

    def answered(self, event: Event) -> bool:
        """Record a `command_ack` or `command_result` under its command, found by its id or else by its request id.

        Returns False if the message names no command.
        """
        named = event.payload.get("command_id")
        command_id = str(named) if isinstance(named, (str, int)) and named != "" else ""
        command_id = command_id or self._by_request.get(event.request_id, "")
        if not command_id:
            return False
        command = self._entry(command_id)
        (command.acks if event.type == "command_ack" else command.results).append(event)
        return True

    def _entry(self, command_id: str) -> Command:
        if command_id not in self._commands and len(self._commands) >= _MAX_COMMANDS:
            oldest = self._commands.pop(next(iter(self._commands)))
            self._by_request.pop(oldest.request_id, None)
        return self._commands.setdefault(command_id, Command(command_id))
