"""Held polls with the real shim as a process: its own server, sockets, disk and signals.

Rules: docs/reference/protocol.md#13-poll, #15-tunnel-poll.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import aiohttp

from tests.support.processes import Controller, Shim, world

HOLD_S = 25.0
LONG = {"poll": {"hold": HOLD_S, "max_hold_s": HOLD_S, "hold_tunnel": True}}
AT_ONCE_S = 20.0  # far below a hold, far above what a busy machine takes


class Call:
    """One HTTP request on a connection of its own; when and how it ends is the test's choice."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, shim: Shim, method: str, path: str, body: Any = None) -> Self:
        host, port = shim.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        call = cls(reader, writer)
        await call.send(method, path, body)
        return call

    async def send(self, method: str, path: str, body: Any = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        await self._writer.drain()

    async def answer(self, within_s: float = AT_ONCE_S) -> Any:
        """The JSON object of a 200."""
        async with asyncio.timeout(within_s):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            assert head.startswith("HTTP/1.1 20"), head
            length = re.search(r"Content-Length: (\d+)", head)
            return json.loads(await self._reader.readexactly(int(length[1]))) if length else None

    async def rest(self) -> bytes:
        """What had arrived when the connection ended."""
        try:
            return await self._reader.read()
        except ConnectionError:
            return b""

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    def finish(self) -> None:
        """Close with FIN, without waiting."""
        self._writer.close()

    def reset(self) -> None:
        """Close with RST instead of FIN, as a killed peer behind NAT or a full reset does."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class Agent:
    """A registered agent, whose calls are the test's."""

    def __init__(self, shim: Shim, calls: list[Call], name: str = "prod") -> None:
        self.agent_id = f"agent-{name}"
        self.cluster_id = ""
        self._name = name
        self._shim = shim
        self._calls = calls

    async def start(self) -> Self:
        """Register, and heartbeat once."""
        registration = {"agent_id": self.agent_id, "name": self._name}
        answer = await (await self._call("POST", "/api/v1/clusters/agent/register", registration)).answer()
        self.cluster_id = answer["cluster_id"]
        beat = {"cluster_id": self.cluster_id, "agent_id": self.agent_id, "status": "healthy"}
        await (await self._call("POST", f"/api/v1/clusters/agent/{self.cluster_id}/heartbeat", beat)).answer()
        return self

    async def poll(self) -> Call:
        return await self._call("GET", f"/api/v1/clusters/agent/{self.cluster_id}/poll")

    async def commands(self) -> list[str]:
        """Poll once to the end, with a sound client."""
        call = await self.poll()
        answer = await call.answer(HOLD_S + AT_ONCE_S)
        await call.close()
        return [command["id"] for command in answer["commands"]]

    async def tunnel_poll(self) -> Call:
        return await self._call("GET", f"/api/agents/{self.agent_id}/tunnel/status")

    async def _call(self, method: str, path: str, body: Any = None) -> Call:
        self._calls.append(await Call.start(self._shim, method, path, body))
        return self._calls[-1]


@asynccontextmanager
async def serving(
    folder: Path, config: dict[str, Any], *others: str
) -> AsyncIterator[tuple[Shim, Controller, list[Agent]]]:
    """A shim, its controller, and agents with these names besides `prod`; what they opened is closed in the end."""
    calls: list[Call] = []
    async with world(folder, config) as (shim, controller):
        await shim.start()
        try:
            yield shim, controller, [await Agent(shim, calls, name).start() for name in ("prod", *others)]
        finally:
            for call in calls:
                await call.close()


async def metric(shim: Shim, name: str) -> float:
    async with aiohttp.ClientSession() as http, http.get(f"{shim.admin}/metrics") as response:
        found = re.search(rf"^agent_shim_{name} (\S+)$", await response.text(), re.MULTILINE)
        return float(found[1]) if found else 0.0


async def held(shim: Shim, number: int) -> None:
    """Wait until so many polls are held."""
    async with asyncio.timeout(AT_ONCE_S):
        while True:
            if await metric(shim, "polls_held") == number:
                return


async def push(controller: Controller, agent: Agent) -> str:
    command = await controller.api.push({"type": "scale", "payload": {}, "cluster_id": agent.cluster_id})
    return str(command["id"])


async def test_a_command_ends_the_hold(tmp_path: Path) -> None:
    async with serving(tmp_path, LONG) as (shim, controller, [agent]):
        call = await agent.poll()
        await held(shim, 1)
        pushed = await push(controller, agent)
        answer = await call.answer()
        assert [command["id"] for command in answer["commands"]] == [pushed]
        assert await metric(shim, r'command_hand_over_seconds_count\{dialect="clusters_agent"\}') == 1
        assert await metric(shim, r'command_offer_seconds_count\{dialect="clusters_agent"\}') == 1


async def test_an_agent_that_hangs_up_ends_its_poll_long_before_the_hold_is_over(tmp_path: Path) -> None:
    """Without `handler_cancellation` aiohttp goes on with the handler, and it shows only here, with the real server."""
    async with serving(tmp_path, LONG) as (shim, controller, [agent]):
        for hang_up in (Call.finish, Call.reset):
            call = await agent.poll()
            await held(shim, 1)
            hang_up(call)
            await held(shim, 0)
            pushed = await push(controller, agent)
            await shim.event("command_queued", command=pushed)
            assert await agent.commands() == [pushed]
            assert (await shim.event("command_offered", command=pushed))["attempt"] == 1


async def test_a_poll_abandoned_in_the_moment_of_delivery_swallows_nothing(tmp_path: Path) -> None:
    """The agent's end and the command race each other, round after round, with both ways to hang up."""
    config = LONG | {"commands": {"evidence_s": 1, "max_attempts": 100}}
    async with serving(tmp_path, config) as (shim, controller, [agent]):
        for round_ in range(30):
            call = await agent.poll()
            await held(shim, 1)
            pushing = asyncio.create_task(push(controller, agent))
            for _ in range(round_):
                await asyncio.sleep(0)
            (call.finish if round_ % 2 else call.reset)()
            pushed = await pushing
            got = pushed.encode() in await call.rest()
            while not got:
                got = pushed in await agent.commands()
        assert await metric(shim, r'commands_total\{event="dead"\}') == 0


async def test_of_two_polls_the_older_is_answered_empty_at_once_and_the_newer_is_served(tmp_path: Path) -> None:
    async with serving(tmp_path, LONG) as (shim, controller, [agent]):
        older = await agent.poll()
        await held(shim, 1)
        newer = await agent.poll()
        assert (await older.answer())["commands"] == []
        assert await metric(shim, "polls_held") == 1
        pushed = await push(controller, agent)
        assert [command["id"] for command in (await newer.answer())["commands"]] == [pushed]


async def test_sigterm_answers_every_held_poll_at_once(tmp_path: Path) -> None:
    names = [f"cluster-{n}" for n in range(19)]  # all their polls are open before the first hold is over
    async with serving(tmp_path, LONG, *names) as (shim, _, agents):
        for agent in agents:
            assert (await (await agent.tunnel_poll()).answer())["status"] == "IDLE"  # it is told once how things are
        polls = [await agent.poll() for agent in agents]
        tunnel_polls = [await agent.tunnel_poll() for agent in agents]
        await held(shim, len(polls) + len(tunnel_polls))
        shim.send(signal.SIGTERM)
        assert [(await call.answer())["commands"] for call in polls] == [[]] * len(polls)
        assert [(await call.answer())["status"] for call in tunnel_polls] == ["IDLE"] * len(tunnel_polls)
        assert await shim.wait() == 0


async def change_tunnel(controller: Controller, agent: Agent, status: str) -> None:
    payload = {"cluster_id": agent.cluster_id, "status": status, "poll_frequency": 3}
    message = {"type": "tunnel_status", "payload": payload}
    await controller.control("POST", "/control/send", {"message": message, "cluster_id": agent.cluster_id})


async def test_a_tunnel_poll_is_held_until_its_state_changes(tmp_path: Path) -> None:
    async with serving(tmp_path, LONG) as (shim, controller, [agent]):
        assert (await (await agent.tunnel_poll()).answer())["status"] == "IDLE"
        call = await agent.tunnel_poll()
        await held(shim, 1)
        await change_tunnel(controller, agent, "REQUIRED")
        answer = await call.answer()
        assert (answer["status"], answer["poll_frequency"]) == ("REQUIRED", 3)


async def test_a_tunnel_poll_that_comes_after_a_change_is_not_held(tmp_path: Path) -> None:
    async with serving(tmp_path, LONG) as (shim, controller, [agent]):
        assert (await (await agent.tunnel_poll()).answer())["status"] == "IDLE"
        await change_tunnel(controller, agent, "REQUIRED")
        # whether it arrives before or after the news
        assert (await (await agent.tunnel_poll()).answer())["status"] == "REQUIRED"
        await agent.tunnel_poll()
        await held(shim, 1)


async def test_what_was_learnt_holds_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path, {}) as (shim, _, [agent]):
        assert await empty_poll_s(agent) > 0.9
        assert await shim.stop() == 0
        await shim.start()
        assert await empty_poll_s(agent) > 1.9


async def empty_poll_s(agent: Agent) -> float:
    """How long a poll without commands took."""
    started_s = time.monotonic()
    assert await agent.commands() == []
    return time.monotonic() - started_s


async def test_how_an_agent_paces_its_polls_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path, {"poll": {"hold": 0.4}}) as (shim, _, [agent]):
        # The next poll is there when the reply to the one before it is written: its ticks are shorter than our holds.
        polls = await agent.poll()
        for _ in range(7):
            await polls.send("GET", f"/api/v1/clusters/agent/{agent.cluster_id}/poll")
        for _ in range(8):
            assert (await polls.answer())["commands"] == []
        assert (await shim.event("poll_pacing_detected"))["pace"] == "ticker"
        assert await metric(shim, r'polling_sessions\{pace="ticker"\}') == 1
