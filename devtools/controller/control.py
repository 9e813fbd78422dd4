"""The control API, through which tests, demos and the fault harness control and observe the controller."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from devtools.controller.active_faults import parse_fault
from devtools.controller.commands import Command, parse_spec
from devtools.controller.connections import Connections, DropSpec, RawSpec, written
from devtools.controller.history import Event
from devtools.controller.legacy import LegacyApi
from devtools.controller.state import bearer
from shim.errors import OperatorError
from shim.protocol.rfc3339 import rfc3339

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_MAX_WAIT_S = 300.0
_WAITS: dict[str, Callable[[Command], bool]] = {
    "sent": lambda command: bool(command.sent),
    "ack": lambda command: bool(command.acks or command.results),
    "result": lambda command: bool(command.results),
}


class Control:
    """JSON over HTTP. A refusal is `{"success": false, "error": …}` with a status of 4xx or 5xx."""

    def __init__(self, connections: Connections, legacy: LegacyApi) -> None:
        self._connections = connections
        self._legacy = legacy
        self._state = connections.state

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of the API."""
        return [
            web.get("/control", self._guarded(self._overview)),
            web.get("/control/agents", self._guarded(self._agents)),
            web.get("/control/messages", self._guarded(self._messages)),
            web.post("/control/commands", self._guarded(self._push)),
            web.get("/control/commands/{id}", self._guarded(self._command)),
            web.post("/control/legacy", self._guarded(self._switch_legacy)),
            web.post("/control/legacy/commands", self._guarded(self._push_legacy)),
            web.post("/control/send", self._guarded(self._send)),
            web.post("/control/drop", self._guarded(self._drop)),
            web.get("/control/faults", self._guarded(self._faults)),
            web.post("/control/faults", self._guarded(self._set_faults)),
            web.delete("/control/faults", self._guarded(self._clear_faults)),
            web.delete("/control/faults/{id}", self._guarded(self._clear_fault)),
        ]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            token = self._state.options.control_token
            sent = bearer(request.headers.get("Authorization", ""))
            if token and not hmac.compare_digest(sent.encode(), token.encode()):
                return _refusal(401, "unauthorized: the control API needs its own Bearer token")
            try:
                return await handler(request)
            except OperatorError as refused:
                return _refusal(refused.status, str(refused))

        return guarded

    async def _overview(self, _request: web.Request) -> web.Response:
        paths = sorted({f"{route.method} {route.path}" for route in self.routes()})
        return web.json_response({"success": True, "endpoints": paths, "last_n": self._state.history.last_n})

    async def _agents(self, _request: web.Request) -> web.Response:
        registry = self._state.registry
        agents = []
        for known in registry.all():
            presence = registry.presence(known.cluster_id)
            shown: dict[str, Any] = msgspec.to_builtins(known)
            shown |= {
                "connection": presence.connection if presence.connection in self._connections.by_number else None,
                "registers": presence.registers,
                "heartbeats": presence.heartbeats,
                "last_heartbeat": presence.last_heartbeat or None,
            }
            agents.append(shown)
        connections = [
            {"number": c.number, "endpoint": c.endpoint.value, "owner": c.owner, "clusters": c.clusters}
            for c in self._connections.by_number.values()
        ]
        return web.json_response({"success": True, "agents": agents, "connections": connections})

    async def _messages(self, request: web.Request) -> web.Response:
        """Return events. Query: `after`, `type`, `kind` (with commas), `direction`, `connection`, `limit`, `wait_s`."""
        history = self._state.history
        query = request.query
        after, limit = _number(request, "after", 0), _number(request, "limit", 1000)
        connection = _number(request, "connection", 0)
        types = set(filter(None, query.get("type", "").split(",")))
        kinds = set(filter(None, query.get("kind", "").split(",")))
        direction = query.get("direction", "")

        def wanted(event: Event) -> bool:
            return (
                (not types or event.type in types)
                and (not kinds or event.kind.value in kinds)
                and (not direction or event.direction == direction)
                and (not connection or event.connection == connection)
            )

        found = history.after(after, wanted, limit)
        wait_s = _seconds(request, "wait_s")
        if not found and wait_s:
            try:
                found = [await history.wait_for(wanted, after=after, timeout_s=wait_s)]
            except TimeoutError:
                found = []
        shown = [event.to_json() for event in found]
        seen = found[-1].n if found else max(history.last_n, after)
        return web.json_response({"success": True, "messages": shown, "next": seen, "first_n": history.first_n})

    async def _push(self, request: web.Request) -> web.Response:
        spec = parse_spec(await _body(request))
        pushed = self._connections.push(spec)
        sent = await written([item for _, item in pushed])
        commands = [
            {"id": command.id, "request_id": command.request_id} | _sending(event)
            for (command, _), event in zip(pushed, sent, strict=True)
        ]
        return web.json_response({"success": True, "ids": [c["id"] for c in commands], "commands": commands})

    async def _switch_legacy(self, request: web.Request) -> web.Response:
        self._legacy.switch(await _body(request))
        return web.json_response({"success": True, "refuse": self._legacy.refuse})

    async def _push_legacy(self, request: web.Request) -> web.Response:
        self._legacy.push(await _body(request))
        return web.json_response({"success": True})

    async def _command(self, request: web.Request) -> web.Response:
        """Return one command. Query: `wait` (`sent`, `ack`, `result`), `timeout_s`; `waited_for` is the outcome."""
        command_id = request.match_info["id"]
        wait = request.query.get("wait", "")
        if wait and wait not in _WAITS:
            raise OperatorError(400, "wait must be sent, ack or result")
        timeout_s = _seconds(request, "timeout_s", 20)

        def there() -> bool:
            command = self._state.commands.get(command_id)
            return command is not None and _WAITS[wait](command)

        if wait:
            await self._state.history.until(there, timeout_s)
        command = self._state.commands.get(command_id)
        if command is None:
            raise OperatorError(404, "no command with this id")
        shown = {"success": True} | command.to_json()
        return web.json_response(shown | ({"waited_for": there()} if wait else {}))

    async def _send(self, request: web.Request) -> web.Response:
        item = self._connections.send(await _parsed(request, RawSpec))
        (event,) = await written([item])
        return web.json_response({"success": True} | _sending(event))

    async def _drop(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True, "dropped": self._connections.drop(await _parsed(request, DropSpec))})

    async def _faults(self, _request: web.Request) -> web.Response:
        return web.json_response({"success": True, "faults": [entry.to_json() for entry in self._state.faults.all()]})

    async def _set_faults(self, request: web.Request) -> web.Response:
        """Set one fault or a list of them. All are checked before the first is set."""
        body = await _body(request)
        faults = [parse_fault(value) for value in (body if isinstance(body, list) else [body])]
        ids = [self._state.faults.add(fault) for fault in faults]
        return web.json_response({"success": True, "ids": ids})

    async def _clear_faults(self, _request: web.Request) -> web.Response:
        return web.json_response({"success": True, "cleared": self._state.faults.clear_all()})

    async def _clear_fault(self, request: web.Request) -> web.Response:
        ident = request.match_info["id"]
        if not ident.isdecimal() or not self._state.faults.clear(int(ident)):
            raise OperatorError(404, "no fault with this id is set")
        return web.json_response({"success": True, "cleared": 1})


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"success": False, "error": text}, status=status)


