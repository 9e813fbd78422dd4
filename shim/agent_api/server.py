"""The HTTP server for agents: its ports, its certificate, and its connections."""

from __future__ import annotations

import itertools
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp.web_server import Server

from shim.agent_api.admission import Guard
from shim.agent_api.connection import AgentConnection
from shim.agent_api.request_handler import RequestHandler
from shim.agent_api.responses import RefusedCalls, ResponseBuilder, StaticHeaders, no_static_headers
from shim.agent_api.server_context import Backends, ConnectionCount, ServerContext
from shim.config.files import FileFingerprint, fingerprints, reason, require_regular
from shim.config.settings import Listen, TlsFiles
from shim.core.bounds import MAX_LINE_BYTES, Budget
from shim.core.call_records import RecentCalls
from shim.errors import StartError
from shim.http_connection import LINGER_S
from shim.listening import Listener, bind
from shim.metrics import Metrics
from shim.protocol.dialects import Dialect

logger = logging.getLogger(__name__)
RECEIVE_BYTES = 32_768
"""Size of a connection's receive buffer in the kernel, and thereby of one read of the event loop."""
MAX_HEADERS = 128
"""Header lines of one request, as aiohttp's default."""
READ_BYTES = 65_536
"""Half of the bytes that aiohttp buffers of a body before it pauses reading."""


