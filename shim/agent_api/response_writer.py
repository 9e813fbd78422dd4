"""Writing of replies, and the report to the bridge if the commands in a reply were written.

See OFFERED in docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import aiohttp
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11
from multidict import istr

from shim.agent_api.connection import AgentConnection, RequestContext, ServerContext
from shim.agent_api.forwarding import chunk, head
from shim.agent_api.refused_calls import route_of
from shim.agent_api.responses import SENT_CLOSE, SENT_KEEP
from shim.counting import Count, Spread
from shim.metrics import Metrics
from shim.ports import ProxyResponse
from shim.protocol.dialects import Match, Reply

REQUEST_ID = istr("X-Request-Id")
MISDIRECTED = 421


class RequestMetrics:
    """Recorder of the metrics of answered requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counted: dict[tuple[str, str, int], tuple[Count, Spread, Count | None]] = {}

    def count(self, match: Match | None, status: int, took_s: float) -> None:
        """Count one answered request; `match` is None if no route matched."""
        dialect, operation = ("", "") if match is None else (match.dialect.NAME, match.route.operation)
        children = self._counted.get((dialect, operation, status))
        if children is None:
            deprecated = None
            if match is not None and not match.route.open:  # the health check is not a deprecated call
                route = f"{match.route.method} {match.route.pattern}"
                deprecated = self._metrics.deprecated_calls.labels(dialect, route)
            children = self._counted[dialect, operation, status] = (
                self._metrics.requests.labels(dialect, operation, str(status)),
                self._metrics.request_seconds.labels(dialect, operation),
                deprecated,
            )
        answered, took, deprecated = children
        answered.value += 1
        took.observe(took_s)
        if deprecated is not None:
            deprecated.value += 1


class ResponseWriter:
    """Writer of replies; settles the delivery receipts of the replies and counts them."""

    def __init__(self, server_context: ServerContext, counts: RequestMetrics) -> None:
        self._server_context = server_context
        self._counts = counts

    async def reply(self, visit: RequestContext, reply: Reply, body: bytes | None) -> web.StreamResponse:
        """Write a reply of the shim's own; `body` is its encoded JSON."""
        request, connection = visit.request, visit.connection
        keep = request.keep_alive and not visit.must_close and not connection.closing
        more = visit.more + "".join(f"{name}: {value}\r\n" for name, value in connection.remarks(visit.receipt).items())
        if not keep:
            more += "Connection: close\r\n"
        elif request.version != HttpVersion11:
            more += "Connection: keep-alive\r\n"
        if reply.retry_after_s is not None:
            more += f"Retry-After: {reply.retry_after_s}\r\n"
        request_id = self._server_context.replies.request_id(request.headers.get(REQUEST_ID))
        head_only = request.method == hdrs.METH_HEAD
        response = self._server_context.replies.response(reply.status, body, request_id, more, head_only=head_only)
        if reply.status >= 400 and reply.status != MISDIRECTED:  # that one is for another replica, not for an agent
            route = route_of(request.method, request.raw_path, visit.match)
            self._server_context.refused.note(connection.now_s(), reply.status, route, reply.body)
        written = await self._write(visit, response)
        return await self._end(visit, reply.status, written=written, keep=keep)

    async def write_proxied(self, visit: RequestContext, proxied: ProxyResponse) -> web.StreamResponse:
        """Write a reply of the vendor's API or of another replica, in pieces if it came in pieces."""
        request, connection = visit.request, visit.connection
        keep = request.keep_alive and not connection.closing and request.content.is_eof()
        more: dict[str, str] = {}
        if not proxied.complete:
            more = {**self._server_context.replies.static_headers(), **connection.remarks(visit.receipt)}
            more[REQUEST_ID] = self._server_context.replies.request_id(request.headers.get(REQUEST_ID))
        http11, head_only = request.version == HttpVersion11, request.method == hdrs.METH_HEAD
        start, chunked = head(proxied, more, keep=keep, http11=http11, head_only=head_only)
        if isinstance(proxied.body, bytes):
            written = await self._write(visit, start if head_only else start + proxied.body)
        else:
            written = await self._stream(connection, start, proxied.body, chunked=chunked)
            keep = keep and (chunked or b"\r\nConnection: close" not in start)
        return await self._end(visit, proxied.status, written=written, keep=keep, counts=not proxied.complete)

    async def _stream(
        self, connection: AgentConnection, start: bytes, pieces: AsyncGenerator[bytes, None], *, chunked: bool
    ) -> bool:
        timeout_s = self._server_context.listen.body_timeout_s
        written = await connection.write(start, timeout_s)
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if not written:
                        break
                    written = await connection.write(chunk(piece) if chunked else piece, timeout_s)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False  # the reply is incomplete: only closing the connection can show that to the agent
        if chunked and written:
            written = await connection.write(chunk(b""), timeout_s)
        return written

    async def _write(self, visit: RequestContext, response: bytes) -> bool:
        """Write a response and settle its delivery receipt, even if the write fails or is cancelled."""
        connection, receipt = visit.connection, visit.receipt
        written = False
        if receipt is not None:
            connection.offer(receipt)
        try:
            if connection.peer_can_receive(for_commands=receipt is not None):
                written = await connection.write(response, self._server_context.listen.body_timeout_s)
        finally:
            if receipt is not None:
                connection.settle(receipt, written=written)
        return written

    async def _end(
        self, visit: RequestContext, status: int, *, written: bool, keep: bool, counts: bool = True
    ) -> web.StreamResponse:
        if counts:  # otherwise the replica that made the reply has counted it
            self._counts.count(visit.match, status, visit.connection.now_s() - visit.started_s)
        if not written:
            self._server_context.metrics.replies_lost.inc()
            visit.connection.force_close()
            return SENT_CLOSE
        if not keep and visit.receipt is not None:
            await visit.connection.await_peer_close()
        elif visit.must_close:
            visit.connection.end_after_reply()
            return SENT_KEEP  # `end_after_reply` closes the connection
        return SENT_KEEP if keep else SENT_CLOSE
