"""How the page looks after a busy hour, which virtual time makes: on a phone, in the dark, to those who cannot see it.

With AGENT_SHIM_PICTURE=FILE.png the picture of the README is taken anew.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Page, expect

from shim.admin.static_files import CONTENT_SECURITY_POLICY, FILES, StaticFiles
from shim.admin.status import ProcessInfo, StatusBuilder
from shim.admin.subject import Subject
from shim.admin.time_series import Sampler
from shim.core.records import Operation, StoreContents, StoreOperation
from shim.ports import CommandStore, StoreDone
from tests.browser.conftest import OpenTab
from tests.support.virtual import run_virtual
from tests.support.world import Agent, World, settings

pytestmark = [
    pytest.mark.needs("chromium", "npm:axe-core"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

_Result = TypeVar("_Result")


AXE = Path(__file__).parents[1] / "clients" / "node_modules" / "axe-core" / "axe.min.js"
PICTURE = os.environ.get("AGENT_SHIM_PICTURE")


class Disk:
    """A store that takes its time, some milliseconds as disks do."""

    def __init__(self, store: CommandStore) -> None:
        self._store = store
        self._random = Random(1)
        self._free_at_s = 0.0

    def open(self) -> StoreContents:
        return self._store.open()

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        self._free_at_s = max(self._free_at_s, loop.time()) + self._random.lognormvariate(-5.6, 0.7)

        def finished(outcome: Any) -> None:
            loop.call_at(self._free_at_s, done or (lambda _: None), outcome)

        self._store.submit(operation, *also, done=finished)

    def close(self) -> None:
        self._store.close()


async def loop(agent: Agent, poll_s: float) -> None:
    """An agent's life: two loops, commands answered at once."""
    await agent.register()

    async def polls() -> None:
        while True:
            started = agent.world.now
            for command_id in await agent.poll():
                await agent.result(command_id)
            await asyncio.sleep(max(0.001, poll_s - (agent.world.now - started)))

    async with asyncio.TaskGroup() as group:
        if poll_s:
            group.create_task(polls())
        while True:
            await agent.heartbeat(status="healthy")
            await asyncio.sleep(5)


async def orders(world: World, agents: list[Agent]) -> None:
    """The controller's commands: now and then one, sometimes a handful."""
    random, numbers = Random(7), count(4100)
    await world.pass_s(20)
    while True:
        for _ in range(random.choice((1, 1, 1, 2, 7))):
            agent = random.choice(agents)
            if list(world.controller.open_sockets()):
                target = {"agent_id": agent.agent_id} if agent.dialect == "agents" else {"cluster_id": agent.cluster_id}
                kind = random.choice(("deploy", "exec", "scan", "restart"))
                world.controller.push(f"cmd-{next(numbers)}", type=kind, payload={}, **target)
        await asyncio.sleep(random.uniform(8, 45))


async def an_hour() -> dict[str, Any]:
    world = World(settings(poll={"hold": "auto"}, sunset={"at": "2026-12-24", "deprecation_at": "2026-11-24"})).start()
    world.bridge.ctx.store = Disk(world.bridge.ctx.store)
    sampler = Sampler(Subject.of(world.bridge))
    sampler.start()
    facts = ProcessInfo("0.1.0", world.clock.wall_s(), {"listen": "127.0.0.1:7080"}, token_required=False)
    agents = [
        world.agent(name="prod-eu", agent_id="pod-7f9c", dialect="clusters_agent"),
        world.agent(name="prod-us", agent_id="pod-2b41", dialect="clusters_agent"),
        world.agent(name="staging", agent_id="agent-staging-1", dialect="agents"),
        world.agent(name="edge-lab", agent_id="edge-lab-agent", dialect="clusters"),
    ]
    living = [asyncio.create_task(loop(agent, poll_s)) for agent, poll_s in zip(agents, (5, 5, 5, 0), strict=True)]
    ordering = asyncio.create_task(orders(world, agents[:3]))
    await world.pass_s(1700)
    world.controller.go_away()
    await world.pass_s(75)
    world.controller.come_back()
    await world.pass_s(900)
    world.controller.go_away()
    await world.pass_s(4)
    world.controller.come_back()
    await world.pass_s(921)
    ordering.cancel()
    await world.pass_s(41)
    status = StatusBuilder(Subject.of(world.bridge), sampler, world.bridge.ctx.recent_commands, facts).take([])
    for each in living:
        each.cancel()
    sampler.stop()
    await world.stop()
    return {**status, "series": sampler.last()}


