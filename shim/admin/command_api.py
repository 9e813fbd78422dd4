"""Routes for single commands: a trace without payload, and the operator's actions."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web

from shim.admin.subject import Agents, Subject
from shim.core.records import CommandDetails, CommandRecord
from shim.errors import OperatorError

MAX_DRAIN_S = 86_400.0
BODY_S = 10.0

_Body = TypeVar("_Body", bound=msgspec.Struct)


class CommandSelector(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a purge or a redelivery."""

    session: str = ""
    reason: str = ""


class DrainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a drain."""

    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_DRAIN_S)] = 300.0


class CommandHandlers:
    """Handlers of the routes. They raise `OperatorError`."""

    def __init__(self, bridge: Subject) -> None:
        self._bridge = bridge

    async def trace(self, request: web.Request) -> web.Response:
        """Handle GET /commands/{id}.json: return every command with this id, of all sessions."""
        command_id = request.match_info["id"]
        here = await self.described(command_id)
        found = [*here, *await self._bridge.found_elsewhere(command_id)]
        if not found:
            raise OperatorError(404, "no command with this id is known; ended ones are kept for commands.retain_s")
        return _json({"commands": found})

    async def described(self, command_id: str) -> list[dict[str, Any]]:
        """Return the description of every command with this id in this process."""
        return [describe(each, self._bridge.sessions) for each in await self._bridge.admin_actions.find(command_id)]

    async def purge(self, request: web.Request) -> web.Response:
        """Handle POST /commands/{id}/purge."""
        choice = await _body(request, CommandSelector)
        record = await self._bridge.admin_actions.purge(request.match_info["id"], choice.session, choice.reason)
        return _json({"command": _outcome(record)})

    async def redeliver(self, request: web.Request) -> web.Response:
        """Handle POST /commands/{id}/redeliver."""
        choice = await _body(request, CommandSelector)
        record = await self._bridge.admin_actions.redeliver(request.match_info["id"], choice.session, choice.reason)
        return _json({"command": _outcome(record)})

    async def forget(self, request: web.Request) -> web.Response:
        """Handle POST /agents/{id}/forget. The id is an agent's name, id or whole key."""
        key = await self._bridge.session_removal.forget(request.match_info["id"])
        return _json({"agent": {"key": str(key), "kind": key.kind, "id": key.ident}})

    async def drain(self, request: web.Request) -> web.Response:
        """Handle POST /drain: begin to drain, or change the deadline."""
        order = await _body(request, DrainRequest)
        return _json({"drain": msgspec.to_builtins(self._bridge.admin_actions.drain(order.timeout_s))})

    async def resume(self, request: web.Request) -> web.Response:
        """Handle DELETE /drain: accept commands again."""
        return _json({"drain": msgspec.to_builtins(self._bridge.admin_actions.resume())})


def describe(found: CommandDetails, sessions: Agents) -> dict[str, Any]:
    """Return a command with its trace, without its payload."""
    record, result, trace = found
    stored = record.seq > 0
    session = sessions.get(record.session)
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


async def _body(request: web.Request, kind: type[_Body]) -> _Body:
    try:
        async with asyncio.timeout(BODY_S):
            data = await request.read()
    except TimeoutError:
        raise OperatorError(408, "the body did not arrive in time") from None
    try:
        return msgspec.json.decode(data, type=kind) if data else kind()
    except msgspec.DecodeError as error:  # its text names keys and types, no values
        raise OperatorError(400, f"the body cannot be read: {error}") from None


def _json(data: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), content_type="application/json")
