"""Single commands, wherever they are: every replica is asked, and those that answer in time are heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from shim.admin.commands import describe
from shim.bridge import Bridge
from shim.errors import OperatorError
from shim.shards.bus import Bus
from shim.shards.place import Place
from shim.shards.table import Table
from shim.shards.wire import AnyMessage, Found, Look, encode

WAIT_S = 2.0


class Lookup:
    """Asks and answers."""

    def __init__(self, bus: Bus, table: Table, place: Place, bridges: Callable[[], list[Bridge]]) -> None:
        self._bus = bus
        self._table = table
        self._place = place
        self._bridges = bridges
        self._waiting: dict[int, asyncio.Queue[list[dict[str, Any]]]] = {}

    async def everywhere(self, command_id: str) -> list[dict[str, Any]]:
        """What is known of a command here and there. Raises `OperatorError`."""
        return [*await self._here(command_id), *await self.elsewhere(command_id)]

    async def _here(self, command_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for bridge in self._bridges():
            found += [describe(each, bridge.sessions) for each in await bridge.operator.find(command_id)]
        return found

    async def elsewhere(self, command_id: str) -> list[dict[str, Any]]:
        """What other replicas know of a command."""
        others = [process for process in self._table.members() if process != self._place.process]
        number = next(self._place.numbers)
        answers = self._waiting[number] = asyncio.Queue()
        found: list[dict[str, Any]] = []
        for process in others:
            self._say(process, Look(number, command_id))
        try:
            async with asyncio.timeout(WAIT_S):
                for _ in others:
                    found += await answers.get()
        except TimeoutError:
            pass  # who does not answer is not waited for
        finally:
            del self._waiting[number]
        return found

    def asked(self, sender: str, said: Look) -> None:
        """Another replica looks for a command."""

        async def look() -> None:
            try:
                found = await self._here(said.command)
            except OperatorError:
                return
            self._say(sender, Found(said.number, found))

        self._place.spawn("lookup", look())

    def found(self, said: Found) -> None:
        """Another replica has looked."""
        answers = self._waiting.get(said.number)
        if answers is not None:
            answers.put_nowait(said.commands)

    def _say(self, process: str, said: AnyMessage) -> None:
        self._bus.post(
            process, encode(self._place.process, said, next(self._place.numbers), self._bus.max_payload_bytes)
        )
