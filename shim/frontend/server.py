"""Requests to calls, outcomes to replies (protocol.md §1)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from typing import cast

import aiohttp
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11
from multidict import istr
from prometheus_client import Counter, Histogram

from shim.core.calls import Failed
from shim.dialects import Call, Dialect, Match, Reply, Router, error_reply
from shim.errors import AgentError
from shim.frontend.body import BodyRefused, decode_body, read_body
from shim.frontend.connection import Connection, ConnectionServer, House
from shim.frontend.forwarding import chunk, forwarded, head, is_large
from shim.frontend.guard import Guard, bearer
from shim.frontend.replies import SENT_CLOSE, SENT_KEEP, Replies, StaticHeaders, encode_body, no_static_headers
from shim.metrics import Metrics
from shim.ports import Answer, Client, Fallback, Lease, Proxied, Switchboard
from shim.settings import Listen

MAX_LINE_BYTES = 16_384
LINGER_S = 2.0
BACKLOG = 1024
_REMEMBERED_PATHS = 4096
_REQUEST_ID = istr("X-Request-Id")

logger = logging.getLogger(__name__)


class _Visit:
    """One request on its way through; `step` is where it is, in words of the metric `bad_requests`."""

    __slots__ = ("connection", "lease", "match", "more", "must_close", "request", "started_s", "step")

    def __init__(self, request: web.BaseRequest) -> None:
        self.request = request
        self.connection = cast("Connection", request.protocol)
        self.started_s = self.connection.begin_request()
        self.match: Match | None = None
        self.lease: Lease | None = None
        self.step = "guard"
        self.more = ""
        self.must_close = False

    @property
    def place(self) -> tuple[str, str]:
        """Dialect and operation, empty where no route matched."""
        match = self.match
        return ("", "") if match is None else (match.dialect.NAME, match.route.operation)


class Frontend:
    """The legacy server. `start()` and `stop()` are called once each."""

    def __init__(
        self,
        listen: Listen,
        switchboard: Switchboard,
        dialects: Iterable[Dialect],
        metrics: Metrics,
        *,
        token: Callable[[], str] | None = None,
        static_headers: StaticHeaders = no_static_headers,
        fallback: Fallback | None = None,
    ) -> None:
        """`token` gives the upstream token of the moment, or is `None` when agents bring tokens of their own.

        `static_headers` are added to every reply; it returns the same mapping object until its content changes.
        `fallback` serves calls that go by the vendor's HTTP API.
        """
        self._listen = listen
        self._switchboard = switchboard
        self._fallback = fallback
        self._metrics = metrics
        self._guard = Guard(listen, token)
        self._router = Router(dialects, listen.base_path)
        self._replies = Replies(static_headers)
        self._house = House(listen, switchboard, metrics, self._replies)
        self._matches: dict[tuple[str, str], Match] = {}
        self._counted: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._web: ConnectionServer | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> tuple[str, int]:
        """Listen; returns the host and port in use. Raises `OSError` (`ssl.SSLError` included)."""
        listen = self._listen
        self._web = ConnectionServer(
            self._serve,
            self._house,
            keepalive_timeout=listen.keepalive_s,
            tcp_keepalive=True,
            access_log=None,  # it shows request targets
            logger=logger,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            lingering_time=LINGER_S,
        )
        tls = None
        if listen.tls.cert_file:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2
            tls.load_cert_chain(listen.tls.cert_file, listen.tls.key_file or None, password="")
        self._server = await asyncio.get_running_loop().create_server(
            self._web,
            listen.host,
            listen.port,
            backlog=BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=listen.header_timeout_s if tls else None,
        )
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def stop(self, grace_s: float = 2.0) -> None:
        """Accept no more, let requests under way finish for at most `grace_s`, close all connections. Idempotent."""
        if self._server is not None:
            self._server.close()
        if self._web is not None:
            self._web.pre_shutdown()
            await self._web.shutdown(grace_s / 2)  # aiohttp waits twice: for handlers to finish, then to be cancelled

    # --- one request ---

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        visit = _Visit(request)
        try:
            reply = await self._answer(visit)
            if isinstance(reply, Proxied):
                return await self._hand_down(visit, reply)
            body = None if reply.body is None else encode_body(reply.body)
        except AgentError as error:
            reply = self._refuse(visit, error)
            body = encode_body(reply.body)
        except Exception:
            logger.exception("a defect while serving %s", visit.place)
            self._metrics.internal_errors.labels("frontend").inc()
            reply = error_reply(Failed(500, "internal error"))
            body = encode_body(reply.body)
            if visit.lease is not None:
                self._switchboard.unwritten(visit.lease)
                visit.lease = None
        return await self._reply(visit, reply, body)

    async def _answer(self, visit: _Visit) -> Reply | Proxied:
        """Everything from the headers to the reply. Raises `AgentError`."""
        request, listen = visit.request, self._listen
        headers = request.headers
        _enforce(self._guard.check(headers))
        if self._fallback is not None and self._fallback.takes_all():
            return await self._pass_on(visit, self._fallback)
        visit.step = "route"
        match = visit.match = self._route(request)
        route = match.route
        visit.step = "auth"
        client = _identify(visit.connection, headers.get(hdrs.AUTHORIZATION))
        if not route.open:
            _enforce(self._guard.authorize(client.token))
        visit.step = "body"
        limit_bytes = listen.max_status_body_bytes if route.large else listen.max_body_bytes
        data = await read_body(request, limit_bytes, listen.body_timeout_s)
        body = decode_body(data) if route.method == hdrs.METH_POST else None
        visit.step = "call"
        call = Call(match.params, body, headers.get(hdrs.USER_AGENT, ""))
        agent_call = match.dialect.parse(route.operation, call)
        visit.step = "answer"
        answer: Answer | None = None
        if self._fallback is not None and self._fallback.takes_some() and self._fallback.takes(client, agent_call):
            served = await self._fallback.serve(forwarded(request, listen.base_path, client, data, agent_call))
            if isinstance(served, Proxied):
                visit.lease = served.lease
                return served
            answer = served
        if answer is None:
            answer = await self._switchboard.call(client, agent_call, visit.started_s)
        visit.lease = answer.lease
        return match.dialect.render(route.operation, answer.outcome, call)

    async def _pass_on(self, visit: _Visit, fallback: Fallback) -> Reply | Proxied:
        """Every call goes by the vendor's HTTP API, also what no route of ours or no dialect understands."""
        request, listen = visit.request, self._listen
        with contextlib.suppress(AgentError):
            visit.match = self._route(request)
        match = visit.match
        client = _identify(visit.connection, request.headers.get(hdrs.AUTHORIZATION))
        if match is None or not match.route.open:
            _enforce(self._guard.authorize(client.token))
        data = None
        if not is_large(request, listen.max_body_bytes):
            data = await read_body(request, listen.max_body_bytes, listen.body_timeout_s)
        call, agent_call = Call({}), None
        if match is not None and data is not None:
            with contextlib.suppress(AgentError):
                body = decode_body(data) if match.route.method == hdrs.METH_POST else None
                call = Call(match.params, body, request.headers.get(hdrs.USER_AGENT, ""))
                agent_call = match.dialect.parse(match.route.operation, call)
        answer = await fallback.serve(forwarded(request, listen.base_path, client, data, agent_call))
        if isinstance(answer, Proxied):
            visit.lease = answer.lease
            return answer
        if match is None or agent_call is None:
            raise AgentError(502, "the vendor's HTTP API cannot be reached")
        if answer is None:
            answer = await self._switchboard.call(client, agent_call, visit.started_s)
        visit.lease = answer.lease
        return match.dialect.render(match.route.operation, answer.outcome, call)

    def _route(self, request: web.BaseRequest) -> Match:
        key = (request.method, request.raw_path)
        match = self._matches.get(key)
        if match is None:
            match = self._find(request)
            if len(self._matches) >= _REMEMBERED_PATHS:
                self._matches.clear()
            self._matches[key] = match
        return match

    def _find(self, request: web.BaseRequest) -> Match:
        if request.method == hdrs.METH_CONNECT:
            raise BodyRefused(405, "method not allowed", linger=False)  # everything after it would count as its body
        path = _path_of(request)
        if request.method == hdrs.METH_HEAD:
            match = self._router.match(hdrs.METH_GET, path)
            if not match.route.open:
                raise AgentError(405, "method not allowed")  # it must not drain what it does not show
            return match
        return self._router.match(request.method, path)

    def _refuse(self, visit: _Visit, error: AgentError) -> Reply:
        """The reply to what never became a call."""
        self._metrics.bad_requests.labels(visit.step).inc()
        if isinstance(error, BodyRefused):
            visit.must_close = True
            visit.connection.dismiss(linger=error.linger)
        if error.status == 401:
            visit.more = "WWW-Authenticate: Bearer\r\n"
        elif error.status == 405:
            visit.more = f"Allow: {', '.join(self._allowed(visit.request))}\r\n"
        failed = Failed(error.status, str(error), error.retry_after_s)
        match = visit.match
        if match is None:
            return error_reply(failed)
        return match.dialect.render(match.route.operation, failed, Call(match.params))

    def _allowed(self, request: web.BaseRequest) -> list[str]:
        allowed = []
        for method in (hdrs.METH_GET, hdrs.METH_POST):
            try:
                match = self._router.match(method, _path_of(request))
            except AgentError:
                continue
            allowed += [method, hdrs.METH_HEAD] if match.route.open else [method]
        return allowed

    async def _reply(self, visit: _Visit, reply: Reply, body: bytes | None) -> web.StreamResponse:
        request, connection = visit.request, visit.connection
        keep = request.keep_alive and not visit.must_close and not connection.closing
        more = visit.more
        if not keep:
            more += "Connection: close\r\n"
        elif request.version != HttpVersion11:
            more += "Connection: keep-alive\r\n"
        if reply.retry_after_s is not None:
            more += f"Retry-After: {reply.retry_after_s}\r\n"
        request_id = self._replies.request_id(request.headers.get(_REQUEST_ID))
        head_only = request.method == hdrs.METH_HEAD
        response = self._replies.response(reply.status, body, request_id, more, head_only=head_only)
        written = await self._hand_over(visit, response)
        self._count(visit, reply.status)
        if not written:
            self._metrics.replies_lost.inc()
            connection.force_close()
            return SENT_CLOSE
        if not keep and visit.lease is not None:
            await connection.part()
        return SENT_KEEP if keep else SENT_CLOSE

    async def _hand_down(self, visit: _Visit, proxied: Proxied) -> web.StreamResponse:
        """Write the API's reply: at once where it is whole, else piece by piece."""
        request, connection = visit.request, visit.connection
        keep = request.keep_alive and not connection.closing and request.content.is_eof()
        more = dict(self._replies.static_headers())
        more[_REQUEST_ID] = self._replies.request_id(request.headers.get(_REQUEST_ID))
        start, chunked = head(proxied, more, keep, request.version == HttpVersion11)
        if isinstance(proxied.body, bytes):
            written = await self._hand_over(visit, start if request.method == hdrs.METH_HEAD else start + proxied.body)
        else:
            written = await self._stream(connection, start, proxied.body, chunked=chunked)
            keep = keep and (chunked or b"\r\nConnection: close" not in start)
        self._count(visit, proxied.status)
        if not written:
            self._metrics.replies_lost.inc()
            connection.force_close()
            return SENT_CLOSE
        return SENT_KEEP if keep else SENT_CLOSE

    async def _stream(
        self, connection: Connection, start: bytes, pieces: AsyncIterator[bytes], *, chunked: bool
    ) -> bool:
        timeout_s = self._listen.body_timeout_s
        written = await connection.write(start, timeout_s)
        try:
            async for piece in pieces:
                if not written:
                    break
                written = await connection.write(chunk(piece) if chunked else piece, timeout_s, answered=False)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False  # the reply broke off: only the end of the connection can say so
        if chunked and written:
            written = await connection.write(chunk(b""), timeout_s, answered=False)
        return written

    async def _hand_over(self, visit: _Visit, response: bytes) -> bool:
        """Write the response and settle the lease, whatever happens meanwhile (protocol.md §3, OFFERED)."""
        connection, lease = visit.connection, visit.lease
        written = False
        try:
            if connection.can_write(for_commands=lease is not None):
                written = await connection.write(response, self._listen.body_timeout_s)
        finally:
            if lease is not None and written:
                connection.lease_written()
                self._switchboard.written(lease)
            elif lease is not None:
                self._switchboard.unwritten(lease)
        return written

    def _count(self, visit: _Visit, status: int) -> None:
        dialect, operation = visit.place
        children = self._counted.get((dialect, operation, status))
        if children is None:
            children = self._counted[dialect, operation, status] = (
                self._metrics.requests.labels(dialect, operation, str(status)),
                self._metrics.request_seconds.labels(dialect, operation),
            )
        children[0].inc()
        children[1].observe(visit.connection.now_s() - visit.started_s)


def _enforce(failed: Failed | None) -> None:
    if failed is not None:
        raise AgentError(failed.status, failed.error, retry_after_s=failed.retry_after_s)


def _identify(connection: Connection, authorization: str | None) -> Client:
    """The caller, remembered from the connection's last request where the header is the same."""
    client = connection.client
    if client is None or authorization != connection.authorization:
        token = bearer(authorization)
        if token is None:
            raise AgentError(401, "the Authorization header is malformed")
        client = connection.client = Client(token, connection.number)
        connection.authorization = authorization
    return client


def _path_of(request: web.BaseRequest) -> str:
    """The raw path without the query. Raises `AgentError` 400 if it is not UTF-8."""
    target = request.raw_path
    path = target.partition("?")[0].partition("#")[0] if target.startswith("/") else request.rel_url.raw_path
    try:
        path.encode()
    except UnicodeEncodeError:
        raise AgentError(400, "the path is not valid UTF-8") from None
    return path
