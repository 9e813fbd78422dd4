"""Many links at once at the pace of production: how long until each of their connections is given up.

One shim has a link for each agent's own token, and all its settings are defaults. The connections were opened at
different times, so a fault that begins for all of them at once meets each in another phase of its pings and heartbeats.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import aiohttp

from devtools.agents import AgentProfile, Callbacks, Command, Identity, LegacyAgent, Result
from shim.clock import Clock
from tests.chaos.harness.report import distribution
from tests.chaos.harness.waiting import last
from tests.support.network import TwoHosts
from tests.support.processes import Controller, Shim

LINKS = 60
PREFIX = "token-of-"
SPREAD_S = 30.0  # longer than a ping's interval and a heartbeat's
PEACE_S = 35.0  # a link that has been online for this long is stable, and has sent a heartbeat
ONLINE_WITHIN_S = 180.0
GIVEN_UP_WITHIN_S = 300.0  # far above what is promised: what takes longer is lost, not slow

HALF_OPEN, STALLED, CUT = "half_open", "stalled", "cut"


class Links:
    """A shim with `LINKS` links, and what its log says of them."""

    def __init__(self, shim: Shim, controller: Controller, hosts: TwoHosts | None) -> None:
        self._shim = shim
        self._controller = controller
        self._hosts = hosts
        self._online: set[str] = set()
        self._given_up: dict[str, tuple[float, str]] = {}
        self._changed = asyncio.Event()
        shim.on_line = self._on_line

    def _on_line(self, line: str) -> None:
        with suppress(ValueError):
            entry = json.loads(line)
            name, link = entry.get("event"), entry.get("link", "")
            if name == "link_state":
                (self._online.add if entry["state"] == "online" else self._online.discard)(link)
            elif name == "link_broken":
                self._given_up.setdefault(link, (time.monotonic(), entry["reason"]))
            self._changed.set()

    async def online(self) -> None:
        """Wait until all links are online."""
        async with asyncio.timeout(ONLINE_WITHIN_S):
            while len(self._online) < LINKS:
                self._changed.clear()
                await self._changed.wait()

    async def given_up_s(self, kind: str) -> list[float]:
        """Begin a fault for all connections, and return the seconds until each was given up for it."""
        await self.online()
        await last(PEACE_S)
        reason = STALLED if kind == STALLED else HALF_OPEN
        port = int(self._controller.address.rpartition(":")[2])
        self._given_up.clear()
        began = time.monotonic()
        with self._hosts.cut(port) if kind == CUT and self._hosts is not None else nullcontext():
            if kind != CUT:
                fault = {"kind": "silent" if kind == HALF_OPEN else "stalled"}
                await self._controller.control("POST", "/control/faults", fault)
            with suppress(TimeoutError):
                async with asyncio.timeout(GIVEN_UP_WITHIN_S):
                    while len(self._given_up) < LINKS:
                        self._changed.clear()
                        await self._changed.wait()
        if kind != CUT:
            await self._controller.control("DELETE", "/control/faults")
        return [at - began for at, said in self._given_up.values() if said == reason]


async def _no_commands(command: Command) -> Result:
    raise AssertionError(command.id)


@asynccontextmanager
async def _agents(url: str) -> AsyncIterator[None]:
    """Agents with a token each, one after another, until the block ends."""

    async def live(number: int) -> None:
        await last(number * SPREAD_S / LINKS)
        name = f"link-{number}"
        who = Identity(agent_id=name, cluster_name=name, token=f"{PREFIX}{name}")
        callbacks = Callbacks(event=lambda event: None, execute=_no_commands)
        await LegacyAgent(url, who, AgentProfile(), Clock(), callbacks).run()

    tasks = [asyncio.create_task(live(number)) for number in range(LINKS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measured(folder: Path, hosts: TwoHosts | None) -> dict[str, Any]:
    """Play all kinds, and return for each how the seconds until the connections were given up are distributed."""
    async with (
        aiohttp.ClientSession() as session,
        Controller(folder, session, "--token-prefix", PREFIX) as controller,
    ):
        await controller.start()
        config = {"upstream": {"url": controller.url, "allow_insecure": True}}
        async with Shim(folder, config) as shim:
            links = Links(shim, controller, hosts)
            await shim.start()
            async with _agents(shim.url):
                kinds = [HALF_OPEN, STALLED] + [CUT] * (hosts is not None)
                found = {f"{kind}_found": distribution(await links.given_up_s(kind)) for kind in kinds}
            assert await shim.stop() == 0
    return {"links": LINKS} | found
