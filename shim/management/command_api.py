"""The admin port's actions by name, at this process or at all replicas, with JSON in and out.

They are traces of commands (without payload), purge, redeliver, forget and drain. `subject.Actions` carries them out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec

from shim.bridge.admin_actions import NOT_FOUND, unknown_command
from shim.core.records import CommandDetails, CommandRecord
from shim.errors import OperatorError
from shim.management.subject import Subject

MAX_DRAIN_S = 86_400.0

_Body = TypeVar("_Body", bound=msgspec.Struct)


class CommandSelector(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a purge or a redelivery."""

    session: str = ""
    reason: str = ""


class DrainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a drain."""

    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_DRAIN_S)] = 300.0


class CommandApi:
    """An operator's actions on commands, agents and drains, by name and independent of HTTP.

    `here` carries out an action in this process only, `everywhere` at all replicas. `target` is a command's id, or an
    agent's name, id or whole key; `body` is the JSON of the request.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._actions: dict[str, Callable[[str, bytes], Awaitable[dict[str, Any]]]] = {
            "trace": self._trace,
            "purge": self._purge,
            "redeliver": self._redeliver,
            "forget": self._forget,
            "drain": self._drain,
            "resume": self._resume,
        }

    async def here(self, action: str, target: str, body: bytes) -> dict[str, Any]:
        """Carry out an action in this process and return its JSON. Raises `OperatorError`."""
        return await self._actions[action](target, body)

    async def everywhere(self, action: str, target: str, body: bytes) -> dict[str, Any]:
        """Carry out an action where the command or agent is, a drain at all replicas. Raises `OperatorError`.

        If a replica does not answer, a drain goes on at the others, and repeating the order does no harm.
        """
        try:
            mine = await self.here(action, target, body)
        except OperatorError as error:
            if error.status != NOT_FOUND:
                raise
            for _, answer in await self._subject.ask_others(action, target, body, required=True):
                return answer
            raise
        if action in ("drain", "resume"):
            try:
                await self._subject.ask_others(action, target, body, complete=True)
            except OperatorError as error:
                raise OperatorError(error.status, f"{error}; the others follow the order: repeat it") from None
            return {"drain": msgspec.to_builtins(self._subject.admin_actions.progress())}
        if action == "trace":
            answers = await self._subject.ask_others(action, target, body)
            mine["commands"] += [each | {"replica": name} for name, answer in answers for each in answer["commands"]]
            if not mine["commands"]:
                raise unknown_command()
        return mine

    async def _trace(self, command_id: str, _body: bytes) -> dict[str, Any]:
        """Describe every command with this id, of all sessions; none is no error."""
        found = await self._subject.admin_actions.find(command_id)
        return {"commands": [describe(each, self._subject) for each in found]}

    async def _purge(self, command_id: str, body: bytes) -> dict[str, Any]:
        choice = _decode(body, CommandSelector)
        return {"command": _outcome(await self._subject.admin_actions.purge(command_id, choice.session, choice.reason))}

    async def _redeliver(self, command_id: str, body: bytes) -> dict[str, Any]:
        choice = _decode(body, CommandSelector)
        record = await self._subject.admin_actions.redeliver(command_id, choice.session, choice.reason)
        return {"command": _outcome(record)}

    async def _forget(self, agent: str, _body: bytes) -> dict[str, Any]:
        key = await self._subject.admin_actions.forget(agent)
        return {"agent": {"key": str(key), "kind": key.kind, "id": key.ident}}

    async def _drain(self, _target: str, body: bytes) -> dict[str, Any]:
        """Begin to drain, or change the deadline."""
        return {"drain": msgspec.to_builtins(self._subject.admin_actions.drain(_decode(body, DrainRequest).timeout_s))}

    async def _resume(self, _target: str, _body: bytes) -> dict[str, Any]:
        """Accept commands again."""
        return {"drain": msgspec.to_builtins(self._subject.admin_actions.resume())}


def describe(found: CommandDetails, subject: Subject) -> dict[str, Any]:
    """Return a command with its trace, without its payload."""
    record, result, trace = found
    stored = record.seq > 0
    session = subject.session(record.session)
    return {
        **_outcome(record),
        "agent": None if session is None else session.registration.get("name") or None,
        "dialect": None if session is None else session.dialect,
        "type": record.type or None,
        "via": record.via or "websocket",
        "created_at": record.created_at or None,
        "arrived_at": record.arrived_unix if stored else None,
        "expires_at": record.expires_unix if stored else None,
        "size_bytes": record.size_bytes,
        "attempts": record.attempts,
        "result": None if result is None else {"success": result.get("success"), "code": result.get("code")},
        "trace": [{"at": entry.wall, "event": entry.event, "detail": entry.detail} for entry in trace],
    }


def _outcome(record: CommandRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "session": {"key": str(record.session), "kind": record.session.kind, "id": record.session.ident},
        "state": record.state.value,
        "stored": record.seq > 0,
    }


def _decode(body: bytes, kind: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(body, type=kind) if body else kind()
    except msgspec.DecodeError as error:  # its text names keys and types, no values
        raise OperatorError(400, f"the body cannot be read: {error}") from None
