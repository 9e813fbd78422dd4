"""The replicas of the gateway demo: started as a user starts them, and asked on their admin ports who owns what."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from shim.tools.demo.children import Child

SHARDS = 16
_LOOK_S = 0.1
_AGAIN = frozenset({"uncertain", "requeued", "redelivered", "redelivered_by_hand"})
"""Events of a command's trace that are reasons to offer it again."""


@dataclass(slots=True)
class Replica:
    """One of several; `addresses` (`listen`, `admin`) are those of its last start and those of its next."""

    child: Child
    addresses: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.child.name

    async def start(self, settings: Mapping[str, str]) -> None:
        """Start it with these settings. Raises `ChildFailed` if it ends instead."""
        ports = {f"{key}.port": address.rpartition(":")[2] for key, address in self.addresses.items()}
        own = {"listen.port": "0", "admin.port": "0", "shards.count": str(SHARDS), "shards.replica": self.name, **ports}
        args = [part for key, value in {**settings, **own}.items() for part in ("--set", f"{key}={value}")]
        ready = await self.child.start(["run", *args])
        self.addresses = {key: ready[key] for key in ("listen", "admin")}

    async def json(self, path: str) -> dict[str, Any]:
        """A page of its admin port."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.addresses['admin']}{path}") as reply:
            found: dict[str, Any] = await reply.json()
            return found

    async def shards(self) -> int:
        """How many link partitions it owns."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{self.addresses['admin']}/metrics") as reply,
        ):
            lines = (await reply.text()).splitlines()
        return int(sum(float(line.split(" ")[1]) for line in lines if line.startswith("agent_shim_shards ")))


class Replicas:
    """All of them. What waits here waits until it is so: the caller sets the limit."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._all = [Replica(child) for child in children]

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def other(self, replica: Replica) -> Replica:
        """One that is not this one."""
        return next(each for each in self._all if each is not replica)

    async def shared_out(self) -> str:
        """Every partition has an owner, and nobody has more than a share; in words."""
        while True:
            counts = {each.name: await each.shards() for each in self._all}
            if sum(counts.values()) == SHARDS and max(counts.values()) - min(counts.values()) <= 1:
                return told(counts)
            await asyncio.sleep(_LOOK_S)

    async def links(self, number: int) -> str:
        """So many links are online; in words, by owner."""
        while True:
            counts = {each.name: (await each.json("/status.json"))["links"]["online"] for each in self._all}
            if sum(counts.values()) >= number:
                return told(counts)
            await asyncio.sleep(_LOOK_S)

    async def owner_of(self, agent_id: str) -> Replica:
        """Who has an agent's session."""
        while True:
            for replica in self._all:
                sessions = (await replica.json("/status.json"))["sessions"]["items"]
                if any(each["agent_id"] == agent_id for each in sessions):
                    return replica
            await asyncio.sleep(_LOOK_S)


async def reasons(replica: Replica, ident: str) -> str:
    """Why a command was offered more than once, by its trace; `""` if that says nothing of it."""
    found = (await replica.json(f"/commands/{ident}.json"))["commands"]
    return ", ".join(sorted({step["event"] for each in found for step in each["trace"]} & _AGAIN))


def told(counts: Mapping[str, int]) -> str:
    """Numbers by replica, in words."""
    return ", ".join(f"{name} {number}" for name, number in sorted(Counter(counts).items())) or "nobody"
