"""Agents' newest heartbeats, for the next owner of their link: it has neither their tokens nor a word of theirs.

An owner that takes a link over would have to wait for each agent's next call to dial and to replay its registration.
The replicas that served the agents tell it what they heard, and how long ago that was.
"""

from __future__ import annotations

from dataclasses import dataclass

from shim.core.calls import HeartbeatCall, Target
from shim.ports import Answer, Client
from shim.shards.relay import Asked, Relay
from shim.shards.replicas import Known
from shim.shards.table import Table
from shim.shards.wire import Vouch

MAX_KEPT = 20_000
VOUCH_S = 45.0
"""An agent that was not heard for longer may be gone; it speaks for itself when it calls."""
LOOK_S = 1.0
ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class _Heard:
    place: int
    client: Client
    call: HeartbeatCall
    at_s: float


class Vouching:
    """Remembers heartbeats, and passes them on when a shard has another owner."""

    def __init__(self, known: Known, table: Table, relay: Relay) -> None:
        self._known = known
        self._table = table
        self._relay = relay
        self._heard: dict[tuple[str, Target], _Heard] = {}
        self._told: dict[int, object] = {}

    def heard(self, place: int, client: Client, call: HeartbeatCall) -> None:
        """An agent's heartbeat came in here. Of too many the oldest are forgotten."""
        key = (client.token, call.target)
        self._heard.pop(key, None)
        self._heard[key] = _Heard(place, client, call, self._known.clock.monotonic_s())
        if len(self._heard) > MAX_KEPT:
            del self._heard[next(iter(self._heard))]

    async def run(self) -> None:
        """Look at each change who owns what, until cancelled."""
        while True:
            for place in range(self._known.count):
                owner = self._owner(place)
                if owner is None:
                    self._told.pop(place, None)
                elif self._told.get(place) is not owner and await self._tell(place):
                    self._told[place] = owner
            await self._table.change(LOOK_S)

    def _owner(self, place: int) -> object | None:
        """Whoever serves a shard now, as something that is another when it was lost meanwhile."""
        return self._known.shard(place) or self._table.tenant(place)

    async def _tell(self, place: int) -> bool:
        """False if it is to be tried again."""
        now_s = self._known.clock.monotonic_s
        for each in [each for each in self._heard.values() if each.place == place]:
            age_s = now_s() - each.at_s
            if age_s > VOUCH_S:
                continue
            vouch = Vouch(each.call, age_s)
            shard = self._known.shard(place)
            if shard is not None:
                shard.at_once(each.client, vouch, now_s())
                continue
            holder = self._table.holder(place)
            if holder in ("", self._known.process):
                return False
            answer = await self._relay.ask(Asked(holder, place, ANSWER_S), each.client, vouch, now_s())
            if not isinstance(answer, Answer):
                return False
        return True
