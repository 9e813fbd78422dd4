"""Commands that were pushed: how their envelope is made, and what came back. Knows nothing of the way they go."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from devtools.controller.errors import RequestRefused
from devtools.controller.faults import Positive
from devtools.controller.history import Event
from shim.protocol.upstream_message import Message

_MAX_COMMANDS = 100_000


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom a message is for: a cluster, an agent or a connection; without any of them the only or latest one."""

    cluster_id: str | None = None
    agent_id: str | None = None
    connection: Positive | None = None


class CommandSpec(Target, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `POST /control/commands` takes.

    `cluster_id` and `agent_id` go into the payload unless `address` is false. `id_as`, `type_as` and `payload_as` name
    the field that carries each (docs/reference/protocol.md#3-commands); `ttl_seconds`, `expires_at` and `created_at`
    are sent as they are, and `fields` is put over the finished payload. With `count` each command has an id of its own:
    `<id>-1`, `<id>-2`, …
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
        """The ids of the commands, made up where none is given."""
        if self.id is not None and self.count == 1:
            return [self.id]
        stem = self.id if self.id is not None else f"cmd-{uuid.uuid4().hex[:12]}"
        return [f"{stem}-{number}" for number in range(1, self.count + 1)] if self.count > 1 else [stem]

    def message(self, command_id: str | int) -> Message:
        """The envelope of one of them."""
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
    """A spec from its JSON object. Raises `RequestRefused` 400."""
    try:
        spec = msgspec.convert(value, CommandSpec, strict=True)
    except msgspec.ValidationError as error:
        raise RequestRefused(400, f"no such command: {error}") from None
    if spec.payload_as == "flat" and not isinstance(spec.payload, dict):
        raise RequestRefused(400, "a flat payload must be an object")
    return spec


@dataclass(slots=True)
class Command:
    """A command and all that is known of it, as events. `pushed` is false where only an answer has been seen."""

    id: str
    type: str = ""
    request_id: str = ""
    pushed: bool = False
    sent: list[Event] = field(default_factory=list)
    acks: list[Event] = field(default_factory=list)
    results: list[Event] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As the control API shows it."""
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
        """A command is about to be sent. An id that was used before is the same command again."""
        command = self._entry(command_id)
        command.pushed, command.type, command.request_id = True, kind, request_id
        if request_id:
            self._by_request[request_id] = command_id
        return command

    def get(self, command_id: str) -> Command | None:
        """By its id."""
        return self._commands.get(command_id)

    def sent(self, command_id: str, event: Event) -> None:
        """A command was handed to a socket, for the first time or again."""
        self._entry(command_id).sent.append(event)

    def answered(self, event: Event) -> bool:
        """Book a `command_ack` or `command_result` under the command that it names, by id or else by request id.

        False if it names none.
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
