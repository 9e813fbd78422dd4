"""Admin HTTP server: health, metrics, the status page with its JSON and files, and the operator's actions."""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import hdrs
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_exceptions import HTTPException
from aiohttp.web_protocol import RequestPayloadError
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse, json_response
from aiohttp.web_server import Server
from multidict import istr
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from shim.admin.connection_limit import IDLE_S, MAX_BUSY, PROBES, SEND_BYTES, Connections
from shim.admin.event_stream import EventStream
from shim.admin.gauges import StatusCollector
from shim.config import loader
from shim.config.settings import Admin
from shim.errors import ConfigError, NoRoom, OperatorError
from shim.hosts import is_loopback
from shim.http_connection import LINGER_S
from shim.listening import bind
from shim.management.command_api import CommandApi
from shim.management.status import Status
from shim.management.status_builder import Health, StatusBuilder
from shim.protocol.http import bearer, host_name
from shim.redaction import Redaction

_SEC_FETCH_SITE = "Sec-Fetch-Site"
_OWN_SITE = frozenset({"same-origin", "none"})


class Access(Enum):
    """Levels of protection of a route."""

    OPEN = "open"  # health and metrics: for probes and Prometheus
    SHELL = "shell"  # the page's files, without any data
    DATA = "data"
    CHANGE = "change"


class Guard:
    """Access check for requests. `token` reads the admin token; it is called only if `admin.token_file` is set.

    The token is accepted in the Authorization header only, never in a cookie: browsers send a cookie of 127.0.0.1 to
    every port of it.
    """

    def __init__(self, admin: Admin, token: Callable[[], str]) -> None:
        self._token = token
        self._hosts = {host.lower() for host in (*admin.allowed_hosts, *admin.hosts)}
        self.required = bool(admin.token_file)

    def check(self, request: BaseRequest, access: Access) -> None:
        """Return if the request is allowed. Raises `OperatorError` with 401, 403 or 503."""
        if access is Access.OPEN:
            return
        host = request.headers.get(hdrs.HOST, "")
        # With DNS rebinding a foreign name resolves to our address, and the browser takes its page as our origin. So
        # the Host header must be one of our own names.
        if not self._is_ours(host_name(host)):
            raise OperatorError(403, "the Host header names another host: see admin.allowed_hosts")
        if access is Access.SHELL:
            return
        if not _same_origin(request, host):
            raise OperatorError(403, "requests of other sites' pages are refused")
        if access is Access.CHANGE and not self.required:
            raise OperatorError(403, "nothing may be changed here: that needs admin.token_file in the configuration")
        if self.required:
            self._authorize(request)

    def _authorize(self, request: BaseRequest) -> None:
        given = bearer(request.headers.get(hdrs.AUTHORIZATION))
        if not given:
            raise OperatorError(401, "the admin token is required: Authorization: Bearer …")
        if not hmac.compare_digest(given.encode(), self._token().encode()):
            raise OperatorError(401, "the admin token is not accepted")

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name in self._hosts:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True  # an address is not resolved by DNS, so it cannot be rebound


def _same_origin(request: BaseRequest, host: str) -> bool:
    """Return True unless the request comes from another site's page. Only browsers send the headers that show it."""
    if request.headers.get(_SEC_FETCH_SITE, "none") not in _OWN_SITE:
        return False
    origin = request.headers.get(hdrs.ORIGIN)
    return origin is None or origin.lower().partition("://")[2] == host.lower()


FILES = {
    "/": ("index.html", "text/html"),
    "/status.js": ("status.js", "text/javascript"),
    "/status.css": ("status.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/uplot.js": ("uPlot.iife.min.js", "text/javascript"),
    "/uplot.css": ("uPlot.min.css", "text/css"),
    "/uplot.LICENSE": ("uPlot.LICENSE", "text/plain"),
}

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STOP_S = 1.0
BODY_S = 10.0
MAX_BODY_BYTES = 65_536
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "agent-shim",
    "X-Content-Type-Options": "nosniff",
}
Handler = Callable[[BaseRequest], Awaitable[StreamResponse]]
Route = tuple[Handler, Access]


@cache
def read_file(path: str) -> bytes:
    """Return the content of one of `FILES`."""
    return (Path(__file__).parent / "static" / FILES[path][0]).read_bytes()


