"""The owning side: calls that other replicas pass on are carried out here, and their commands are watched over.

A reply with commands leaves this process with a message that may be lost, to a replica that may die: unless that one
says what became of it, it counts as neither written nor read.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import msgspec

from shim.bridge import Bridge
from shim.core.calls import Failed, PollCall
from shim.logs import get
from shim.ports import Answer, Client, Lease, Timer
from shim.shards.bus import Bus
from shim.shards.metrics import ShardMetrics
from shim.shards.place import Place
from shim.shards.shard import Shard
from shim.shards.wire import (
    Answered,
    Ask,
    Closed,
    Leftovers,
    NextRequest,
    WireError,
    encode,
    pack,
    token_text,
    unpack_call,
)

log = get(__name__)

SILENCE_S = 10.0
"""A replica that has said nothing of a reply for so long will not."""
_PEER_BITS = 40


@dataclass(frozen=True, slots=True)
class _Lent:
    """A lease on its way: to whom, of which bridge, on which connection (our number)."""

    process: str
    bridge: Bridge
    lease: Lease
    connection: int
    timer: Timer


class Service:
    """Serves other replicas. `shard_of` gives a shard that is ours and serves."""

    def __init__(self, bus: Bus, place: Place, metrics: ShardMetrics, shard_of: Callable[[int], Shard | None]) -> None:
        self._bus = bus
        self._place = place
        self._metrics = metrics
        self._shard_of = shard_of
        self._peers: dict[str, int] = {}
        self._peer_numbers = count(1)
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._lent: dict[int, _Lent] = {}
        self._carrying: dict[int, set[Bridge]] = {}

    def _connection(self, process: str, number: int) -> int:
        """Another replica's connection among ours: our own have small numbers."""
        peer = self._peers.get(process)
        if peer is None:
            peer = self._peers[process] = next(self._peer_numbers)
        return (peer << _PEER_BITS) + number

    # --- calls --------------------------------------------------------------------------------------------------------

    def ask(self, sender: str, asked: Ask) -> None:
        """A call was passed on. Raises `WireError`."""
        shard = self._shard_of(asked.shard)
        if shard is None:
            self._say(sender, Answered(asked.number, self._place.clock.monotonic_s()))
            return
        self._metrics.served.inc()
        call = unpack_call(asked.kind, asked.body)
        client = Client(token_text(asked.token), self._connection(sender, asked.connection))
        now = self._place.clock.monotonic_s()
        unknown = -math.inf if isinstance(call, (PollCall, Leftovers)) else now
        arrived_s = unknown if asked.arrived is None else min(asked.arrived, now)
        answer = shard.at_once(client, call, arrived_s)
        if answer is not None:
            self._reply(sender, asked.number, shard, client, answer)
            return

        async def carry_out() -> None:
            try:
                answer = await shard.call(client, call, arrived_s)
            finally:
                self._tasks.pop((sender, asked.number), None)
            self._reply(sender, asked.number, shard, client, answer)

        task = self._place.spawn(f"call for {sender}", carry_out())
        if task is not None:
            self._tasks[sender, asked.number] = task

    def _reply(self, sender: str, number: int, shard: Shard, client: Client, answer: Answer) -> None:
        bridge, now = shard.bridge, self._place.clock.monotonic_s()
        if answer.lease is None:
            self._say(sender, Answered(number, now, *self._packed(answer)))
            return
        if not shard.usable or not self._bus.is_up:
            bridge.unwritten(answer.lease)
            self._say(sender, Answered(number, now))
            return
        lent = next(self._place.numbers)
        try:
            kind, body = pack(answer.outcome)
            messages = self._encode(Answered(number, now, kind, body, lent))
        except WireError as error:
            log.error("relay_too_large", error=str(error))
            bridge.unwritten(answer.lease)
            self._say(sender, Answered(number, now, *self._packed(Answer(Failed(502, str(error))))))
            return
        timer = self._place.timers.call_later(SILENCE_S, lambda: self._doubt(lent))
        self._lent[lent] = _Lent(sender, bridge, answer.lease, client.connection, timer)
        self._bus.post(sender, messages, f"l{lent}")

    def _packed(self, answer: Answer) -> tuple[str, msgspec.Raw]:
        try:
            return pack(answer.outcome)
        except WireError as error:
            return pack(Failed(502, str(error)))

    def left(self, sender: str, number: int) -> None:
        """The agent hung up."""
        task = self._tasks.pop((sender, number), None)
        if task is not None:
            task.cancel()

    # --- what became of leases ----------------------------------------------------------------------------------------

    def _take(self, sender: str, lease: int) -> _Lent | None:
        lent = self._lent.get(lease)
        if lent is None or lent.process != sender:
            return None
        del self._lent[lease]
        lent.timer.cancel()
        return lent

    def written(self, sender: str, lease: int) -> None:
        """The reply was handed to a kernel."""
        lent = self._take(sender, lease)
        if lent is not None:
            self._carrying.setdefault(lent.connection, set()).add(lent.bridge)
            lent.bridge.written(lent.lease)

    def unwritten(self, sender: str, lease: int) -> None:
        """It was not."""
        lent = self._take(sender, lease)
        if lent is not None:
            lent.bridge.unwritten(lent.lease)

    def unreachable(self, lease: int) -> None:
        """Nobody was there to take the reply: no agent has seen it."""
        lent = self._lent.get(lease)
        if lent is not None:
            self.unwritten(lent.process, lease)

    def _doubt(self, lease: int) -> None:
        """Nobody will tell any more whether it was written."""
        lent = self._lent.get(lease)
        if lent is not None:
            self.written(lent.process, lease)
            self._carrying.pop(lent.connection, None)
            lent.bridge.connection_lost(lent.connection)

    def next_request(self, sender: str, said: NextRequest) -> None:
        """The agent went on with a connection."""
        connection = self._connection(sender, said.connection)
        for bridge in self._carrying.pop(connection, ()):
            bridge.next_request(connection)

    def closed(self, sender: str, said: Closed) -> None:
        """A connection is gone."""
        connection = self._connection(sender, said.connection)
        for bridge in self._carrying.pop(connection, ()):
            bridge.connection_closed(connection, said.clean)

    def gone(self, living: frozenset[str]) -> None:
        """Only these replicas live: what was only written to another may never have been read."""
        for process, number in list(self._tasks):
            if process not in living:
                self.left(process, number)
        for lease, lent in list(self._lent.items()):
            if lent.process not in living:
                self._doubt(lease)
        dead = {self._peers.pop(process) for process in list(self._peers) if process not in living}
        for connection in [each for each in self._carrying if each >> _PEER_BITS in dead]:
            for bridge in self._carrying.pop(connection):
                bridge.connection_lost(connection)

    # ------------------------------------------------------------------------------------------------------------------

    def _say(self, process: str, said: Answered) -> None:
        self._bus.post(process, self._encode(said))

    def _encode(self, said: Answered) -> list[bytes]:
        return encode(self._place.process, said, next(self._place.numbers), self._bus.max_payload_bytes)
