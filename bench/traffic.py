"""Network traffic of one agent-hour: the shim's WebSocket against the HTTP that it replaces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from bench import simulation
from bench.figures import Figure, Log
from bench.servers import Bench
from devtools.agents import AgentProfile, Callbacks, Event, EventKind, Identity, LegacyAgent
from tests.support.virtual import VirtualClock

PART = "Traffic of one agent-hour"
HOUR_S = 3600.0
COMMANDS = 12
# What real agents do: heartbeats and tunnel polls every 5 s; documented polls every 5 s besides.
AGENT = AgentProfile(heartbeat_interval_s=5.0, tunnel_interval_s=5.0, poll_interval_s=5.0)


class Wire:
    """A TCP relay that counts the bytes that go through it, both ways."""

    def __init__(self) -> None:
        self.size_bytes = 0

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.size_bytes += len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def to(self, url: str) -> AsyncIterator[str]:
        """A relay to this URL; yields its own."""
        host, port = urlsplit(url).hostname, urlsplit(url).port

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_connection(host, port)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, inner_writer))
                group.create_task(self._pump(inner_reader, writer))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()


class Hour:
    """One agent-hour: HTTP calls and bytes of the agent, messages and bytes of the shim's WebSocket."""

    def __init__(self) -> None:
        self.calls = 0
        self.agent_bytes = 0
        self.messages = 0
        self.upstream_bytes = 0


async def _hour(hold: str, commands: int) -> Hour:
    hour, agent_wire, upstream_wire = Hour(), Wire(), Wire()
    loop = asyncio.get_running_loop()
    clock: Any = VirtualClock(loop)

    def count(event: Event) -> None:
        hour.calls += event.what is not EventKind.COMMAND

    async with simulation.running(upstream_wire.to, poll={"hold": hold}) as world, agent_wire.to(world.url) as url:
        who = Identity(agent_id="agent-1", cluster_name="prod", token=simulation.TOKEN)
        agent = LegacyAgent(url, who, AGENT, clock, Callbacks(event=count))
        life = asyncio.create_task(agent.run())
        await asyncio.sleep(600.0)  # the holds are learnt
        hour.calls, agent_wire.size_bytes, upstream_wire.size_bytes = 0, 0, 0
        first = world.controller.history.last_n
        for number in range(commands):
            await asyncio.sleep(HOUR_S / COMMANDS)
            await world.controller.push_command(id=f"cmd-{number}", cluster_id=agent.cluster_id)
        await asyncio.sleep(30.0)
        hour.agent_bytes, hour.upstream_bytes = agent_wire.size_bytes, upstream_wire.size_bytes
        hour.messages = len(world.controller.history.after(first, lambda event: event.direction != ""))
        life.cancel()
        await asyncio.wait([life])
    return hour


def measure(bench: Bench, log: Log) -> list[Figure]:
    """The shim with holds against the agent's own calls without."""
    plain, held = (simulation.run(_hour(hold, bench.pick(COMMANDS, 1))) for hold in ("off", "auto"))
    log(f"traffic: {held.messages} messages for {plain.calls} calls")
    note = "requests and responses against messages both ways; payload of TCP, without TLS"
    return [
        Figure(
            PART, "messages", "", held.messages, plain.calls, "HTTP calls", (held.messages / plain.calls,), note=note
        ),
        Figure(
            PART,
            "bytes",
            "kB",
            held.upstream_bytes / 1e3,
            plain.agent_bytes / 1e3,
            "HTTP",
            (held.upstream_bytes / plain.agent_bytes,),
        ),
    ]
