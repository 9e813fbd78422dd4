"""The replicas of `demo --gateway`: started as a user starts them, asked on their admin ports who owns what."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from devtools.demo.processes import ChildProcess

SHARDS = 16
_LOOK_S = 0.1
_AGAIN = frozenset({"uncertain", "requeued", "redelivered", "redelivered_by_hand"})
"""Events in a command's trace that are reasons to offer it again."""


@dataclass(slots=True)
class Replica:
    """One replica; `addresses` (`listen`, `admin`) are those of its last start and those of its next."""

    child: ChildProcess
    addresses: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.child.name

    async def start(self, settings: Mapping[str, str]) -> None:
        """Start it with these settings. Raises `ChildFailed` if it ends instead."""
        ports = {f"{key}.port": address.rpartition(":")[2] for key, address in self.addresses.items()}
        own = {"listen.port": "0", "admin.port": "0", "cluster.port": "0", "cluster.replica": self.name, **ports}
        args = [part for key, value in {**settings, **own}.items() for part in ("--set", f"{key}={value}")]
        ready = await self.child.start(["run", *args])
        self.addresses = {key: ready[key] for key in ("listen", "admin")}

    async def json(self, path: str) -> dict[str, Any]:
        """Return a JSON page of its admin port."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.addresses['admin']}{path}") as reply:
            found: dict[str, Any] = await reply.json()
            return found

    async def metric(self, name: str) -> int:
        """Return a metric's value, given its name as `/metrics` shows it, with the labels; 0 if it is not there."""
        address = f"http://{self.addresses['admin']}/metrics"
        async with aiohttp.ClientSession() as session, session.get(address) as reply:
            lines = (await reply.text()).splitlines()
        return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name))

    async def shards(self) -> int:
        """Return how many shards it owns."""
        return await self.metric("agent_shim_shards")

    async def forwarded(self) -> int:
        """Return how many requests it has passed on to the owner, which answered."""
        return await self.metric('agent_shim_forwarded_requests_total{outcome="answered"}')


class Replicas:
    """All replicas. Methods that wait for a state wait without end: the caller sets the limit."""

    def __init__(self, children: Sequence[ChildProcess]) -> None:
        self._all = [Replica(child) for child in children]

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def other(self, replica: Replica) -> Replica:
        """Return a replica that is not this one."""
        return next(each for each in self._all if each is not replica)

    async def shared_out(self) -> str:
        """Wait until every shard has an owner and no replica more than its share; return the numbers in words."""
        while True:
            counts = {each.name: await each.shards() for each in self._all}
            if sum(counts.values()) == SHARDS and max(counts.values()) - min(counts.values()) <= 1:
                return in_words(counts)
            await asyncio.sleep(_LOOK_S)

    async def links(self, number: int) -> str:
        """Wait until so many links are online; return their numbers by owner, in words."""
        while True:
            counts = {each.name: (await each.json("/status.json"))["links"]["online"] for each in self._all}
            if sum(counts.values()) >= number:
                return in_words(counts)
            await asyncio.sleep(_LOOK_S)

    async def owner_of(self, agent_id: str) -> Replica:
        """Wait until a replica has the agent's session, and return it."""
        while True:
            for replica in self._all:
                sessions = (await replica.json("/status.json"))["sessions"]["items"]
                if any(each["agent_id"] == agent_id for each in sessions):
                    return replica
            await asyncio.sleep(_LOOK_S)


async def reasons(replica: Replica, ident: str) -> str:
    """Return why a command was offered more than once, by its trace; "" if the trace does not say."""
    found = (await replica.json(f"/commands/{ident}.json"))["commands"]
    return ", ".join(sorted({step["event"] for each in found for step in each["trace"]} & _AGAIN))


def in_words(counts: Mapping[str, int]) -> str:
    """Return numbers by replica in words."""
    return ", ".join(f"{name} {number}" for name, number in sorted(Counter(counts).items())) or "nobody"
