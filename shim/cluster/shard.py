"""One shard at its owner: a bridge with its own store, whose upstream sockets are disabled once the lease is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from weakref import WeakSet

from msgspec.structs import replace

from shim.bridge import Bridge
from shim.config.settings import Settings
from shim.fallback import FallbackPolicy
from shim.ports import CommandStore, DialFailure, DialRequest, UpstreamPort, WebSocket, WebSocketListener
from shim.protocol.upstream_message import Message
from shim.runtime import RuntimeContext
from shim.store import log_store_warnings


class FencedSocket:
    """A `ports.WebSocket` that sends only while the lease of the shard is valid."""

    def __init__(self, socket: WebSocket, fence: FencedUpstream) -> None:
        self._socket = socket
        self._fence = fence

    def send(self, message: Message) -> None:
        """Send a message if the lease is valid."""
        if self._fence.open:
            self._socket.send(message)

    def ping(self, payload: bytes) -> None:
        """Send a ping if the lease is valid."""
        if self._fence.open:
            self._socket.ping(payload)

    def close(self, code: int) -> None:
        """Start the closing handshake, or drop the connection if the lease is lost.

        The socket stays in `sockets` during the handshake, so that a loss of the lease still drops it.
        """
        if self._fence.open:
            self._socket.close(code)
        else:
            self._socket.abort()

    def abort(self) -> None:
        """Drop the connection."""
        self._fence.sockets.discard(self)
        self._socket.abort()


class FencedUpstream:
    """A `ports.UpstreamPort` that dials, and lets its sockets send, only while `valid` returns true.

    `valid` is called before each dial and each send. A timer for the end of the lease would not be enough: in a process
    that was paused beyond its lease, another callback may run before that timer and send.
    """

    def __init__(self, upstream: UpstreamPort, valid: Callable[[], bool]) -> None:
        self._upstream = upstream
        self._valid = valid
        self.sockets: WeakSet[FencedSocket] = WeakSet()

    @property
    def open(self) -> bool:
        """True while the lease is valid. Drops all sockets otherwise."""
        if self._valid():
            return True
        self.cut()
        return False

    def dial(
        self, spec: DialRequest, events: WebSocketListener, done: Callable[[WebSocket | DialFailure], None]
    ) -> None:
        """Dial if the lease is valid. Without a valid lease, `done` is never called."""
        if not self.open:
            return

        def dialled(outcome: WebSocket | DialFailure) -> None:
            """Pass the outcome on, with the socket behind the fence."""
            if isinstance(outcome, DialFailure):
                done(outcome)
                return
            socket = FencedSocket(outcome, self)
            self.sockets.add(socket)
            if self.open:
                done(socket)

        self._upstream.dial(spec, events, dialled)

    def cut(self) -> None:
        """Drop every socket at once."""
        for socket in list(self.sockets):
            socket.abort()


class Shard:
    """Bridge, store and fallback of a shard, made when its lease was taken. Life cycle: `open`, `stop`, `close`.

    `valid` returns whether the lease is valid now. `fence` is its fencing token.
    """

    def __init__(
        self,
        number: int,
        fence: int,
        store: CommandStore,
        context: RuntimeContext,
        settings: Settings,
        owner_key: bytes,
        valid: Callable[[], bool],
    ) -> None:
        self.number = number
        self.fence = fence
        self._valid = valid
        self._serving = False
        self._ended = False
        self._metrics = context.metrics
        self._owner_key = owner_key
        self._upstream = FencedUpstream(context.upstream, self.valid)
        self._store = store
        self.bridge = Bridge(context.bridge_context(settings, store, self._upstream, owner_key))
        self.fallback = FallbackPolicy(self.bridge)

    def valid(self) -> bool:
        """Return whether the lease of the shard is valid."""
        return not self._ended and self._valid()

    @property
    def usable(self) -> bool:
        """True while the shard can carry out calls."""
        return self._serving and self.valid()

    async def open(self) -> None:
        """Open the store, then start the bridge if the lease is still valid. Raises `StoreError`."""
        loaded = await asyncio.to_thread(self._store.open)
        log_store_warnings(loaded, self._metrics)
        if self.valid():
            self.bridge.start(replace(loaded, key=self._owner_key))
            self._serving = True

    def stop(self) -> None:
        """Answer waiting calls and close the links."""
        self._serving = False
        self.bridge.stop()

    def cut(self) -> None:
        """Stop at once, because the lease is lost: drop the upstream sockets first, so that nothing more is sent."""
        self._ended = True
        self._upstream.cut()
        self.stop()

    async def close(self) -> None:
        """Store the submissions, unless the next owner has fenced the store, then close it and all connections."""
        await self.fallback.close()
        await asyncio.to_thread(self._store.close)
        self._ended = True
        self._upstream.cut()
