"""One link partition on its owner: a bridge with a store of its own, and a fence between it and the world."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from weakref import WeakSet

from shim.admin import Journal
from shim.bridge import Bridge
from shim.composition import Surroundings
from shim.core.calls import Accepted, Commands, PollCall
from shim.core.leases import Term
from shim.messages import Message
from shim.ports import Answer, Client, DialFailure, DialSpec, Socket, SocketEvents, UpstreamPort
from shim.settings import Settings
from shim.shards.wire import AnyCall, Leftovers, Vouch
from shim.store import Partition, open_store
from shim.storewatch import probe, tell_findings


class FencedSocket:
    """A `ports.Socket` that says nothing once the shard is not ours any more."""

    def __init__(self, socket: Socket, fence: Fence) -> None:
        self._socket = socket
        self._fence = fence

    def send(self, message: Message) -> None:
        """See `ports.Socket`."""
        if self._fence.open:
            self._socket.send(message)

    def ping(self, payload: bytes) -> None:
        """See `ports.Socket`."""
        if self._fence.open:
            self._socket.ping(payload)

    def close(self, code: int) -> None:
        """See `ports.Socket`. Until the peer has answered it counts as open: `Fence.cut` ends that."""
        if self._fence.open:
            self._socket.close(code)
        else:
            self._socket.abort()

    def abort(self) -> None:
        """See `ports.Socket`."""
        self._fence.sockets.discard(self)
        self._socket.abort()


class Fence:
    """A `ports.UpstreamPort` that dials and lets sockets speak only while `valid` says so: it is asked every time.

    A process that was paused longer than its lease wakes up with open sockets and timers that are due, and the first
    thing to run may be any of them.
    """

    def __init__(self, upstream: UpstreamPort, valid: Callable[[], bool]) -> None:
        self._upstream = upstream
        self._valid = valid
        self.sockets: WeakSet[FencedSocket] = WeakSet()

    @property
    def open(self) -> bool:
        """Whether anything may go out. Once it may not, all sockets are dropped."""
        if self._valid():
            return True
        self.cut()
        return False

    def dial(self, spec: DialSpec, events: SocketEvents, done: Callable[[Socket | DialFailure], None]) -> None:
        """See `ports.UpstreamPort`; nothing is dialled, and nobody told, once the shard is not ours."""
        if not self.open:
            return

        def dialled(outcome: Socket | DialFailure) -> None:
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
    """Made when its lease was taken: `open`, then `serve`, and in the end `stop` and `close`."""

    def __init__(self, number: int, term: Term, around: Surroundings, owner_key: bytes, settings: Settings) -> None:
        self.number = number
        self.term = term
        self.fence = term.revision
        self.serving = False
        self._clock = around.clock
        self._metrics = around.metrics
        self._owner_key = owner_key
        self._fence = Fence(around.upstream, self.valid)
        watch = probe(around.metrics, around.broken)
        store = open_store(around.settings.store, around.post, watch, Partition(f"s{number}", term.revision))
        self.recent = Journal(store)
        self.bridge = Bridge(around.context(settings, self.recent, self._fence, owner_key))

    def valid(self) -> bool:
        """Whether it is ours."""
        return self.term.valid(self._clock.monotonic_s())

    @property
    def usable(self) -> bool:
        """Whether calls may be carried out here."""
        return self.serving and self.valid()

    def at_once(self, client: Client, call: AnyCall, arrived_s: float) -> Answer | None:
        """See `ports.Switchboard`."""
        if isinstance(call, Vouch):
            self.bridge.vouched(client, call.heartbeat, call.age_s)
            return Answer(Accepted())
        if not isinstance(call, Leftovers):
            return self.bridge.at_once(client, call, arrived_s)
        poll = PollCall(call.dialect, call.target)
        if self.bridge.detour.waiting(client, poll):
            return None
        return Answer(Commands((), self.bridge.ctx.settings.poll.frequency_s))

    async def call(self, client: Client, call: AnyCall, arrived_s: float) -> Answer:
        """See `ports.Switchboard`."""
        if isinstance(call, Vouch):
            raise TypeError("it is answered at once")
        if not isinstance(call, Leftovers):
            return await self.bridge.call(client, call, arrived_s)
        poll = PollCall(call.dialect, call.target)
        answer = await self.bridge.detour.merge(client, poll, [], arrived_s)
        return answer or Answer(Commands((), self.bridge.ctx.settings.poll.frequency_s))

    async def open(self) -> None:
        """Take the store over and begin to work, unless the lease ends meanwhile. Raises `StoreError`."""
        loaded = await asyncio.to_thread(self.recent.open)
        tell_findings(loaded, self._metrics)
        if self.valid():
            self.bridge.start(replace(loaded, key=self._owner_key))
            self.serving = True

    def cut(self) -> None:
        """It is not ours any more: nothing goes out from now on."""
        self._fence.cut()
        self.stop()

    def stop(self) -> None:
        """Answer what waits and close the links."""
        self.serving = False
        self.bridge.stop()

    async def close(self) -> None:
        """Close the store; what was submitted is stored, unless the next owner has it already. Nothing is open then."""
        await asyncio.to_thread(self.recent.close)
        self._fence.cut()
