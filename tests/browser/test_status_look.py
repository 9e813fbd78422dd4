"""How the page looks after a busy hour, which virtual time makes: on a phone, in the dark, to those who cannot see it.

`make picture` takes the picture of the README anew, by AGENT_SHIM_PICTURE=FILE.png.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Page, expect

from shim.admin.server import CONTENT_SECURITY_POLICY, FILES, read_file
from shim.core.call_records import FallbackCall, Why
from shim.core.records import Operation, SessionKey, StoreContents, StoreOperation
from shim.management.recent_events import RecentEvents
from shim.management.status_builder import StatusBuilder
from shim.management.subject import Subject
from shim.ports import CommandStore, StoreDone
from shim.redaction import Redaction
from tests.browser.conftest import OpenTab
from tests.support.virtual import run_virtual
from tests.support.world import Agent, World, settings

pytestmark = [
    pytest.mark.needs("chromium", "npm:axe-core"),
    pytest.mark.timeout(400),
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
    replies = agent.world.bridge.ctx.metrics.requests
    await agent.register()

    async def polls() -> None:
        while True:
            started = agent.world.now
            for command_id in await agent.poll():
                await agent.result(command_id)
            replies.count(None, 200, 0.0)
            await asyncio.sleep(max(0.001, poll_s - (agent.world.now - started)))

    async with asyncio.TaskGroup() as group:
        if poll_s:
            group.create_task(polls())
        while True:
            await agent.heartbeat(status="healthy")
            replies.count(None, 204, 0.0)
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


class Watched:
    """A world with what its status page shows."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.bridge.ctx.store = Disk(world.bridge.ctx.store)
        self._events = RecentEvents(world.clock, Redaction())
        self._builder = StatusBuilder(Subject.of(world.bridge), {"listen": "127.0.0.1:7080"}, self._events)
        self._sampler = self._builder.sampler
        self._tasks: list[asyncio.Task[None]] = []
        logging.getLogger("shim").setLevel("INFO")
        self._sampler.start()
        self._events.start()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._tasks.append(asyncio.create_task(work))
        return self._tasks[-1]

    async def end(self) -> dict[str, Any]:
        """Return the last status, and stop everything."""
        status = {**msgspec.to_builtins(self._builder.take([])), "series": self._sampler.last()}
        for task in self._tasks:
            task.cancel()
        self._sampler.stop()
        self._events.stop()
        await self.world.stop()
        return status


async def an_hour() -> dict[str, Any]:
    world = World(settings(poll={"hold": "auto"}, sunset={"at": "2026-12-24", "deprecation_at": "2026-11-24"})).start()
    watched = Watched(world)
    agents = [
        world.agent(name="prod-eu", agent_id="pod-7f9c", dialect="clusters_agent"),
        world.agent(name="prod-us", agent_id="pod-2b41", dialect="clusters_agent"),
        world.agent(name="staging", agent_id="agent-staging-1", dialect="agents"),
        world.agent(name="edge-lab", agent_id="edge-lab-agent", dialect="clusters"),
    ]
    for agent, poll_s in zip(agents, (5, 5, 5, 0), strict=True):
        watched.spawn(loop(agent, poll_s))
    ordering = watched.spawn(orders(world, agents[:3]))
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
    return await watched.end()


async def a_fleet() -> dict[str, Any]:
    """31 agents after 12 minutes: most are well, two are silent, three go by HTTP, one does not fetch its commands."""
    world = World(settings(mode="auto", poll={"hold": "auto"}, rollout={"percent": 90})).start()
    watched = Watched(world)
    dialects = ("clusters_agent", "agents", "clusters")
    agents = [
        world.agent(name=f"cluster-{number:02}-eu-west", agent_id=f"agent-{number:02}", dialect=dialects[number % 3])
        for number in range(28)
    ]
    lives = []
    for number, agent in enumerate(agents):
        lives.append(watched.spawn(loop(agent, 0 if number == 3 else 5)))
        await world.pass_s(1)
    ordering = watched.spawn(orders(world, agents[:12]))
    await world.pass_s(400)
    world.controller.go_away()
    await world.pass_s(20)
    world.controller.come_back()
    for life in lives[:2]:
        life.cancel()
    await world.pass_s(250)
    ordering.cancel()
    for name, why, status in (("edge-1", Why.ROLLOUT, 200), ("edge-2", Why.ROLLOUT, 200), ("edge-3", Why.ROLLOUT, 503)):
        call = FallbackCall(world.clock.wall_s(), "heartbeat", status, "", "agents", name, why)
        world.bridge.ctx.fallback.add(call, SessionKey("owner", "agent", f"agent-{name}"))
    await world.pass_s(25)
    return await watched.end()


