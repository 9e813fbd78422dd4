"""The status as JSON: what it says of links, agents and commands, and what it keeps to itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shim import __version__
from shim.core.call_records import FallbackCall, Why
from shim.core.failover import bucket
from shim.core.records import Operation, PutCommand, SessionKey, WriteProbe
from shim.management import status_builder as status
from shim.management.status_builder import Health
from shim.management.subject import Subject
from shim.ports import Caller
from tests.bridge.conftest import MakeWorld
from tests.management.conftest import MakePage, Page
from tests.support.upstream import REFUSED
from tests.support.world import TOKEN, Agent, World


async def served(world: World, *commands: str, **fields: str) -> Agent:
    """A registered agent for which these commands wait."""
    agent = world.agent(**fields)
    await agent.register()
    await agent.heartbeat()
    for command_id in commands:
        world.controller.push(
            command_id, cluster_id=agent.cluster_id, type="exec", payload={"secret": "in-the-payload"}
        )
    await world.settle()
    return agent


def only(items: list[Any]) -> Any:
    (item,) = items
    return item


# --- links ------------------------------------------------------------------------------------------------------------


async def test_a_link_has_its_phase_since_when_and_the_way_there(page: Page, world: World) -> None:
    await served(world)
    await world.pass_s(30)
    links = page.status()["links"]
    assert (links["total"], links["online"]) == (1, 1)
    link = links["items"][0]
    assert (link["name"], link["phase"], link["reason"]) == ("default", "up", None)
    assert page.status()["now"] - link["since"] == pytest.approx(30, abs=1)


async def test_an_interruption_stays_in_the_timeline_with_its_reason_for_an_hour(page: Page, world: World) -> None:
    agent = await served(world)
    await agent.live(60)
    lost_at = page.status()["now"]
    world.controller.go_away()
    await agent.live(20)
    link = page.status()["links"]["items"][0]
    assert (link["phase"], link["reason"]) == ("down", "tcp")
    world.controller.come_back()
    await agent.live(60)
    segments = page.status()["links"]["items"][0]["timeline"]
    assert [each["phase"] for each in segments][-3:] == ["up", "down", "up"]
    down = segments[-2]
    assert down["reason"] == "connection lost"
    assert down["since"] == pytest.approx(lost_at, abs=1)
    assert 20 <= segments[-1]["since"] - down["since"] < 26
    await agent.live(3700, every_s=20)
    assert [each["phase"] for each in page.status()["links"]["items"][0]["timeline"]] == ["up"]


async def test_a_refused_token_is_its_own_phase(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world()
    page = make_page(world)
    agent = await served(world)
    world.controller.go_away(REFUSED)
    await agent.live(20)
    assert page.status()["links"]["items"][0]["phase"] == "refused"
    assert page.sentence == ("bad", "The controller refuses the token (status 401).")


async def test_links_of_own_tokens_do_not_show_the_whole_owner(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(upstream={"token": ""})
    page = make_page(world)
    assert page.status()["links"]["items"] == []
    await served(world, token="an-agents-own-token")
    link = only(page.status()["links"]["items"])
    assert len(link["name"]) == status.OWNER_CHARS


# --- agents -----------------------------------------------------------------------------------------------------------


async def test_an_agent_is_alive_while_it_calls_and_silent_since_it_stopped(page: Page, world: World) -> None:
    agent = await served(world, name="prod")
    await agent.live(60)
    status = page.status()
    session = only(status["sessions"]["items"])
    assert (session["name"], session["id"], session["dialect"]) == ("prod", agent.cluster_id, "clusters_agent")
    assert (session["fresh"], session["stale_since"]) == (True, None)
    assert session["heartbeat_s"] == pytest.approx(5)
    assert (session["status"], session["tunnel_status"]) == ("healthy", "connected")
    stopped_at = status["now"]
    await world.pass_s(100)
    status = page.status()
    session = only(status["sessions"]["items"])
    assert session["fresh"] is False
    assert session["stale_since"] - stopped_at == pytest.approx(35, abs=6)
    assert (status["sessions"]["fresh"], status["sessions"]["silent"]) == (0, 1)


async def test_an_agent_from_before_the_restart_is_silent_since_it_was_seen(
    make_world: MakeWorld, make_page: MakePage
) -> None:
    world = await make_world()
    await served(world)
    seen_at = world.clock.wall_s()
    await world.pass_s(600)
    await world.restart()
    session = only(make_page(world).status()["sessions"]["items"])
    assert session["stale_since"] == pytest.approx(seen_at, abs=1)
    assert (session["heartbeat_at"], session["poll_at"], session["heartbeat_s"]) == (None, None, None)


async def test_an_agent_that_is_gone_for_days_troubles_nobody(page: Page, world: World) -> None:
    await served(world, name="old")
    await world.pass_s(100)
    world.clock.wall_offset_s += 4 * 86_400
    await served(world, name="new", agent_id="pod-2")
    await world.settle()
    sessions = page.status()["sessions"]
    assert (sessions["total"], sessions["fresh"], sessions["silent"]) == (2, 1, 0)
    assert [each["name"] for each in sessions["items"]] == ["new", "old"]
    assert page.sentence[0] == "good"


async def test_a_held_poll_shows_what_was_learnt(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(poll={"hold": "auto"})
    page = make_page(world)
    agent = await served(world)
    held = agent.poll_task()
    await world.settle()
    session = only(page.status()["sessions"]["items"])
    assert session["polling_now"] is True
    assert session["hold"]["limit_s"] == 4.0
    assert session["hold"]["learnt"] is True
    assert page.status()["commands"]["held_polls"] == 1
    await world.pass_s(0.5)
    held.cancel()
    await world.settle()
    session = only(page.status()["sessions"]["items"])
    assert (session["polling_now"], session["hold"]["ceiling_s"]) == (False, 0.0)


@pytest.mark.parametrize("hold, limit_s", [("off", 0.0), (7, 7.0)])
async def test_a_configured_hold_is_not_called_learnt(
    hold: str | int, limit_s: float, make_world: MakeWorld, make_page: MakePage
) -> None:
    world = await make_world(poll={"hold": hold})
    await served(world)
    shown = only(make_page(world).status()["sessions"]["items"])["hold"]
    assert (shown["limit_s"], shown["learnt"]) == (limit_s, False)


async def test_agents_in_trouble_come_first_and_the_list_is_bounded(page: Page, world: World) -> None:
    await served(world, name="zz-silent")
    await world.pass_s(100)
    agents = [world.agent(agent_id=f"pod-{index}", cluster_id=f"c-{index:03}") for index in range(status.MAX_SESSIONS)]
    for agent in agents:
        await agent.heartbeat()
    sessions = page.status()["sessions"]
    assert (sessions["total"], len(sessions["items"])) == (status.MAX_SESSIONS + 1, status.MAX_SESSIONS)
    assert [each["name"] or each["id"] for each in sessions["items"][:3]] == ["zz-silent", "c-000", "c-001"]


# --- commands ---------------------------------------------------------------------------------------------------------


async def test_waiting_commands_and_an_agent_that_does_not_poll(page: Page, world: World) -> None:
    agent = await served(world, "k1", "k2")
    commands = page.status()["commands"]
    assert (commands["waiting"], commands["offered"], commands["uncertain"]) == (2, 0, 0)
    assert [(each["id"], each["type"], each["state"]) for each in commands["items"]] == [
        ("k1", "exec", "queued"),
        ("k2", "exec", "queued"),
    ]
    assert page.status()["sessions"]["not_polling"] == 0
    await agent.live(61)
    sessions = page.status()["sessions"]
    assert (sessions["not_polling"], sessions["items"][0]["queue"]["not_polling"]) == (1, True)
    assert page.sentence == ("warning", "Commands wait for agents that do not fetch them: prod.")
    await agent.poll()
    assert page.status()["sessions"]["not_polling"] == 0
    commands = page.status()["commands"]
    assert (commands["waiting"], commands["offered"]) == (0, 2)
    assert page.status()["sessions"]["items"][0]["queue"]["offered"] == 2


async def test_a_command_in_doubt_is_told(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(commands={"evidence_s": 5})
    page = make_page(world)
    agent = await served(world, "k1")
    await agent.poll()
    agent.reconnect(clean=False)
    await world.pass_s(6)
    waiting = only(page.status()["commands"]["items"])
    assert (waiting["state"], waiting["attempts"], waiting["reason"]) == ("uncertain", 1, "no evidence")
    assert page.status()["commands"]["uncertain"] == 1
    assert page.sentence[1].startswith("1 command in doubt")


async def test_the_latest_commands_with_their_newest_step(page: Page, world: World) -> None:
    agent = await served(world, "k1", "k2")
    recent = page.status()["commands"]["recent"]
    assert [(each["id"], each["event"], each["type"]) for each in recent] == [
        ("k2", "arrived", "exec"),
        ("k1", "arrived", "exec"),
    ]
    await agent.poll()
    await agent.result("k1")
    await world.settle()
    newest = page.status()["commands"]["recent"][0]
    assert (newest["type"], newest["session"]) == ("exec", agent.cluster_id)
    events = {each["id"]: each["event"] for each in page.status()["commands"]["recent"]}
    assert events == {"k1": "result", "k2": "delivered"}


async def test_results_are_pending_until_the_controller_confirms_them(page: Page, world: World) -> None:
    agent = await served(world, "k1")
    await agent.poll()
    await agent.result("k1")
    await world.settle()
    assert page.status()["commands"]["results"] == 1
    await agent.live(40)
    assert page.status()["commands"]["results"] == 0


# --- the whole --------------------------------------------------------------------------------------------------------


async def test_no_secret_and_no_payload_is_shown(page: Page, world: World) -> None:
    agent = world.agent()
    agent.extra = {"k8s_version": "v1.28.3", "labels": {"password": "a-label"}}
    await agent.register(secret="service-account-token")
    await agent.heartbeat(metadata={"key": "in-the-metadata"})
    world.controller.push("k1", cluster_id=agent.cluster_id, payload={"secret": "in-the-payload"})
    await world.settle()
    await agent.poll()
    await agent.result("k1", output="in-the-output", error="in-the-error")
    await world.settle()
    shown = json.dumps(page.status())
    for secret in (TOKEN, "service-account-token", "in-the-payload", "in-the-output", "in-the-metadata", "a-label"):
        assert secret not in shown
    for secret in ("in-the-error", "never-passed-down"):
        assert secret not in shown


async def test_what_is_configured_is_said_without_paths_and_queries(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(
        upstream={"url": "https://user-less.vendor.test:444/base?token=in-the-query"},
        fallback={"url": "https://old.vendor.test/path"},
    )
    status = make_page(world).status()
    assert (status["upstream"], status["fallback"]) == ("https://user-less.vendor.test:444", "https://old.vendor.test")
    assert (status["version"], status["mode"], status["config_valid"]) == (__version__, "websocket", True)
    assert "in-the-query" not in json.dumps(status)


async def test_a_drain_is_shown(page: Page, world: World) -> None:
    await served(world, "k1")
    world.bridge.admin_actions.drain(30)
    status = page.status("draining")
    assert (status["drain"]["state"], status["drain"]["commands"]) == ("draining", 1)
    assert status["drain"]["deadline_at"] - status["drain"]["since"] == pytest.approx(30)
    assert page.sentence == ("warning", "Draining: 1 command and 0 results left; new commands are refused.")
    await world.pass_s(31)
    assert page.sentence[0] == "bad"


# --- agents that go by the vendor's HTTP API --------------------------------------------------------------------------


def by_http(world: World, ident: str, status: int = 204, name: str = "") -> None:
    """An agent's call went to the vendor's HTTP API because it is outside the rollout."""
    wall = world.clock.wall_s()
    call = FallbackCall(wall, "heartbeat", status, "", "clusters_agent", name or ident, Why.ROLLOUT)
    world.bridge.ctx.fallback.add(call, SessionKey("default", "cluster", ident))


async def test_an_agent_that_goes_by_http_is_that_and_not_silent(page: Page, world: World) -> None:
    agent = await served(world, name="prod")
    await world.pass_s(100)
    assert page.status()["sessions"]["silent"] == 1
    by_http(world, agent.cluster_id, name="prod")
    sessions = page.status()["sessions"]
    assert (sessions["silent"], sessions["fresh"], sessions["by_http"]["rollout"]) == (0, 0, 1)
    http = only(sessions["items"])["http"]
    assert (http["why"], http["status"], http["served"]) == ("rollout", 204, True)
    assert http["hash"] == round(bucket("prod"), 2)
    await world.pass_s(1)
    await agent.heartbeat()  # and it is back
    sessions = page.status()["sessions"]
    assert (sessions["fresh"], sessions["by_http"]["rollout"], only(sessions["items"])["http"]) == (1, 0, None)


async def test_agents_that_only_ever_went_by_http_are_shown_those_that_fail_first(page: Page, world: World) -> None:
    for number in range(status.MAX_SESSIONS + 5):
        by_http(world, f"c-{number:03}")
    by_http(world, "c-zz", status=401, name="failing")
    sessions = page.status()["sessions"]
    assert (sessions["total"], len(sessions["items"])) == (status.MAX_SESSIONS + 6, status.MAX_SESSIONS)
    first = sessions["items"][0]
    assert (first["name"], first["dialect"], first["http"]["status"]) == ("failing", "clusters_agent", 401)
    await world.pass_s(86_400)
    assert page.status()["sessions"]["total"] == 0


async def test_a_session_is_kept_while_its_agent_goes_by_http(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"retain_s": 7200})
    agent = await served(world)
    for _ in range(4):
        await world.pass_s(3600)
        world.bridge.http_fallback.used(Caller(TOKEN, 1), agent.heartbeat_call())
    await world.restart()
    await world.pass_s(700)
    assert world.session(agent.cluster_id).registration["name"] == "prod"


# --- agents in trouble ------------------------------------------------------------------------------------------------


async def test_what_called_once_is_silent_for_a_day_and_a_registered_agent_for_three(page: Page, world: World) -> None:
    await served(world, name="registered")
    await world.agent(cluster_id="never-seen").poll()
    await world.pass_s(100)
    assert page.status()["sessions"]["silent"] == 2
    world.clock.wall_offset_s += 86_400
    assert page.status()["sessions"]["silent"] == 1
    world.clock.wall_offset_s += 2 * 86_400
    assert page.status()["sessions"]["silent"] == 0


async def test_an_agent_that_only_asks_for_tunnels_is_not_registered_until_it_is(page: Page, world: World) -> None:
    lonely = world.agent(agent_id="pod-9")
    await lonely.tunnel_poll()
    assert page.sentence == ("waiting", "1 agent called, not registered yet.")
    for _ in range(8):
        await world.pass_s(5)
        await lonely.tunnel_poll()
    assert page.sentence == ("bad", "Called, not registered: pod-9.")
    await lonely.register()
    await lonely.heartbeat()
    assert page.status()["unregistered"]["total"] == 0
    assert page.sentence[0] == "good"


async def test_an_unknown_agent_is_in_the_sentence_and_in_its_row(page: Page, world: World) -> None:
    agent = world.agent(cluster_id="saved")
    world.controller.manners.acks = False
    await agent.heartbeat()
    await world.settle()
    [beat] = world.controller.got("heartbeat")
    world.controller.socket.says("error", {"error": "cluster not found"}, beat.request_id)
    await world.settle()
    assert page.sentence == ("bad", "The controller does not know saved, and the shim has no name to register with.")
    assert only(page.status()["sessions"]["items"])["trouble"] == "name_unknown"


async def test_secrets_in_the_controllers_texts_are_masked(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world()
    page = make_page(world)
    world.controller.manners.registers = False
    task = world.loop.create_task(world.agent().register())
    request = await world.controller.until("register")
    world.controller.socket.says("error", {"error": "token=abcdef1234 is not good"}, request.request_id)
    await task
    status = page.snapshots.take([])
    text = msgspec.json.encode(status).decode()
    assert "abcdef1234" not in text
    assert "is not good" in status.controller.registrations.items[0]["error"]


# --- readiness --------------------------------------------------------------------------------------------------------


def refusing_beyond(room_bytes: int) -> Callable[[tuple[Operation, ...]], bool]:
    """A disk that has room for this much: it refuses what is larger."""

    def refuses(operations: tuple[Operation, ...]) -> bool:
        commands = sum(each.record.size_bytes for each in operations if isinstance(each, PutCommand))
        return commands + sum(each.size_bytes for each in operations if isinstance(each, WriteProbe)) > room_bytes

    return refuses


@pytest.mark.parametrize("size_bytes", [20_000, 300_000])
async def test_readiness_follows_what_was_refused_until_as_much_can_be_written(world: World, size_bytes: int) -> None:
    agent = await served(world)
    health = Health(Subject.of(world.bridge))
    assert await health.reasons_not_ready() == []
    world.store.failing = refusing_beyond(10_000)
    assert await health.reasons_not_ready() == []
    for number in range(2):
        world.controller.push(f"k{number}", cluster_id=agent.cluster_id, payload={"text": "x" * size_bytes})
        await world.settle()
        for _ in range(3):
            assert await health.reasons_not_ready() == ["the store cannot be written"]
            await world.pass_s(status.STORE_PROBE_S + 1)
        world.store.failing = refusing_beyond(status.MAX_PROBE_BYTES)  # room for most commands
        assert await health.reasons_not_ready() == []
        await world.pass_s(status.STORE_PROBE_S + 1)
        assert await health.reasons_not_ready() == []
        world.store.failing = refusing_beyond(10_000)


async def test_a_refusal_right_after_a_successful_write_is_told_at_once(world: World) -> None:
    agent = await served(world)
    health = Health(Subject.of(world.bridge))
    world.store.failing = refusing_beyond(10_000)
    assert await health.reasons_not_ready() == []
    world.controller.push("k1", cluster_id=agent.cluster_id, payload={"text": "x" * 20_000})
    await world.settle()
    assert await health.reasons_not_ready() == ["the store cannot be written"]
