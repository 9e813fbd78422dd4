"""The WebSocket handshakes of the controller's endpoint and of the gateway's."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from devtools.controller import faults as fault
from devtools.controller.active_faults import Scope
from devtools.controller.connection import AcceptedHandshake, Connection
from devtools.controller.connections import Connections
from devtools.controller.faults import Endpoint
from devtools.controller.history import EventKind
from devtools.controller.state import TokenPlace, Tokens, bearer

CONTROLLER_PATH = "/api/v1/clusters/agent/ws"
GATEWAY_PATH = "/gateway/ws"
DEFAULT_GATEWAY_PATH = "/ws"
"""Path of a gateway whose URL has none (docs/reference/legacy-agents.md#35-re-register-and-gateway)."""


class HandshakeRefused(Exception):
    """Refusal of a handshake, answered with this status and a JSON body."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers or {}


class Handshakes:
    """Handlers of GET requests to the WebSocket paths."""

    def __init__(self, connections: Connections, tokens: Tokens) -> None:
        self._connections = connections
        self._state = connections.state
        self._tokens = tokens

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of the API."""
        base = self._state.options.base_path.rstrip("/")
        return [
            web.get(base + CONTROLLER_PATH, self._controller),
            web.get(GATEWAY_PATH, self._gateway),
            web.get(DEFAULT_GATEWAY_PATH, self._gateway),
        ]

    async def _controller(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Endpoint.CONTROLLER)

    async def _gateway(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Endpoint.GATEWAY)

    async def _answer(self, request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
        try:
            await self._handshake_faults(Scope(endpoint, self._connections.next_number))
            owner = self._owner(request, endpoint)
            cluster = self._gateway_cluster(request, owner) if endpoint is Endpoint.GATEWAY else None
            socket, transport = await self._accept(request)
        except HandshakeRefused as refusal:
            self._state.history.record(
                EventKind.REFUSED,
                endpoint=endpoint.value,
                status=refusal.status,
                reason=refusal.reason,
                **_handshake_detail(request),
            )
            body = {"success": False, "error": refusal.reason}
            return web.json_response(body, status=refusal.status, headers=refusal.headers)
        number = self._connections.next_number
        connection = self._open(request, AcceptedHandshake(number, endpoint, owner, socket, transport))
        if cluster is not None:
            connection.clusters[cluster] = ""
            self._state.registry.presence(cluster).connection = connection.number
        if gone := self._state.faults.take(fault.AcceptThenClose, connection.scope()):
            connection.drop(gone.how, gone.code)
        await self._connections.serve(connection)
        return socket

    def _open(self, request: web.Request, accepted: AcceptedHandshake) -> Connection:
        self._connections.next_number += 1
        self._state.history.record(
            EventKind.OPENED,
            accepted.number,
            endpoint=accepted.endpoint.value,
            owner=accepted.owner,
            **_handshake_detail(request),
        )
        return Connection(accepted, self._state, self._connections.message_handler)

    async def _handshake_faults(self, scope: Scope) -> None:
        faults = self._state.faults
        if faults.take(fault.HangHandshake, scope):
            await self._connections.changed.until(lambda: faults.peek(fault.HangHandshake, scope) is None)
        refuse = faults.take(fault.Refuse, scope)
        if refuse is not None:
            headers = dict(refuse.headers)
            if refuse.retry_after_s is not None:
                headers["Retry-After"] = str(refuse.retry_after_s)
            raise HandshakeRefused(refuse.status, refuse.error or f"refused with {refuse.status}", headers)

    def _owner(self, request: web.Request, endpoint: Endpoint) -> str:
        """Return the owner of the request's token. If query and header carry one each, both must be valid and equal."""
        place = TokenPlace.HEADER if endpoint is Endpoint.GATEWAY else self._state.options.token_place
        sent = _tokens_sent(request)
        for name in ("query", "header"):
            if name in sent and place not in (TokenPlace.EITHER, TokenPlace(name)):
                del sent[name]
        owners = {self._tokens.owner_of(token) for token in sent.values()}
        owner = owners.pop() if len(owners) == 1 else None
        if owner is None:
            reason = "invalid token" if sent else "missing token"
            raise HandshakeRefused(401, f"unauthorized: {reason}", {"WWW-Authenticate": "Bearer"})
        return owner

    def _gateway_cluster(self, request: web.Request, owner: str) -> str:
        ident = request.query.get("cluster_uuid", "")
        if not ident:
            raise HandshakeRefused(400, "missing query parameter: cluster_uuid")
        known = self._state.registry.by_uuid(ident)
        if known is None or known.owner != owner:
            raise HandshakeRefused(404, "cluster not found")
        return known.cluster_id

    async def _accept(self, request: web.Request) -> tuple[web.WebSocketResponse, asyncio.Transport]:
        options, transport = self._state.options, request.transport
        socket = web.WebSocketResponse(
            timeout=options.close_timeout_s,
            autoclose=False,
            autoping=False,
            compress=False,
            max_msg_size=options.max_message_bytes,
            decode_text=False,  # as Go's servers do: text that is no UTF-8 is accepted, and the connection stays open
        )
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise HandshakeRefused(426, "this is a WebSocket endpoint", {"Upgrade": "websocket"})
        if transport is None or not socket.can_prepare(request):
            raise HandshakeRefused(400, "malformed WebSocket handshake")
        await socket.prepare(request)
        return socket, transport


def _tokens_sent(request: web.Request) -> dict[str, str]:
    sent = {"query": request.query.get("token", ""), "header": bearer(request.headers.get("Authorization", ""))}
    return {place: token for place, token in sent.items() if token}


def _handshake_detail(request: web.Request) -> dict[str, Any]:
    """Return the data of a handshake for the history, without the token."""
    return {
        "path": _printable(request.path),
        "auth": sorted(_tokens_sent(request)),
        "query": {_printable(key): _printable(value) for key, value in request.query.items() if key != "token"},
        "user_agent": _printable(request.headers.get("User-Agent", "")),
    }


def _printable(text: str) -> str:
    """Replace bytes that are no UTF-8: they arrive as lone surrogates, which JSON cannot encode."""
    return text.encode(errors="replace").decode()