class AdminServer:
    """Server of the admin port. `redaction` masks secrets in texts of the controller, and learns the admin token.

    `agents_served` is set once the legacy API listens: a sidecar must not be ready before, because the agent starts
    then.
    """

    def __init__(
        self,
        settings: Admin,
        status: StatusBuilder,
        health: Health,
        commands: CommandApi,
        registry: CollectorRegistry,
        redaction: Redaction,
    ) -> None:
        self.agents_served = False
        self._settings = settings
        self._registry = registry
        self._redaction = redaction
        self._builder = status
        self._health = health
        self._guard = Guard(settings, self._token)
        self._live = EventStream(status.clock, status.sampler, self._not_ready, status.take)
        self._reasons: list[str] = []
        registry.register(StatusCollector(lambda: status.take(self._reasons)))
        self._routes = self._make_routes(commands)
        self._server: Server | None = None
        self._connections: Connections | None = None
        self._sockets: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []

    def _make_routes(self, commands: CommandApi) -> dict[str, dict[str, Route]]:
        """Return the routes by path and method. `{id}` stands for one segment of a path, or its beginning."""
        get, post = hdrs.METH_GET, hdrs.METH_POST
        routes: list[tuple[str, str, Handler, Access]] = [
            (get, "/healthz", self._healthz, Access.OPEN),
            (get, "/readyz", self._readyz, Access.OPEN),
            (get, "/metrics", self._metrics, Access.OPEN),
            *((get, path, self._file, Access.SHELL) for path in FILES),
            (get, "/status.json", self._status, Access.DATA),
            (get, "/config.json", self._config, Access.DATA),
            (get, "/events", self._live.serve, Access.DATA),
            (get, "/commands/{id}.json", _handler(commands, "trace"), Access.DATA),
            (post, "/commands/{id}/purge", _handler(commands, "purge"), Access.CHANGE),
            (post, "/commands/{id}/redeliver", _handler(commands, "redeliver"), Access.CHANGE),
            (post, "/agents/{id}/forget", _handler(commands, "forget"), Access.CHANGE),
            (post, "/drain", _handler(commands, "drain"), Access.CHANGE),
            (hdrs.METH_DELETE, "/drain", _handler(commands, "resume"), Access.CHANGE),
        ]
        table: dict[str, dict[str, Route]] = {}
        for method, path, handler, access in routes:
            methods = table.setdefault(path, {})
            methods[method] = (handler, access)
            if method == get:
                methods[hdrs.METH_HEAD] = (handler, access)
        return table

    async def _dispatch(self, request: BaseRequest) -> StreamResponse:
        """Call the handler of a request's route. Raises `OperatorError`.

        aiohttp's own router would bring its web framework with it, 1 MB of memory for a dozen routes.
        """
        methods = self._routes.get(_split_path(request)[0])
        if methods is None:
            raise OperatorError(404, "not found")
        if request.method not in methods:
            raise OperatorError(405, "method not allowed", allow=tuple(sorted(methods)))
        handler, access = methods[request.method]
        self._guard.check(request, access)
        busy = 0 if self._connections is None else self._connections.busy
        if busy > MAX_BUSY and request.path not in PROBES:
            raise OperatorError(503, "too many requests at a time")
        return await handler(request)

    async def bind(self) -> None:
        """Bind the port without listening yet. Raises `StartError`."""
        self._sockets = await bind("admin", self._settings.hosts, self._settings.port)

    async def start(self) -> tuple[str, int]:
        """Listen on the bound sockets and return the first address. Raises `StartError`, `OSError`."""
        if not self._sockets:
            await self.bind()
        self._server = make_server(self._dispatch)
        options = {
            "access_log": None,
            "keepalive_timeout": IDLE_S,
            "lingering_time": LINGER_S,
            "read_bufsize": MAX_BODY_BYTES,
        }
        self._connections = Connections(self._server, options, HEADERS)
        loop = asyncio.get_running_loop()
        host, port, *_ = self._sockets[0].getsockname()
        for bound in self._sockets:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            self._listeners.append(await loop.create_server(self._connections, sock=bound))
        self._builder.start()
        return str(host), int(port)

    async def status(self) -> dict[str, Any]:
        """Return the content of `/status.json` without the plots."""
        status: dict[str, Any] = msgspec.to_builtins(await self._take())
        return status

    async def _take(self) -> Status:
        return self._builder.take(await self._not_ready())

    async def stop(self) -> None:
        """Stop listening and close all connections."""
        self._builder.stop()
        self._live.stop()
        for listener in self._listeners:
            listener.close()
        for bound in self._sockets:
            bound.close()
        if self._server is not None:
            await asyncio.sleep(0)  # requests that have arrived are begun, so that their connections are not idle
            self._server.pre_shutdown()
            await self._server.shutdown(STOP_S)

    def _token(self) -> str:
        """Return the present admin token, read from its file."""
        try:
            token = loader.read_secret(self._settings.token_file, "admin.token_file")
        except ConfigError as error:
            raise OperatorError(503, str(error)) from None
        self._redaction.add(token)
        return token

    async def _not_ready(self) -> list[str]:
        reasons = await self._health.reasons_not_ready()
        if not self.agents_served:
            reasons.append("agents are not served yet")
        self._reasons = reasons
        return reasons

    async def _healthz(self, request: BaseRequest) -> Response:
        return json_response({"status": "ok"})

    async def _readyz(self, request: BaseRequest) -> Response:
        reasons = await self._not_ready()
        if reasons:
            return json_response({"status": "not ready", "reasons": reasons}, status=503)
        return json_response({"status": "ready"})

    async def _metrics(self, request: BaseRequest) -> Response:
        await self._not_ready()
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _file(self, request: BaseRequest) -> Response:
        """Return one of `FILES`. The page has a mark that shows if it must ask for a token before it requests data."""
        body = read_file(request.path)
        if request.path == "/" and self._guard.required:
            body = body.replace(b'data-token="none"', b'data-token="required"', 1)
        return Response(body=body, content_type=FILES[request.path][1], charset="utf-8")

    async def _config(self, request: BaseRequest) -> Response:
        """Return the effective configuration with secrets masked, for `agent-shim doctor --url`."""
        masked = loader.redacted(self._builder.settings)
        return Response(body=msgspec.json.encode(masked), content_type="application/json")

    async def _status(self, request: BaseRequest) -> Response:
        status = await self._take()
        status.series = self._builder.sampler.last()
        return Response(body=msgspec.json.encode(status), content_type="application/json")


