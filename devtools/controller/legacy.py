"""The vendor's legacy HTTP API, for modes `http` and `auto` (docs/reference/protocol.md#4-modes).

Every call is recorded in the history as the message that it corresponds to, with connection 0 and `via: http`. The API
can be switched off: each call is then answered with 410.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import msgspec
from aiohttp import web

from devtools.controller.history import EventKind
from devtools.controller.state import ControllerState, Tokens, bearer
from shim.agent_api.admission import Router
from shim.core.agent_calls import (
    Accepted,
    Commands,
    Failed,
    HealthCall,
    Healthy,
    HeartbeatCall,
    OfferedCommand,
    Outcome,
    PollCall,
    RegisterCall,
    Registered,
    ResultCall,
    StatusCall,
    TunnelPollCall,
    TunnelState,
)
from shim.errors import AgentError, OperatorError
from shim.protocol import dialects
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import Message


class LegacyCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /control/legacy/commands`: a command that waits for the next poll of `ident`.

    `ident` is the id in the poll's path: a cluster id, or the agent id of dialect `agents`.
    """

    ident: str
    id: str
    type: str = "test"
    payload: dict[str, Any] = {}


class LegacySwitch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /control/legacy`: the status with which every call is refused, or 0 to serve again."""

    refuse: int = 0


class LegacyApi:
    """The routes of all dialects. While `refuse` is not 0, it is the status of every response."""

    def __init__(self, state: ControllerState, tokens: Tokens) -> None:
        self._state = state
        self._tokens = tokens
        self._router = Router(dialects.load())
        self._waiting: dict[str, deque[OfferedCommand]] = defaultdict(deque)
        self.refuse = 0

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of all dialects."""
        served = [route for dialect in dialects.load() for route in dialect.ROUTES]
        return [web.route(route.method, route.pattern, self._serve) for route in served]

    def push(self, value: Any) -> None:
        """Queue a command for a poll. Raises `OperatorError` 400."""
        spec = _convert(value, LegacyCommand)
        created_at = rfc3339(self._state.clock.wall_s())
        self._waiting[spec.ident].append(OfferedCommand(spec.id, spec.type, spec.payload, created_at))

    def switch(self, value: Any) -> None:
        """Refuse all calls, or serve again. Raises `OperatorError` 400."""
        self.refuse = _convert(value, LegacySwitch).refuse

    async def _serve(self, request: web.Request) -> web.Response:
        if self.refuse:
            self._state.history.record(EventKind.REFUSED, via="http", status=self.refuse)
            return _json(self.refuse, {"success": False, "error": "this endpoint has been removed"})
        try:
            match = self._router.match(request.method, request.raw_path.partition("?")[0])
            owner = self._tokens.owner_of(bearer(request.headers.get("Authorization", "")))
            if owner is None and not match.route.open:
                raise AgentError(401, "unauthorized")
            body = await request.json() if request.body_exists else None
            call = dialects.Call(match.params, body, request.headers.get("User-Agent", ""))
            agent_call = match.dialect.parse(match.route.operation, call)
        except AgentError as error:
            return _json(error.status, {"success": False, "error": str(error)})
        except ValueError:
            return _json(400, {"success": False, "error": "the body is not valid JSON"})
        reply = match.dialect.render(match.route.operation, self._carry_out(owner or "", agent_call), call)
        return web.Response(status=reply.status) if reply.body is None else _json(reply.status, reply.body)

    def _carry_out(self, owner: str, call: Any) -> Outcome:
        match call:
            case RegisterCall():
                self._record("register", dict(call.payload))
                known, _ = self._state.registry.register(owner, call.payload)
                return Registered(known.cluster_id, known.cluster_uuid, known.name, known.agent_id)
            case HeartbeatCall():
                self._record(
                    "heartbeat", {"agent_id": call.agent_id, "ident": call.target.ident, "status": call.status}
                )
                return Accepted()
            case StatusCall():
                self._record("status", call.body)
                return Accepted()
            case ResultCall():
                event = self._record("command_result", {"command_id": call.command_id, **call.body})
                self._state.commands.answered(event)
                return Accepted()
            case PollCall():
                waiting = self._waiting[call.target.ident]
                commands = tuple(waiting)
                waiting.clear()
                return Commands(commands, 5)
            case HealthCall():
                return Healthy()
            case TunnelPollCall():
                return TunnelState(None, 5)
            case _:
                return Failed(404, "not registered")

    def _record(self, kind: str, payload: dict[str, Any]) -> Any:
        message = Message(kind, payload, "", rfc3339(self._state.clock.wall_s()))
        return self._state.history.record(EventKind.RECEIVED, 0, message, via="http")


def _convert(value: Any, kind: type[Any]) -> Any:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise OperatorError(400, str(error)) from None


def _json(status: int, body: dict[str, Any]) -> web.Response:
    return web.json_response(body, status=status)