class Still:
    """The page with one moment on it."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._series = msgspec.json.encode(status["series"])
        self._status = msgspec.json.encode({key: value for key, value in status.items() if key != "series"})

    async def events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"event: series\ndata: %b\n\n" % self._series)
        while True:  # the page dims what it shows when the shim is silent for ten seconds
            await response.write(b"event: status\ndata: %b\n\n" % self._status)
            await asyncio.sleep(1)


@pytest.fixture(scope="module")
def hour() -> dict[str, Any]:
    return run_virtual(an_hour())


@pytest.fixture(scope="module")
def fleet() -> dict[str, Any]:
    return run_virtual(a_fleet())


@asynccontextmanager
async def serve(status: dict[str, Any]) -> AsyncIterator[str]:
    """Serve the page with this status; yield its address."""

    async def file(request: web.Request) -> web.Response:
        return web.Response(body=read_file(request.path), content_type=FILES[request.path][1], charset="utf-8")

    app = web.Application()
    for path in FILES:
        app.router.add_get(path, file)
    app.router.add_get("/events", Still(status).events)

    async def bounds(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY

    app.on_response_prepare.append(bounds)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest_asyncio.fixture(loop_scope="module")
async def url(hour: dict[str, Any]) -> AsyncIterator[str]:
    async with serve(hour) as address:
        yield address


@pytest_asyncio.fixture(loop_scope="module")
async def fleet_url(fleet: dict[str, Any]) -> AsyncIterator[str]:
    async with serve(fleet) as address:
        yield address


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


DESK = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


async def height_of(page: Page) -> int:
    height = await page.evaluate("document.documentElement.scrollHeight")
    assert isinstance(height, int)
    return height


async def too_wide(page: Page, width: int) -> list[str]:
    """The elements that reach over the right edge."""
    found: list[str] = await page.evaluate(
        """(width) => [...document.querySelectorAll("main *")]
            .filter((node) => node.getBoundingClientRect().right > width + 1 && !node.closest(".hidden, thead"))
            .map((node) => node.outerHTML.slice(0, 80))""",
        width,
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_busy_hour_on_a_desk(scheme: str, url: str, open_tab: OpenTab) -> None:
    tab = await open_tab(url, viewport=DESK, color_scheme=scheme)
    page = tab.page
    await expect(page.locator("#sentence")).to_contain_text("All is well: the controller is connected, 4 agents alive.")
    await expect(page.locator("#timeline-summary")).to_have_text(re.compile("last hour: connected .* 2 interruptions"))
    await expect(page.locator(".keys")).to_have_text("connected away or token refused not needed")
    await expect(page.locator("#timeline rect.down")).to_have_count(2)
    await expect(page.locator("#agents tbody tr")).to_have_count(4)
    await expect(page.locator("#latency .u-legend")).to_contain_text("ms")
    assert await painted(page, "#latency") > 300
    assert await painted(page, "#depth") > 300
    assert await painted(page, "#calls") > 300
    background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 3 * 128
    assert dark is (scheme == "dark")
    assert await violations(page) == []
    assert tab.complaints == []
    if PICTURE and scheme == "light":
        await page.set_viewport_size({"width": 1280, "height": await height_of(page)})
        await page.screenshot(path=PICTURE, animations="disabled")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_busy_hour_on_a_phone(scheme: str, url: str, open_tab: OpenTab) -> None:
    tab = await open_tab(url, viewport=PHONE, color_scheme=scheme, has_touch=True)
    page = tab.page
    await expect(page.locator("#agents tbody tr")).to_have_count(4)
    assert await page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert await too_wide(page, PHONE["width"]) == []
    # the sentence and the figures are there without scrolling
    box = await page.locator("#tiles").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < PHONE["height"]
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


@pytest.mark.parametrize("viewport, screens", [(DESK, 2), (PHONE, 5)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_31_agents_in_trouble_take_few_screens(
    scheme: str, viewport: dict[str, int], screens: int, fleet_url: str, open_tab: OpenTab
) -> None:
    tab = await open_tab(fleet_url, viewport=viewport, color_scheme=scheme)
    page = tab.page
    await expect(page.locator("#agents tbody tr")).to_have_count(10)
    await expect(page.locator("#latency canvas")).to_have_count(1)
    assert await height_of(page) <= screens * viewport["height"]
    assert await page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    assert await too_wide(page, viewport["width"]) == []
    assert await violations(page) == []
    assert tab.complaints == []


async def test_the_objectives_and_the_rollout_can_be_read(fleet_url: str, open_tab: OpenTab) -> None:
    page = (await open_tab(fleet_url, viewport=DESK)).page
    objectives = page.locator("#objectives > div")
    await expect(objectives).to_have_count(4)
    await expect(objectives.nth(1)).to_contain_text("Reconnection< 10 s for 95 %")
    await expect(objectives.nth(1)).to_contain_text("✓ 100 % met1 reconnect")
    await expect(objectives.nth(2).locator("[data-level]")).to_have_attribute("data-level", "good")
    await expect(page.locator("#tiles > div").first).to_have_text(
        re.compile("Mode and rolloutautoWebSocket now, \\d+ of 31 in the 90 %")
    )


async def test_an_objective_that_is_missed_is_marked(url: str, open_tab: OpenTab) -> None:
    page = (await open_tab(url, viewport=DESK)).page
    missed = page.locator("#objectives [data-level=bad]")
    await expect(missed).to_have_count(1)
    await expect(missed).to_contain_text(re.compile("✕ 98\\.\\d+ % missed[0-9,]+ heartbeats"))


async def test_the_time_axis_fits_the_uptime(url: str, fleet_url: str, open_tab: OpenTab) -> None:
    young, old = [(await open_tab(each, viewport=DESK)).page for each in (fleet_url, url)]
    await expect(young.locator(".axis span")).to_have_text(["15 min ago", "10", "5", "now"])
    await expect(old.locator(".axis span")).to_have_text(["60 min ago", "45", "30", "15", "now"])


async def test_agents_are_filtered_and_all_can_be_shown(fleet_url: str, open_tab: OpenTab) -> None:
    page = (await open_tab(fleet_url, viewport=DESK)).page
    rows = page.locator("#agents tbody tr")
    await expect(rows).to_have_count(10)
    # those in trouble come first, then the newest
    await expect(rows.nth(0)).to_contain_text("does not poll")
    await expect(rows.nth(3)).to_contain_text("by HTTP")
    await expect(rows.nth(4)).to_contain_text("cluster-27-eu-west")
    await page.get_by_role("button", name="Show all 31").click()
    await expect(rows).to_have_count(31)
    await page.get_by_role("button", name="Show 10").click()
    await expect(rows).to_have_count(10)
    field = page.get_by_label("Filter the agents by name, id or state")
    await field.fill("by http")
    await expect(rows).to_have_count(3)
    await expect(page.locator("#agents")).to_contain_text(re.compile("outside 90 %, hash \\d"))
    await field.fill("cluster-05")
    await expect(rows).to_have_count(1)
    await field.fill("nobody")
    await expect(page.locator("#agents")).to_have_text("No agent matches.")
    await field.fill("")
    await expect(rows).to_have_count(10)


async def test_names_stand_beside_ids(fleet_url: str, open_tab: OpenTab) -> None:
    page = (await open_tab(fleet_url, viewport=DESK)).page
    await expect(page.locator("#waiting tbody tr").first).to_contain_text("cluster-03-eu-westc-4")
    await expect(page.locator("#events")).to_contain_text(re.compile(r"session c-\d+ \(cluster-\d+-eu-west\)"))


async def test_the_headline_is_read_aloud_once(fleet_url: str, open_tab: OpenTab) -> None:
    page = (await open_tab("about:blank", viewport=DESK)).page
    await page.add_init_script(
        """addEventListener("DOMContentLoaded", () => {
            window.said = [];
            const announce = document.getElementById("announce");
            new MutationObserver(() => window.said.push(announce.textContent)).observe(announce, {childList: true});
            let shown = 0;  // each status sets the level
            window.several = new Promise((resolve) => new MutationObserver(() => ++shown === 4 && resolve())
                .observe(document.getElementById("overall"), {attributes: true}));
        })"""
    )
    await page.goto(fleet_url)
    await page.evaluate("window.several")
    assert len(await page.evaluate("window.said")) == 1


async def test_a_problem_says_what_to_do_and_where_to_look(fleet_url: str, open_tab: OpenTab) -> None:
    context = {"viewport": DESK, "permissions": ["clipboard-read", "clipboard-write"]}
    page = (await open_tab(fleet_url, **context)).page
    problems = page.locator("#problems")
    await problems.get_by_role("button", name="Copy agent-shim forget AGENT").click()
    await expect(page.locator("#announce")).to_have_text("Copied agent-shim forget AGENT")
    assert await page.evaluate("navigator.clipboard.readText()") == "agent-shim forget AGENT"
    await problems.get_by_role("link", name="See the commands").click()
    await expect(page.locator("#commands-title")).to_be_focused()