def _sending(event: Event | None) -> dict[str, Any]:
    """Return the times of sending, with nulls if nothing has been sent yet."""
    if event is None:
        return {"sent": False, "connection": None, "sent_at": None, "sent_wall_s": None, "sent_monotonic_s": None}
    return {
        "sent": True,
        "connection": event.connection,
        "sent_at": rfc3339(event.wall_s),
        "sent_wall_s": event.wall_s,
        "sent_monotonic_s": event.monotonic_s,
        "n": event.n,
    }


async def _body(request: web.Request) -> Any:
    try:
        return json.loads(await request.read() or b"{}")
    except (ValueError, RecursionError):
        raise OperatorError(400, "the body must be JSON") from None


async def _parsed(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.convert(await _body(request), kind, strict=True)
    except msgspec.ValidationError as error:
        raise OperatorError(400, f"bad request: {error}") from None


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isdecimal() or len(text) > 18:
        raise OperatorError(400, f"{name} must be a number")
    return int(text)


def _seconds(request: web.Request, name: str, default: float = 0) -> float:
    try:
        value = float(request.query.get(name, default))
    except ValueError:
        value = -1
    if not 0 <= value <= _MAX_WAIT_S:
        raise OperatorError(400, f"{name} must be between 0 and {_MAX_WAIT_S:.0f} seconds")
    return value
