"""doctor beside a running shim: it reads what that tells, and disturbs nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shim.cli.doctor.report import Finding
from shim.cli.doctor.running_shim import RunningShim, examine
from shim.management.status_builder import StatusBuilder
from shim.management.subject import Subject
from shim.ports import DialFailure
from tests.cli.doctor.conftest import Diagnosis, Doctor
from tests.e2e.test_main_job import living
from tests.support.processes import Controller, Shim, world
from tests.support.virtual import run_virtual
from tests.support.world import World

ROOT = Path(__file__).parents[3]
ADMIN = "canary-token-of-the-admin-port"


def configured(folder: Path, token: str) -> dict[str, Any]:
    admin_token = folder / "admin-token"
    admin_token.write_text(ADMIN)
    return {
        "upstream": {"heartbeat_interval_s": 2.0, "token": token},
        "admin": {"port": 0, "token_file": str(admin_token)},
    }


@asynccontextmanager
async def served(folder: Path, token: str) -> AsyncIterator[tuple[Shim, Controller]]:
    async with world(folder, configured(folder, token), "--token", token) as (shim, controller):
        await shim.start()
        await shim.event("link_state", state="online")
        yield shim, controller


def same(shim: Shim, controller: Controller, token: str) -> dict[str, Any]:
    """The configuration of the running shim, with its real ports."""
    ports = {"listen": {"port": int(shim.url.rsplit(":", 1)[1])}, "admin": {"port": int(shim.admin.rsplit(":", 1)[1])}}
    return {**ports, "upstream": {"url": controller.url, "token": token}}


async def opened(controller: Controller) -> int:
    events, _ = await controller.api.events(0, 0, kind="opened")
    return len(events)


async def test_of_a_shim_past_the_sunset_the_mode_in_force_is_named(doctor: Doctor, tmp_path: Path) -> None:
    token = "canary-token-in-use"
    past = {"mode": "http", "sunset": {"at": "2001-01-01"}}
    async with world(tmp_path, configured(tmp_path, token) | past, "--token", token) as (shim, controller):
        await shim.start()
        here = same(shim, controller, token)
        here["admin"]["token_file"] = str(tmp_path / "admin-token")
        found = await doctor.examine(**here)
        found.expect("shim", "PASS", "by WebSocket because sunset.at has passed (mode http is set)")


async def test_a_running_shim_is_asked_and_not_disturbed(doctor: Doctor, tmp_path: Path) -> None:
    token = "canary-token-in-use"
    async with served(tmp_path, token) as (shim, controller), living(shim, "clusters_agent", token=token):
        await controller.until(type="heartbeat", direction="in")
        here = same(shim, controller, token)
        here["admin"]["token_file"] = str(tmp_path / "admin-token")
        found = await doctor.examine(**here)
        assert found.failing == []
        found.expect("listen", "PASS", "held by the running shim")
        found.expect("admin", "PASS", "held by the running shim")
        found.expect("upgrade", "PASS", "not tried", "--dial")
        found.expect("clock", "PASS", "agrees")
        found.expect("shim", "PASS", "mode websocket", "ready")
        found.expect("link", "PASS", "1 of 1 online")
        found.expect("agents", "PASS", "1 alive of 1")
        found.expect("registrations", "PASS", "accepted")
        assert await opened(controller) == 1

        dialled = await doctor.examine("--dial", **here)
        dialled.expect("token", "PASS", "accepted")
        dialled.expect("link", "PASS", "1 of 1 online")
        assert await opened(controller) == 2
        registers, _ = await controller.api.events(0, 0, type="register", direction="in")
        assert {event["connection"] for event in registers} == {1}, "nothing is registered on doctor's connection"
        assert not shim.events("link_lost")

        here["admin"].pop("token_file")
        closed = await doctor.examine(**here)
        closed.expect("shim", "WARN", "admin token")
        named = await doctor.examine("--url", shim.admin, "--admin-token-file", str(tmp_path / "admin-token"), **here)
        named.expect("shim", "PASS")


async def test_another_process_on_the_admin_port_is_no_shim(doctor: Doctor) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        found = await doctor.examine(admin={"port": port}, upstream={"url": "http://127.0.0.1:9", "token": "canary"})
    found.expect("admin", "FAIL", "taken by another process")
    found.expect("shim", "WARN", "no shim answers", "another program answers")


# --- what a shim in trouble tells, in virtual time --------------------------------------------------------------------


def told(world: World) -> list[Finding]:
    """What is found on a bridge, from the same JSON and metrics that the admin port gives."""
    builder = StatusBuilder(Subject.of(world.bridge), {"listen": "127.0.0.1:7080"})
    builder.started_unix = 0.0
    status = builder.take([])
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(world.registry).decode())
        for sample in family.samples
    }
    return list(examine(RunningShim("127.0.0.1:7090", True, msgspec.to_builtins(status), samples)))


def expect(findings: list[Finding], name: str, status: str, *parts: str) -> None:
    """One of the findings of this name is as wanted."""
    named = [finding for finding in findings if finding.check == name]
    assert any(
        finding.status.value == status and all(part in f"{finding.text} -> {finding.remedy}" for part in parts)
        for finding in named
    ), named or findings


async def started() -> World:
    world = World()
    world.start()
    await world.settle()
    return world


def test_no_agent_yet() -> None:
    async def story() -> None:
        world = await started()
        findings = told(world)
        expect(findings, "health", "WARN", "No agent has called yet", "http://127.0.0.1:7080")
        expect(findings, "link", "PASS")
        expect(findings, "stability", "PASS", "no connection was lost")
        await world.stop()

    run_virtual(story())


def test_agents_that_went_away_that_hang_up_and_that_do_not_fetch() -> None:
    async def story() -> None:
        world = await started()
        quiet, busy = world.agent(name="quiet"), world.agent(agent_id="pod-2", name="busy")
        for agent in (quiet, busy):
            await agent.register()
            await agent.heartbeat()
        world.session(busy.cluster_id).hold.ceiling_s = 9.0
        world.controller.push("k1", type="x", payload={}, cluster_id=busy.cluster_id)
        await busy.live(200)
        findings = told(world)
        expect(findings, "health", "WARN", "1 agent silent: quiet", "pod runs")
        expect(findings, "timeouts", "PASS", "busy 10 s")
        expect(findings, "health", "WARN", "busy", "never fetch")
        expect(findings, "heartbeats", "PASS")
        await world.stop()

    run_virtual(story())


def test_a_link_that_is_down_refused_or_not_heard() -> None:
    async def story() -> None:
        world = await started()
        agent = world.agent()
        await agent.register()
        await agent.live(40)
        for _ in range(5):
            world.controller.socket.lose()
            await agent.live(10)
        world.controller.go_away(DialFailure("tcp"))
        await agent.live(120)
        findings = told(world)
        expect(findings, "health", "FAIL", "No connection", "it cannot be reached", "the lines above")
        expect(findings, "stability", "WARN", "lost 6", "AgentShimFlapping")
        expect(findings, "heartbeats", "WARN", "not acknowledged in time", "AgentShimHeartbeatsNotHeard")
        world.controller.go_away(DialFailure("status", 401))
        await agent.live(30)
        expect(told(world), "health", "FAIL", "refuses the token")
        await world.stop()

    run_virtual(story())


def test_a_registration_that_fails() -> None:
    async def story() -> None:
        world = await started()
        world.controller.manners.registers = False
        task = world.loop.create_task(world.agent().register())
        request = await world.controller.until("register")
        world.controller.socket.says("error", {"error": "name is required"}, request.request_id)
        await task
        findings = told(world)
        expect(findings, "registrations", "WARN", "0 accepted, 1 refused with 400", "register_failed")
        expect(findings, "health", "FAIL", "refuses to register prod (400): name is required")
        await world.stop()

    run_virtual(story())


def test_a_contended_identity() -> None:
    async def story() -> None:
        world = await started()
        agent = world.agent()
        await agent.register()
        for _ in range(4):
            await agent.live(5)
            if list(world.controller.open_sockets()):
                world.controller.socket.lose(by_close_frame=True, code=1000)
                await world.settle()
        expect(told(world), "health", "FAIL", "Another process uses the same identity", "second shim")
        await world.stop()

    run_virtual(story())


def test_the_guides_common_issues_point_to_lines_that_exist() -> None:
    page = (ROOT / "docs" / "how-to" / "diagnose.md").read_text()
    checks = set()
    for path in (ROOT / "shim" / "cli" / "doctor").glob("*.py"):
        checks |= set(re.findall(r'(?:passed|warned|failed|examine_port)\(\s*"([a-z-]+)"', path.read_text()))
    documented = page.split("| line of doctor |")[1].split("\n\n")[0]
    assert {name for row in documented.splitlines() for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])} == checks
    table = page.split("## Common issues of the vendor's migration guide")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| **")]
    guide = ("Connection refused", "Frequent disconnections", "Registration fails", "No heartbeat acknowledgments")
    assert [row.split("**")[1] for row in rows] == list(guide)
    for row in rows:
        lines = set(re.findall(r"`([a-z]+)`", row.split("|")[2]))
        assert lines, row
        assert lines <= checks, row


@pytest.mark.parametrize("code", [0, 1])
def test_a_diagnosis_of_the_tests_themselves_notices_secrets(code: int) -> None:
    with pytest.raises(AssertionError):
        Diagnosis(code, '{"ok": true, "findings": [{"check": "x", "text": "canary"}]}')
