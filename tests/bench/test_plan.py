"""The plan on paper: its arithmetic, its page, and the two constants that it has from the store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bench import plan, sizing
from bench.plan import Cost, Fleet, Plan
from shim.clock import Clock
from shim.tools.agents import What
from shim.tools.control_client import ControlClient, control_client
from shim.tools.controller.server import DevController
from shim.tools.demo.cast import Agent, Watch
from tests.support import natsd
from tests.support.natsd import NatsServer, running
from tests.support.processes import Shim

ROWS = [
    {"agents": 1000, "rss_mb": 60.0, "cpu_percent": 6.0},
    {"agents": 10_000, "rss_mb": 240.0, "cpu_percent": 51.0},
    {"agents": 100, "rss_mb": 999.0, "cpu_percent": 99.0},
]
MEASURED = {"about": {"machine": "a machine", "shim": "1", "date": "2026-01-02"}, "sizing": ROWS}
COMMANDS = 5


def test_what_an_agent_costs_is_the_line_through_the_two_largest() -> None:
    cost = Cost.of(ROWS)
    assert (round(cost.agent_mb, 6), round(cost.base_mb, 6)) == (0.02, 40.0)
    assert (round(cost.agent_cpu, 9), round(cost.base_cpu, 6)) == (5e-5, 0.01)
    with pytest.raises(ValueError, match="make bench"):
        Cost.of(ROWS[:1])


def test_replicas_memory_and_messages_follow() -> None:
    made = Plan(Fleet(agents=49_000, commands_per_hour=36, used=0.5), Cost.of(ROWS))
    # (0.5 - 0.01) / (2 * 50 µs)
    assert (made.per_replica, made.needed, made.replicas) == (4900, 10, 11)
    assert made.commands_s == 490
    assert made.calls_s == 49_000 / 5 + 49_000 / 20 + 490
    assert made.kept == 490 * 3600
    assert round(made.replica_mb) == round(40 + 98 + 490 * 3600 * (1000 + plan.KEPT_BYTES) / 1e6 / 10)


def test_the_fleet_beats_as_fast_as_the_agents_that_were_measured() -> None:
    assert Fleet().heartbeat_s == sizing.INTERVAL_S


def test_the_page_keeps_what_stands_around_the_plan() -> None:
    once = plan.page(f"before\n{plan.BEGIN}\nold\n{plan.END}\nafter\n", plan.text(MEASURED, Fleet()))
    assert once.startswith(f"before\n{plan.BEGIN}\n")
    assert once.endswith(f"{plan.END}\nafter\n")
    assert "old" not in once
    assert "| replicas |" in once
    assert plan.page(once, plan.text(MEASURED, Fleet())) == once


def test_the_page_is_what_the_measurements_make_of_it() -> None:
    before = plan.PAGE.read_text()
    made = plan.text(json.loads(plan.MEASURED.read_text()), Fleet()) if plan.MEASURED.exists() else []
    assert plan.page(before, made) == before, "python -m bench.plan"


@pytest.mark.needs("nats-server")
async def test_a_commands_life_takes_as_much_of_nats_as_the_plan_says(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    with running(server):
        async with DevController(["demo"]) as controller:
            config = {
                "upstream": {"url": controller.url, "token": "demo"},
                "store": {"url": server.url, "replicas": 1},
                "poll": {"hold": 10},
            }
            async with Shim(tmp_path, config) as shim, asyncio.TaskGroup() as group:
                await shim.start()
                agent = Agent(shim.url, Clock())
                life = group.create_task(agent.legacy.run())
                async with control_client(controller.url) as control:
                    await agent.event(What.REGISTER)
                    await commands(control, agent, 1)
                    writes, kept = await stored(server.url)
                    await commands(control, agent, COMMANDS)
                    more_writes, more_kept = await stored(server.url)
                life.cancel()
    # Two thirds and a third: how many share a commit is chance, and the last ones are not at their end yet.
    assert plan.WRITES_PER_COMMAND * 2 / 3 < (more_writes - writes) / COMMANDS <= plan.WRITES_PER_COMMAND * 4 / 3
    assert plan.KEPT_BYTES * 2 / 3 < (more_kept - kept) / COMMANDS <= plan.KEPT_BYTES * 4 / 3


async def commands(control: ControlClient, agent: Agent, number: int) -> None:
    """So many commands, one after the other, to their results."""
    watch = Watch(control)
    for _ in range(number):
        sent = await watch.control.push({"type": "x", "cluster_id": agent.legacy.cluster_id})
        await watch.event("received", 0, type="command_result", command_id=sent["id"])


async def stored(url: str) -> tuple[int, int]:
    """Messages that were ever stored, and the bytes that are kept, the journal left out of these: it is shortened."""
    found = await asyncio.to_thread(natsd.streams, url)
    kept = sum(info.state.bytes for name, info in found.items() if not name.endswith("-journal"))
    return sum(info.state.last_seq for info in found.values()), kept