class Still:
    """The page with one moment on it."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._series = msgspec.json.encode(status["series"])
        self._status = msgspec.json.encode({key: value for key, value in status.items() if key != "series"})

    async def events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"event: series\ndata: %b\n\nevent: status\ndata: %b\n\n" % (self._series, self._status))
        await asyncio.Event().wait()
        return response


@pytest.fixture(scope="module")
def hour() -> dict[str, Any]:
    return run_virtual(an_hour())


@pytest_asyncio.fixture(loop_scope="module")
async def url(hour: dict[str, Any]) -> AsyncIterator[str]:
    app = web.Application()
    for path in FILES:
        app.router.add_get(path, StaticFiles(token_required=False).serve)
    app.router.add_get("/events", Still(hour).events)

    async def bounds(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY

    app.on_response_prepare.append(bounds)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def painted(page: Page, place: str) -> int:
    """How many pixels of a plot are neither empty nor grey."""
    pixels = await page.evaluate(
        """(place) => {
            const canvas = document.querySelector(place + " canvas");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let coloured = 0;
            for (let at = 0; at < data.length; at += 4) {
                const [red, green, blue, alpha] = data.slice(at, at + 4);
                if (alpha > 128 && Math.max(red, green, blue) - Math.min(red, green, blue) > 60) coloured += 1;
            }
            return coloured;
        }""",
        place,
    )
    assert isinstance(pixels, int)
    return pixels


async def violations(page: Page) -> list[str]:
    """What axe finds, as `rule: where`."""
    await page.evaluate(AXE.read_text())
    found = await page.evaluate("async () => (await axe.run()).violations")
    return [f"{each['id']}: {node['target']} {node['any'][:1]}" for each in found for node in each["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_busy_hour_on_a_desk(scheme: str, url: str, open_tab: OpenTab) -> None:
    tab = await open_tab(url, viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    page = tab.page
    await expect(page.locator("#sentence")).to_contain_text("All is well: the controller is connected, 4 agents alive.")
    await expect(page.locator("#timeline")).to_contain_text("2 interruptions")
    await expect(page.locator("#timeline rect.down")).to_have_count(2)
    await expect(page.locator("#agents tbody tr")).to_have_count(4)
    await expect(page.locator("#latency .u-legend")).to_contain_text("ms")
    assert await painted(page, "#latency") > 300
    assert await painted(page, "#depth") > 300
    background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 3 * 128
    assert dark is (scheme == "dark")
    assert await violations(page) == []
    assert tab.complaints == []
    if PICTURE and scheme == "light":
        await page.set_viewport_size({"width": 1200, "height": 1080})
        await page.screenshot(path=PICTURE, animations="disabled")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_busy_hour_on_a_phone(scheme: str, url: str, open_tab: OpenTab) -> None:
    tab = await open_tab(url, viewport={"width": 375, "height": 812}, color_scheme=scheme, has_touch=True)
    page = tab.page
    await expect(page.locator("#agents tbody tr")).to_have_count(4)
    assert await page.evaluate("document.documentElement.scrollWidth") == 375
    too_wide = await page.evaluate(
        "[...document.querySelectorAll('main *')].filter((node) => node.getBoundingClientRect().right > 376"
        " && !node.closest('.hidden, thead')).map((node) => node.outerHTML.slice(0, 80))"
    )
    assert too_wide == []
    # the sentence and the figures are there without scrolling
    box = await page.locator("#tiles").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 812
    assert await violations(page) == []
    assert tab.complaints == []


async def test_the_plots_follow_the_window_and_the_colour_scheme(url: str, open_tab: OpenTab) -> None:
    page = (await open_tab(url, viewport={"width": 1200, "height": 900})).page
    await expect(page.locator("#latency canvas")).to_have_count(1)
    for width in (600, 1000):
        await page.set_viewport_size({"width": width, "height": 900})
        await page.wait_for_function(
            "() => { const [plot, place] = ['#latency .uplot', '#latency'].map((name) => document.querySelector(name));"
            " return plot.clientWidth === place.clientWidth; }"
        )
    await page.emulate_media(color_scheme="dark")
    await expect(page.locator("#latency canvas")).to_have_count(1)
    assert await painted(page, "#latency") > 100
