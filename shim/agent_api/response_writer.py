"""Writing of replies to requests that had to wait, and the report to the bridge if their commands were written.

See OFFERED in docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import aiohttp
from aiohttp import hdrs
from aiohttp.http import HttpVersion11
from aiohttp.web_response import StreamResponse
from multidict import istr

from shim.agent_api.connection import AgentConnection, RequestContext
from shim.agent_api.forwarding import chunk, head
from shim.agent_api.responses import SENT_CLOSE, SENT_KEEP, route_of, well_formed_id
from shim.agent_api.server_context import ServerContext
from shim.ports import ProxyResponse
from shim.protocol.dialects import Reply

REQUEST_ID = istr("X-Request-Id")
MISDIRECTED = 421


class ResponseWriter:
    """Writer of the replies that a handler task makes; settles their delivery receipts and counts them."""

    def __init__(self, server_context: ServerContext) -> None:
        self._server_context = server_context
        self._responses = server_context.responses
        self._requests = server_context.metrics.requests

    async def reply(self, request: RequestContext, reply: Reply) -> StreamResponse:
        """Write a reply of the shim's own and end the request."""
        connection, message = request.connection, request.message
        keep = not message.should_close and not request.must_close and not connection.closing
        more = "".join(f"{name}: {value}\r\n" for name, value in connection.more_headers(request.receipt).items())
        if not keep:
            more += "Connection: close\r\n"
        elif message.version != HttpVersion11:
            more += "Connection: keep-alive\r\n"
        head_only = message.method == hdrs.METH_HEAD
        more += request.more
        response = self._responses.response(reply, request.encoded, request.request_id, more, head_only=head_only)
        if reply.status >= 400:
            self.record_refusal(request, reply)
        written = await self._write(request, response)
        return await self._end(request, reply.status, written=written, keep=keep)

    def record_refusal(self, request: RequestContext, reply: Reply) -> None:
        """Record a reply of 4xx or 5xx for the status and the log."""
        if reply.status == MISDIRECTED:  # the other replica tries again: no agent sees this reply
            return
        route = route_of(request.message.method, request.message.path, request.match)
        self._server_context.refused.note(request.connection.now_s(), reply.status, route, reply.body)

    async def write_proxied(self, request: RequestContext, proxied: ProxyResponse) -> StreamResponse:
        """Write a reply of the vendor's API or of another replica, in pieces if it came in pieces."""
        connection, message = request.connection, request.message
        request.must_close = proxied.closes
        keep = not (message.should_close or connection.closing or proxied.closes) and request.payload.is_eof()
        more: dict[str, str] = {}
        if not proxied.complete:
            more = {**self._responses.static_headers(), **connection.more_headers(request.receipt)}
            more[REQUEST_ID] = well_formed_id(request.headers.get(REQUEST_ID)) or self._responses.new_request_id()
        http11, head_only = message.version == HttpVersion11, message.method == hdrs.METH_HEAD
        start, chunked = head(proxied, more, keep=keep, http11=http11, head_only=head_only)
        if isinstance(proxied.body, bytes):
            written = await self._write(request, start if head_only else start + proxied.body)
        else:
            written = await self._stream(connection, start, proxied.body, chunked=chunked)
            keep = keep and (chunked or b"\r\nConnection: close" not in start)
        return await self._end(request, proxied.status, written=written, keep=keep, counts=not proxied.complete)

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

    async def _write(self, request: RequestContext, response: bytes) -> bool:
        """Write a response and settle its delivery receipt, even if the write fails or is cancelled."""
        connection, receipt = request.connection, request.receipt
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
        self, request: RequestContext, status: int, *, written: bool, keep: bool, counts: bool = True
    ) -> StreamResponse:
        if counts:  # otherwise the replica that made the reply has counted it
            self._requests.count(request.match, status, request.connection.now_s() - request.started_s)
        if not written:
            self._server_context.metrics.replies_lost.inc()
            request.connection.force_close()
            return SENT_CLOSE
        if not keep and request.receipt is not None:
            await request.connection.await_peer_close()
        elif request.must_close:
            request.connection.end_after_reply()
            return SENT_KEEP  # `end_after_reply` closes the connection
        return SENT_KEEP if keep else SENT_CLOSE
