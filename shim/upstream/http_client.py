"""Adaptations of aiohttp's client where it deviates from HTTP.

All uses of aiohttp's private attributes by the dialler are in this module: aiohttp offers no public hook for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from multidict import CIMultiDict, CIMultiDictProxy

from shim.ports import DialFailure
from shim.upstream.dial_errors import DialError

MAX_INTERIM_RESPONSES = 8
_SWITCHING_PROTOCOLS = 101
_INTERIM_FLOOD = DialFailure("handshake", detail="too many interim responses (HTTP 1xx)")


class BoundedResponseHandler(ResponseHandler):
    """aiohttp's `ResponseHandler` for one response to each request, with a limit on interim responses.

    aiohttp reads interim responses without end, and never yields to other tasks meanwhile. It would take a response
    behind the response to a request for that to the next request on the connection, which may be another agent's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._interim = 0
        self._answered = False

    def set_response_params(self, **options: Any) -> None:
        """Prepare for the response to the next request."""
        self._interim, self._answered = 0, False
        super().set_response_params(**options)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Handle the head of a parsed response.

        Responses behind the response to the request are dropped and end the connection, and so do interim responses
        beyond the limit.
        """
        if self._answered:
            if self.transport is not None:
                self.transport.close()
            return
        code = data[0].code
        if 100 <= code < 200 and code != _SWITCHING_PROTOCOLS:
            self._interim += 1
            if self._interim > MAX_INTERIM_RESPONSES:
                if self._interim == MAX_INTERIM_RESPONSES + 1:
                    self.set_exception(DialError(_INTERIM_FLOOD))
                    if self.transport is not None:
                        # The transport is paused, not this protocol: `self.pause_reading()` would stop the parser in
                        # the middle of its call of this method.
                        self.transport.pause_reading()
                return
        else:
            self._answered = True
        super().feed_data(data, size)


class LenientResponse(aiohttp.ClientResponse):
    """aiohttp's `ClientResponse` that reads `Connection` by RFC 9110: a list of tokens in one or several lines."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Read the head, and rewrite `Connection`: aiohttp accepts a 101 only if it is exactly `upgrade`."""
        await super().start(connection)
        lines = self._headers.getall(hdrs.CONNECTION, ())
        tokens = {token.strip().lower() for line in lines for token in line.split(",")}
        if self.status == _SWITCHING_PROTOCOLS and "upgrade" in tokens:
            headers = CIMultiDict(self._headers)
            headers[hdrs.CONNECTION] = "upgrade"
            self._headers = CIMultiDictProxy(headers)
            self._cache.pop("headers", None)  # aiohttp caches the value of `headers` here
        return self


class Connector(aiohttp.TCPConnector):
    """aiohttp's connector with a complete `Host` in CONNECT requests and a limit on interim responses.

    `reached` is called when the first peer is connected, a proxy or the server; `connected` with the transport of each
    connection that a request gets.
    """

    def __init__(
        self, reached: Callable[[], None], connected: Callable[[asyncio.BaseTransport | None], None], **options: Any
    ) -> None:
        super().__init__(**options)
        self._reached = reached
        self._connected = connected
        self._factory = cast("partial[ResponseHandler]", partial(BoundedResponseHandler, loop=self._loop))

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the library's signature
    ) -> Connection:
        """Return a connection for a request."""
        connection = await super().connect(req, traces, timeout)
        self._connected(connection.transport)
        return connection

    async def _create_direct_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the library's signature
        **options: Any,
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        """Connect to the server or to the proxy, and call `reached`."""
        connection = await super()._create_direct_connection(req, traces, timeout, **options)
        self._reached()
        return connection

    def _update_proxy_auth_header_and_build_proxy_req(self, req: aiohttp.ClientRequest) -> aiohttp.ClientRequest:
        """Build the request to the proxy. By RFC 9110 §7.2 `Host` of a CONNECT is its target with the port."""
        request = super()._update_proxy_auth_header_and_build_proxy_req(req)
        if req.is_ssl():
            request.headers[hdrs.HOST] = f"{req.url.host_subcomponent}:{req.url.port}"
        return request
