"""One shard on its owner: a bridge with a store of its own, and a fence between it and the world."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from weakref import WeakSet

from msgspec.structs import replace

from shim.admin import RecentCommandsStore
from shim.bridge import Bridge
from shim.config.settings import Settings
from shim.fallback import FallbackPolicy
from shim.ports import CommandStore, DialFailure, DialRequest, UpstreamPort, WebSocket, WebSocketListener
from shim.protocol.upstream_message import Message
from shim.runtime import RuntimeContext
from shim.store.monitor import log_store_warnings


class FencedSocket:
    """A `ports.Socket` that sends nothing once the shard is not ours any more."""

    def __init__(self, socket: WebSocket, fence: FencedUpstream) -> None:
        self._socket = socket
        self._fence = fence

    def send(self, message: Message) -> None:
        """Send a message while the shard is ours."""
        if self._fence.open:
            self._socket.send(message)

    def ping(self, payload: bytes) -> None:
        """Send a ping while the shard is ours."""
        if self._fence.open:
            self._socket.ping(payload)

    def close(self, code: int) -> None:
        """Close, or drop the connection if the shard is not ours. Until the peer has answered it counts as open."""
        if self._fence.open:
            self._socket.close(code)
        else:
            self._socket.abort()

    def abort(self) -> None:
        """Drop the connection."""
        self._fence.sockets.discard(self)
        self._socket.abort()


class FencedUpstream:
    """A `ports.UpstreamPort` that dials, and lets sockets send, only while `valid` returns true: it is asked each time.

    A process that was paused longer than its lease wakes up with open sockets and timers that are due, and the first
    thing to run may be any of them.
    """

    def __init__(self, upstream: UpstreamPort, valid: Callable[[], bool]) -> None:
        self._upstream = upstream
        self._valid = valid
        self.sockets: WeakSet[FencedSocket] = WeakSet()

    @property
    def open(self) -> bool:
        """True while anything may be sent. Once nothing may, all sockets are dropped."""
        if self._valid():
            return True
        self.cut()
        return False

    def dial(
        self, spec: DialRequest, events: WebSocketListener, done: Callable[[WebSocket | DialFailure], None]
    ) -> None:
        """Dial; once the shard is not ours nothing is dialled and nobody is told."""
        if not self.open:
            return

        def dialled(outcome: WebSocket | DialFailure) -> None:
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
    """Made when its lease was taken: `open`, then it serves, and in the end `stop` and `close`.

    `valid` returns whether the lease is ours now; `fence` is its fencing token, `opened` makes the store for it.
    """

    def __init__(
        self,
        number: int,
        fence: int,
        store: CommandStore,
        around: RuntimeContext,
        settings: Settings,
        owner_key: bytes,
        valid: Callable[[], bool],
    ) -> None:
        self.number = number
        self.fence = fence
        self._valid = valid
        self._serving = False
        self._ended = False
        self._metrics = around.metrics
        self._owner_key = owner_key
        self._upstream = FencedUpstream(around.upstream, self.valid)
        self.recent = RecentCommandsStore(store)
        self.bridge = Bridge(around.context(settings, self.recent, self._upstream, owner_key))
        self.fallback = FallbackPolicy(self.bridge)

    def valid(self) -> bool:
        """Return whether the shard is ours."""
        return not self._ended and self._valid()

    @property
    def usable(self) -> bool:
        """True while calls may be carried out here."""
        return self._serving and self.valid()

    async def open(self) -> None:
        """Open the store and begin to work, unless the lease ends meanwhile. Raises `StoreError`."""
        loaded = await asyncio.to_thread(self.recent.open)
        log_store_warnings(loaded, self._metrics)
        if self.valid():
            self.bridge.start(replace(loaded, key=self._owner_key))
            self._serving = True

    def stop(self) -> None:
        """Answer what waits and close the links."""
        self._serving = False
        self.bridge.stop()

    def cut(self) -> None:
        """Send nothing more: the shard is not ours any more."""
        self._ended = True
        self._upstream.cut()
        self.stop()

    async def close(self) -> None:
        """Close the store; what was submitted is stored, unless the next owner has it already. Then nothing is open."""
        await self.fallback.close()
        await asyncio.to_thread(self.recent.close)
        self._ended = True
        self._upstream.cut()
