"""`kill -9` of the shim at each named point between a command's frame and its result at the controller."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from devtools.agents import AgentProfile, Callbacks, Event, EventKind, Identity, LegacyAgent
from devtools.controller.client import ControlError
from shim.clock import Clock
from tests.chaos.harness.schedule import CRASH_POINTS
from tests.chaos.harness.supervisors import DOUBTFUL, SOUND
from tests.chaos.harness.waiting import last
from tests.support.processes import TOKEN, UNMEASURED, Controller, Shim, free_port, world

CONFIG = {"upstream": {"heartbeat_interval_s": 2.0, "send_command_ack": True}, "poll": {"hold": "off"}}
PROFILE = AgentProfile(
    heartbeat_interval_s=0.1, poll_interval_s=0.1, retry_initial_s=0.1, retry_max_s=0.1, result_attempts=99
)


async def push(controller: Controller, agent: LegacyAgent) -> None:
    """As a controller does that has no acknowledgement: until somebody takes it."""
    async with asyncio.timeout(60):
        while True:
            with suppress(ControlError):
                await controller.api.push({"id": "c1", "type": "work", "cluster_id": agent.cluster_id})
                return
            await last(0.1)


async def crash_at(point: str, folder: Path) -> None:
    async with world(folder, {**CONFIG, "listen": {"port": free_port()}}) as (shim, controller):
        shim.program = (*DOUBTFUL, "--crash", point, "1")
        shim.environment = UNMEASURED  # one that is killed tells no coverage
        await shim.start()
        received: list[str] = []
        registered = asyncio.Event()

        def on_event(event: Event) -> None:
            if event.what is EventKind.HEARTBEAT:
                registered.set()
            if event.what is EventKind.COMMAND and event.command is not None:
                received.append(event.command.id)

        who = Identity(agent_id="pod-1", cluster_name="prod", token=TOKEN)
        agent = LegacyAgent(shim.url, who, PROFILE, Clock(), Callbacks(event=on_event))
        life = asyncio.create_task(agent.run())
        try:
            await registered.wait()
            await push(controller, agent)
            assert await shim.wait() == -signal.SIGKILL
            before = len(received)
            shim.program = SOUND
            await shim.start()
            await push(controller, agent)
            path = "/control/commands/c1?wait=result&timeout_s=30"
            found = await controller.control("GET", path)
            assert found["results"][0]["payload"]["output"] == "done work"
            if point == "after_commit":  # what was on disk may be answered before its repetition is read
                await shim.event("command_duplicate")
        finally:
            life.cancel()
            with suppress(asyncio.CancelledError):
                await life
        assert await shim.stop() == 0  # and the log has been read to its end
        judge(point, shim, before, received, found)


def judge(point: str, shim: Shim, before: int, received: list[str], found: dict[str, object]) -> None:
    """What the point left behind, and that nothing was repeated without a word."""
    offers = [(entry["attempt"], entry["reason"]) for entry in shim.events("command_offered")]
    queued = shim.events("command_queued")
    again = [(1, ""), (2, "restart")]
    match point:
        case "frame_read" | "before_commit" | "in_commit":
            assert offers == [(1, "")]  # taken after the restart, when the controller sent it again
            assert (len(queued), before) == (1, 0)
        case "after_commit":
            assert offers == [(1, "")]
            assert len(shim.events("command_duplicate")) == 1
        case "before_reply":
            assert offers == again  # nobody could tell whether the agent had it
        case "after_reply":
            assert offers in ([(1, "")], again)  # unless its result came first
        case _:
            assert offers == [(1, "")]
            assert before == 1
    assert 1 <= len(received) <= len(offers)


@pytest.mark.timeout(400)
async def test_a_command_survives_a_kill_at_every_point(tmp_path: Path) -> None:
    """All at once: each is a shim, a controller and an agent of its own, and mostly waits."""
    folders = {point: tmp_path / point for point in CRASH_POINTS}
    for folder in folders.values():
        folder.mkdir()
    outcomes = await asyncio.gather(*(crash_at(*one) for one in folders.items()), return_exceptions=True)
    failed = {point: outcome for point, outcome in zip(CRASH_POINTS, outcomes, strict=True) if outcome is not None}
    assert not failed, failed
