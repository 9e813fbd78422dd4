"""The status page of a real shim in a real browser: what a person sees, finds, and does with a keyboard."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Page, expect

from tests.browser.conftest import OpenTab
from tests.support.processes import Controller, Shim, free_port, world

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

BASE = "/api/v1/clusters/agent"
ADMIN_TOKEN = "the-admin-token-of-this-test"


@pytest_asyncio.fixture(loop_scope="module")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


class Agent:
    """A legacy agent of the shim."""

    def __init__(self, http: aiohttp.ClientSession, shim: Shim) -> None:
        self._http = http
        self._shim = shim
        self.cluster_id = ""

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        async with self._http.request(method, self._shim.url + path, json=body) as response:
            assert response.status < 300, await response.text()
            return await response.json(content_type=None)

    async def register(self, name: str = "prod-cluster") -> Agent:
        answer = await self.call("POST", f"{BASE}/register", {"agent_id": "agent-1", "name": name})
        self.cluster_id = answer["cluster_id"]
        await self.beat()
        return self

    async def beat(self) -> None:
        await self.call("POST", f"{BASE}/{self.cluster_id}/heartbeat", {"agent_id": "agent-1", "status": "healthy"})

    async def fetch(self) -> list[str]:
        answer = await self.call("GET", f"{BASE}/{self.cluster_id}/poll")
        return [command["id"] for command in answer["commands"]]

    async def result(self, command_id: str) -> None:
        body = {"success": True, "output": "in-the-output"}
        await self.call("POST", f"{BASE}/{self.cluster_id}/commands/{command_id}/result", body)


async def answered(agent: Agent, controller: Controller, *commands: str) -> None:
    """These commands arrive, are fetched and answered."""
    for command_id in commands:
        await controller.api.push({"id": command_id, "cluster_id": agent.cluster_id, "type": "exec"})
    fetched: list[str] = []
    while len(fetched) < len(commands):
        fetched += await agent.fetch()
    for command_id in fetched:
        await agent.result(command_id)


FAST = {"poll": {"hold": "off"}, "upstream": {"heartbeat_interval_s": 2.0}}


def sentence(page: Page) -> Any:
    return page.locator("#sentence")


async def test_it_shows_a_link_going_down_and_up(
    tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        agent = await Agent(http, shim).register()
        tab = await open_tab(shim.admin)
        page = tab.page
        await expect(sentence(page)).to_have_text("All is well: the controller is connected, 1 agent alive.")
        await expect(page.locator("#overall")).to_have_attribute("data-level", "good")
        await expect(page.locator("#live")).to_have_text("live")
        assert await page.title() == "✓ agent-shim"

        await page.evaluate(
            """window.said = [];
            new MutationObserver(() => window.said.push(document.getElementById("sentence").textContent))
                .observe(document.getElementById("sentence"), {childList: true})"""
        )
        await controller.kill()
        await expect(sentence(page)).to_have_text(re.compile(r"No connection to the controller for \d+ s"))
        # It stands there for ten seconds only.
        assert any("Connecting to the controller" in text for text in await page.evaluate("window.said"))
        await expect(page.locator("#tiles")).to_contain_text("away")
        await expect(page.locator("#overall")).to_have_attribute("data-level", "bad")
        assert await page.title() == "✕ agent-shim"
        await expect(page.locator("#announce")).to_have_text(re.compile("No connection to the controller"))

        await controller.start()
        await agent.beat()
        await expect(sentence(page)).to_have_text("All is well: the controller is connected, 1 agent alive.")
        timeline = page.locator("#timeline")
        await expect(page.locator("#timeline-summary")).to_contain_text("1 interruption")
        await expect(timeline.locator("rect.down")).to_have_count(1)
        await timeline.get_by_text("When it was away").click()
        await expect(timeline.locator("details li")).to_have_text(
            re.compile(r"for \d+ (s|min) · (connection lost|closed|tcp)")
        )
        assert tab.complaints == []
        assert tab.hosts() == {shim.admin.removeprefix("http://")}


async def test_it_finds_a_command(tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        agent = await Agent(http, shim).register()
        await answered(agent, controller, "build-1", "build-2")
        tab = await open_tab(shim.admin)
        page = tab.page
        trace = page.locator("#trace")
        recent = page.locator("#recent")
        await expect(recent).to_contain_text("build-1")
        await recent.get_by_role("link", name="build-2").click()
        await expect(trace.locator("strong")).to_have_text("build-2")
        await agent.beat()
        await page.get_by_label("Find a command by its id").fill("build-1")
        await page.keyboard.press("Enter")
        await expect(trace.locator("strong")).to_have_text("build-1")
        steps = trace.locator("ol li")
        await expect(steps.nth(0)).to_contain_text("arrived")
        await expect(steps.nth(1)).to_contain_text("offered to the agent")
        await expect(trace.get_by_text("the agent answered")).to_be_visible()
        await expect(trace.locator("dl")).to_contain_text(f"prod-cluster ({agent.cluster_id})")
        assert "in-the-output" not in await page.content()
        # the address is the command's: it can be sent to somebody
        again = await open_tab(page.url)
        await expect(again.page.locator("#trace strong")).to_have_text("build-1")
        await page.go_back()
        await expect(trace.locator("strong")).to_have_text("build-2")
        assert tab.complaints == again.complaints == []
        await page.get_by_label("Find a command by its id").fill("no such command")
        await page.get_by_role("button", name="Show its trace").click()
        await expect(trace).to_contain_text("no command with this id is known")


async def test_a_command_that_waits_says_what_can_be_done(
    tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        agent = await Agent(http, shim).register()
        await controller.api.push({"id": "build-3", "cluster_id": agent.cluster_id, "type": "exec"})
        tab = await open_tab(shim.admin)
        page = tab.page
        waiting = page.locator("#waiting")
        await expect(waiting).to_contain_text("build-3")
        await expect(page.locator("#agents")).to_contain_text("1 waiting")
        await waiting.get_by_role("link", name="build-3").click()
        await expect(page.locator("#trace")).to_contain_text("agent-shim purge build-3")
        # in a day, which a time alone would not tell
        await expect(page.locator("#trace")).to_contain_text(re.compile(r"Expires\d\d/\d\d/\d{4}, \d\d:\d\d:\d\d"))
        assert await agent.fetch() == ["build-3"]
        await expect(waiting).to_contain_text("offered")
        await agent.beat()
        await expect(waiting).to_be_empty()
        # an open trace follows its command
        await expect(page.locator("#trace")).to_contain_text("the agent has it")
        assert tab.complaints == []


async def test_the_migration_panel_tells_who_calls_what(
    tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab
) -> None:
    config = {**FAST, "sunset": {"at": "2999-01-01"}}
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        await Agent(http, shim).register()
        page = (await open_tab(shim.admin)).page
        await expect(page.locator("#removable")).to_contain_text(
            "The shim is still needed1 agent called in the last 24 h"
        )
        routes = page.locator("#routes")
        await expect(routes).to_contain_text("POST /api/v1/clusters/agent/{cluster_id}/heartbeat")
        await expect(page.locator("#users")).to_contain_text("prod-cluster")
        await expect(page.locator("#sunset")).to_have_text("legacy API ends 1 January 2999")


@pytest.mark.parametrize(
    "fields, is_set",
    [({"mode": "http"}, "mode http"), ({"mode": "auto", "rollout": {"percent": 25}}, "mode auto, rollout 25 %")],
)
async def test_after_the_sunset_the_tile_says_what_is_in_force_and_what_is_set(
    tmp_path: Path, open_tab: OpenTab, fields: dict[str, Any], is_set: str
) -> None:
    async with world(tmp_path, {**FAST, **fields, "sunset": {"at": "2001-01-01"}}) as (shim, _):
        await shim.start()
        page = (await open_tab(shim.admin)).page
        await expect(page.locator("#tiles")).to_contain_text(
            f"Mode and rolloutWebSocketbecause sunset.at has passed; set: {is_set}"
        )


async def test_names_are_text_whatever_is_in_them(
    tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab
) -> None:
    hostile = "<img src=x onerror=alert(1)>\"'</script>"
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        agent = await Agent(http, shim).register(hostile)
        await controller.api.push({"id": "<b>1", "cluster_id": agent.cluster_id, "type": "<i>exec</i>"})
        tab = await open_tab(shim.admin)
        page = tab.page
        await expect(page.locator("#agents")).to_contain_text(hostile)
        await expect(page.locator("#waiting")).to_contain_text("<i>exec</i>")
        await page.locator("#waiting").get_by_role("link", name="<b>1").click()
        await expect(page.locator("#trace")).to_contain_text("agent-shim purge '<b>1' gives it up")
        assert await page.locator("img").count() == 1  # our own
        assert tab.complaints == []


async def test_a_name_without_end_leaves_room_for_the_rest(
    tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab
) -> None:
    async with world(tmp_path, FAST) as (shim, _):
        await shim.start()
        await Agent(http, shim).register("x" * 256)
        page = (await open_tab(shim.admin)).page
        await expect(page.locator("#agents")).to_contain_text("xxx")
        await expect(page.locator("#users")).to_contain_text("xxx")
        assert await page.evaluate("document.body.scrollHeight") < 6000


async def test_with_a_token_it_asks_for_it_and_keeps_it_in_this_tab_only(
    tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab
) -> None:
    (tmp_path / "admin-token").write_text(ADMIN_TOKEN)
    config = {**FAST, "admin": {"port": 0, "token_file": str(tmp_path / "admin-token")}}
    async with world(tmp_path, config) as (shim, controller):
        await shim.start()
        agent = await Agent(http, shim).register()
        await answered(agent, controller, "build-1")
        tab = await open_tab(f"{shim.admin}/#command=build-1")
        page = tab.page
        field = page.get_by_label("Admin token")
        await expect(field).to_be_focused()
        await expect(page.locator("#status")).to_be_hidden()
        assert tab.complaints == []
        await field.fill("wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#login-error")).to_have_text("the admin token is not accepted.")
        await field.fill(ADMIN_TOKEN)
        await page.get_by_role("button", name="Show the status").click()
        await expect(sentence(page)).to_contain_text("All is well")
        await expect(page.locator("#trace strong")).to_have_text("build-1")
        await page.reload()
        await expect(sentence(page)).to_contain_text("All is well")
        kept = await page.evaluate("[JSON.stringify(localStorage), document.cookie]")
        assert kept == ["{}", ""]
        assert ADMIN_TOKEN not in page.url + "".join(tab.asked)
        another = await open_tab(shim.admin)
        await expect(another.page.get_by_label("Admin token")).to_be_visible()


async def test_it_says_when_the_shim_does_not_answer_and_goes_on_when_it_does(
    tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab
) -> None:
    ports = {"admin": {"port": free_port()}, "listen": {"port": free_port()}}
    async with world(tmp_path, {**FAST, **ports}) as (shim, _):
        await shim.start()
        page = (await open_tab(shim.admin)).page
        await expect(page.locator("#live")).to_have_text("live")
        await shim.stop()
        await expect(page.locator("#live")).to_have_text(re.compile("no answer from the shim since"))
        await expect(page.locator("#announce")).to_have_text(re.compile("no answer from the shim since"))
        await shim.start()
        await expect(page.locator("#live")).to_have_text("live")
        await expect(page.locator("#status")).not_to_have_attribute("data-stale", "")


async def test_a_keyboard_is_enough(tmp_path: Path, http: aiohttp.ClientSession, open_tab: OpenTab) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        agent = await Agent(http, shim).register()
        await answered(agent, controller, "build-1")
        page = (await open_tab(shim.admin)).page
        await expect(page.locator("#recent")).to_contain_text("build-1")
        await page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the status")
        await expect(skip).to_be_focused()
        assert (await skip.bounding_box() or {})["y"] >= 0
        await page.keyboard.press("Enter")
        await expect(page.locator("#main")).to_be_focused()
        await page.keyboard.press("/")
        field = page.get_by_label("Find a command by its id")
        await expect(field).to_be_focused()
        await page.keyboard.type("build-1")
        await page.keyboard.press("Enter")
        await expect(page.locator("#trace strong")).to_have_text("build-1")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        close = page.get_by_role("button", name="Close")
        await expect(close).to_be_focused()
        outline = await close.evaluate("(node) => getComputedStyle(node).outlineStyle")
        assert outline == "solid"
        await page.keyboard.press("Enter")
        await expect(page.locator("#trace")).to_be_empty()
        await expect(field).to_be_focused()
        # what is updated every second does not take the focus away
        link = page.locator("#recent").get_by_role("link", name="build-1")
        await link.focus()
        seen = page.locator("#about")
        before = await seen.text_content()
        await expect(seen).not_to_have_text(before or "")
        await expect(link).to_be_focused()