def _handler(commands: CommandApi, action: str) -> Handler:
    async def handle(request: BaseRequest) -> Response:
        """Pass the action to the command API and return its answer as JSON. Raises `OperatorError`."""
        try:
            async with asyncio.timeout(BODY_S):
                body = await request.read()
        except TimeoutError:
            raise OperatorError(408, "the body did not arrive in time") from None
        answer = await commands.everywhere(action, _split_path(request)[1], body)
        return Response(body=msgspec.json.encode(answer), content_type="application/json")

    return handle


def make_server(handle: Handler, max_body_bytes: int = MAX_BODY_BYTES) -> Server:
    """Return aiohttp's low-level server for a handler of all requests, whose errors become JSON with one sentence."""

    def make_request(*args: Any) -> BaseRequest:
        """Return aiohttp's request for what a connection has read."""
        make: Callable[..., BaseRequest] = BaseRequest
        return make(*args, asyncio.get_running_loop(), client_max_size=max_body_bytes)

    async def answer(request: BaseRequest) -> StreamResponse:
        """Ask for the body if the client waits for that, and return the response."""
        if request.version == HttpVersion11 and hdrs.EXPECT in request.headers:  # checked by `AdminConnection`
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the interim response is no part of the response
        response = await _errors_as_json(request, handle)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    return Server(answer, request_factory=make_request, handler_cancellation=True)


async def _errors_as_json(request: BaseRequest, handle: Handler) -> StreamResponse:
    """Return every error as JSON with one sentence, whether the shim or aiohttp raised it."""
    try:
        return await handle(request)
    except OperatorError as error:
        headers = {hdrs.WWW_AUTHENTICATE: "Bearer"} if error.status == 401 else None
        if error.allow:
            headers = {hdrs.ALLOW: ",".join(error.allow)}
        return _error(error.status, str(error), headers)
    except NoRoom:
        return _error(503, "too many large requests at a time")
    except (RequestPayloadError, HttpProcessingError):
        # A fault hides the bytes before it, which would have been rejected if they had come alone.
        if request.content.total_bytes > request.client_max_size:
            return _error(413, "request entity too large")
        return _error(400, "the body cannot be read")
    except HTTPException as error:
        return _error(error.status, error.reason.lower())


def _split_path(request: BaseRequest) -> tuple[str, str]:
    """Return the path of a request as the routes name it, and the id in it, decoded."""
    match request.rel_url.parts:
        case (_, folder, name) if len(name) > len(".json") and name.endswith(".json"):
            return f"/{folder}/{{id}}.json", name.removesuffix(".json")
        case (_, folder, name, action) if name:
            return f"/{folder}/{{id}}/{action}", name
    return ("" if "{" in request.path else request.path), ""  # an encoded brace must not name a route's `{id}`


def _error(status: int, text: str, headers: dict[istr, str] | None = None) -> Response:
    return json_response({"error": text}, status=status, headers=headers)