class ServerTls:
    """The TLS context of the listener, rebuilt when the certificate files change.

    If the new files cannot be used, the previous certificate stays in use. The files are checked at each client hello,
    so neither a task nor a signal is needed. Kubernetes replaces them by changing a symlink, which is detected as well.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Load the certificate. Raises `OSError`, which includes `ssl.SSLError`, if a file cannot be used."""
        self._files = files
        self._signature = self._look()
        self._current = self._build()
        # The listener keeps this first context. Each handshake starts with it and switches to the current one in the
        # callback, which OpenSSL calls for every client hello, even if the hello names no server.
        self.context = self._current
        self.context.sni_callback = self._on_hello

    def _look(self) -> tuple[FileFingerprint, ...]:
        """Return the fingerprints of the certificate files, or an empty tuple if one is missing."""
        names = (self._files.cert_file, self._files.key_file)
        try:
            return fingerprints(name for name in names if name)
        except OSError:
            return ()

    def _build(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for name in filter(None, (self._files.cert_file, self._files.key_file)):
            require_regular(name)
        # With a password given, an encrypted key raises an error. Otherwise OpenSSL would wait at a password prompt.
        context.load_cert_chain(self._files.cert_file, self._files.key_file or None, password="")
        return context

    def _on_hello(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        signature = self._look()
        if signature != self._signature:
            self._signature = signature  # remembered before loading: a faulty pair is loaded and logged only once
            self._replace()
        if self._current is not context:
            connection.context = self._current

    def _replace(self) -> None:
        try:
            self._current = self._build()
        except OSError as error:
            logger.error("the new certificate of listen.tls cannot be used, the old one stays: %s", _reason(error))
        else:
            logger.info("the certificate of listen.tls was replaced")


def _reason(error: OSError | ValueError) -> str:
    """Return why the files cannot be used. OpenSSL's own text may be no more than a place in a source file."""
    if isinstance(error, ssl.SSLError):
        return f"no PEM certificate and key that fit each other ({error.reason or type(error).__name__})"
    return reason(error)


class ConnectionServer(Server):
    """aiohttp's `Server` with connections of type `AgentConnection`."""

    def __init__(
        self,
        server_context: ServerContext,
        handler: RequestHandler,
        make: Callable[..., AgentConnection],
        **options: Any,
    ) -> None:
        # aiohttp's default keeps a handler running after its agent has disconnected. A held poll would then take
        # commands that reach no agent.
        super().__init__(handler.finish, handler_cancellation=True, **options)
        self._handler = handler
        self._server_context = server_context
        self._make = make
        self._numbers = itertools.count(1)

    def __call__(self) -> AgentConnection:
        return self._make(self, self._server_context, self._handler, next(self._numbers), self._kwargs)


class AgentServer:
    """The HTTP server for agents. Call `start()` and `stop()` once each."""

    _section = "listen"
    _line_limit_bytes = MAX_LINE_BYTES
    _max_headers = MAX_HEADERS

    def __init__(
        self,
        listen: Listen,
        backends: Backends,
        dialects: Iterable[Dialect],
        metrics: Metrics,
        *,
        token: Callable[[], str] | None = None,
        static_headers: StaticHeaders = no_static_headers,
        refused_calls: RecentCalls | None = None,
    ) -> None:
        """Create a server that does not listen yet.

        `token()` returns the current upstream token; `token` is None if agents bring tokens of their own.
        `static_headers()` is added to every reply and must return the same mapping object until its content changes.
        `refused_calls` counts rejected calls.
        """
        self._listen = listen
        self._websockets = backends.websockets
        self._server_context = ServerContext(
            listen,
            backends,
            metrics,
            ResponseBuilder(static_headers),
            Budget(2 * max(listen.max_status_body_bytes, listen.max_body_bytes)),
            RefusedCalls(refused_calls or RecentCalls()),
            self._make_connection_count(metrics),
        )
        self._handler = self._make_handler(self._server_context, self._make_guard(), dialects, token)
        self._web: ConnectionServer | None = None
        self._sockets: list[socket.socket] = []
        self._tls: ssl.SSLContext | None = None
        self._listener: Listener | None = None

    async def bind(self) -> None:
        """Bind the port and load the certificate without serving yet. Raises `StartError`."""
        self._tls = self._make_tls()
        self._sockets = await bind(self._section, self._listen.hosts, self._listen.port)

    def _make_tls(self) -> ssl.SSLContext | None:
        tls = self._listen.tls
        try:
            return ServerTls(tls).context if tls.cert_file else None
        except (OSError, ValueError) as error:
            files = f"listen.tls.cert_file {tls.cert_file} and listen.tls.key_file {tls.key_file}"
            raise StartError(f"{files} cannot be used: {_reason(error)}") from None

    async def start(self) -> tuple[str, int]:
        """Listen and return the host and port in use. Raises `StartError`, `OSError`.

        Calls `bind` if that has not been done.
        """
        if not self._sockets:
            await self.bind()
        listen = self._listen
        self._web = ConnectionServer(
            self._server_context,
            self._handler,
            self._make_connection,
            keepalive_timeout=listen.keepalive_s,
            tcp_keepalive=True,
            access_log=None,  # an access log shows request targets, which may contain tokens
            logger=logger,
            max_line_size=self._line_limit_bytes,
            max_field_size=self._line_limit_bytes,
            max_headers=self._max_headers,
            lingering_time=LINGER_S,
            read_bufsize=READ_BYTES,
            auto_decompress=False,  # `request_body` decodes the bodies that the shim itself reads
        )
        for bound in self._sockets:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        host, port = self._sockets[0].getsockname()[:2]
        self._listener = Listener(self._web, self._tls, listen.header_timeout_s)
        self._listener.start(self._sockets)
        return host, port

    def _make_guard(self) -> Guard:
        return Guard(self._listen)

    def _make_handler(self, *args: Any) -> RequestHandler:
        return RequestHandler(*args)

    def _make_connection_count(self, metrics: Metrics) -> ConnectionCount:
        return ConnectionCount(metrics.connections)

    def _make_connection(self, *args: Any) -> AgentConnection:
        return AgentConnection(*args)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Stop accepting, wait at most `grace_s` for requests in progress, and close all connections. Idempotent."""
        if self._listener is not None:
            self._listener.stop()
        for bound in self._sockets:
            bound.close()
        if self._websockets is not None:
            await self._websockets.close()
        if self._web is not None:
            self._web.pre_shutdown()
            # aiohttp waits twice for so long: for handlers to finish, and then for the cancelled ones.
            await self._web.shutdown(grace_s / 2)
