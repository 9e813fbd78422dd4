"""Calls without an owner, and the way of evidence to whoever made a reply."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg")

from shim.agent_api.internal import Note
from shim.cluster.forwarding import RemoteReceipt
from shim.cluster.router import MAX_RECEIPTS, LocalReceipt, Router
from shim.config.settings import Settings
from shim.core.command_queue import OpenUntil, unknown_open
from shim.core.shards import ClockOffset
from tests.support.replicas import ENDED, WAIT_S, gateway, journal, pair_with_agent


class Carrier:
    """A connection to another replica, and the pool that gets it back."""

    def __init__(self) -> None:
        self.noted: list[Note] = []
        self.open_until: list[float] = []
        self.released = 0

    def notify(self, kind: Note) -> None:
        self.noted.append(kind)

    def notify_open(self, until: float) -> None:
        self.open_until.append(until)

    def release(self, connection: Any) -> None:
        assert connection is self
        self.released += 1


DUE_S = 65.0


def router() -> Router:
    locator: Any = None
    return Router(locator, Settings)


def remote(connection: int) -> tuple[RemoteReceipt, Carrier]:
    carrier: Any = Carrier()
    return RemoteReceipt(carrier, carrier, connection, ClockOffset(), DUE_S), carrier


@pytest.mark.parametrize(
    "end, noted",
    [
        (lambda of: of.next_request(7), Note.NEXT),
        (lambda of: of.connection_closed(7, True), Note.CLOSED_CLEANLY),
        (lambda of: of.connection_closed(7, False), Note.CLOSED),
    ],
)
def test_evidence_of_a_connection_reaches_the_owner_once(end: Any, noted: Note) -> None:
    routing = router()
    receipt, carrier = remote(7)
    other, untouched = remote(8)
    for each in (receipt, other):
        routing.written(each, unknown_open)
    end(routing)
    end(routing)
    assert carrier.noted == [Note.WRITTEN, noted]
    assert carrier.released == 1
    assert untouched.noted == [Note.WRITTEN]


def test_an_owner_learns_on_its_own_clock_until_when_an_agents_connection_was_open() -> None:
    routing = router()
    receipt, carrier = remote(7)
    routing.written(receipt, unknown_open)
    assert routing.connection_open(7, 5.0)  # the clock of the owner is not known yet
    receipt.offset.update(105.0, 5.0)
    for until_s in (5.0, unknown_open()):
        assert routing.connection_open(7, until_s)
    assert carrier.open_until == [105.0]
    assert not routing.connection_open(7, DUE_S), "the offer is uncertain by then, and no report can change that"
    routing.next_request(7)
    assert not routing.connection_open(7, 6.0)


def test_a_reply_that_was_not_written_frees_its_connection() -> None:
    routing = router()
    receipt, carrier = remote(7)
    routing.unwritten(receipt)
    routing.next_request(7)
    assert (carrier.noted, carrier.released) == ([Note.UNWRITTEN], 1)


def test_replies_of_several_owners_may_await_evidence_on_one_connection() -> None:
    routing, seen = router(), []

    class Delivery:
        def written(self, receipt: Any, open_until: OpenUntil) -> None:
            seen.append(("written", receipt))

        def next_request(self, connection: int) -> None:
            seen.append(("next", connection))

    delivery: Any = Delivery()
    receipt, carrier = remote(7)
    routing.written(LocalReceipt(delivery, "offer", 7), unknown_open)
    routing.written(receipt, unknown_open)
    routing.next_request(7)
    assert seen == [("written", "offer"), ("next", 7)]
    assert carrier.noted == [Note.WRITTEN, Note.NEXT]


def test_a_connection_that_never_shows_evidence_keeps_few_receipts() -> None:
    """Each receipt of another replica occupies a connection to it, as long as the agent's connection is open."""
    routing = router()
    receipts = [remote(7) for _ in range(MAX_RECEIPTS + 3)]
    for receipt, _ in receipts:
        routing.written(receipt, unknown_open)
    noted = [carrier.noted for _, carrier in receipts]
    assert noted[:3] == [[Note.WRITTEN, Note.CLOSED]] * 3
    assert noted[3:] == [[Note.WRITTEN]] * MAX_RECEIPTS
    assert [carrier.released for _, carrier in receipts[:4]] == [1, 1, 1, 0]


def test_one_receipt_of_a_local_bridge_stands_for_all_its_offers_on_a_connection() -> None:
    routing, seen = router(), []

    class Delivery:
        def written(self, receipt: Any, open_until: OpenUntil) -> None:
            seen.append(("written", receipt))

        def next_request(self, connection: int) -> None:
            seen.append(("next", connection))

        def connection_open(self, connection: int, until_s: float) -> bool:
            seen.append(("open", until_s))
            return False

    delivery: Any = Delivery()
    for offer in ("a", "b"):
        routing.written(LocalReceipt(delivery, offer, -7), unknown_open)
    assert not routing.connection_open(-7, 12.5)
    routing.next_request(-7)
    assert seen == [("written", "a"), ("written", "b"), ("open", 12.5), ("next", -7)]


# --- on real processes ----------------------------------------------------------------------------------------------


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_mode_http_goes_by_the_owner_whichever_replica_is_asked(tmp_path: Path, pg_url: str) -> None:
    """The development controller has the vendor's HTTP API, too."""
    async with gateway(tmp_path, pg_url) as gate:
        agent, owner, other = await pair_with_agent(gate)
        await gate.push(agent, "c-1")
        await gate.until_state(other, "c-1", "queued")
        for replica in (owner, other):
            replica.write({"mode": "http", "fallback": {"url": gate.controller.url}})
            replica.send(signal.SIGHUP)
            await replica.event("config_reloaded", mode="http")
        assert await agent.heartbeat(other) < 300
        # everything is passed on in this mode, but not what is a note between replicas
        assert (await agent.raw(other, "NOTIFY", "/written"))[0] == 405
        assert await agent.poll(other) == ["c-1"]
        assert await agent.result(other, "c-1") == 1
        await gate.until_state(owner, "c-1", *ENDED)
        results = [each for each in journal(tmp_path) if each.get("type") == "command_result"]
        assert [each["payload"]["command_id"] for each in results] == ["c-1"]
        assert await agent.poll(owner) == []
        # What the vendor's API handed out goes back there.
        path = f"{agent.cluster_id}/commands/unknown/result"
        await agent.call(other, "POST", path, {"success": True})
        results = [each for each in journal(tmp_path) if each.get("type") == "command_result"]
        assert [bool(each["connection"]) for each in results] == [True, False]


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_auto_fails_over_and_back_behind_a_forwarding_replica(tmp_path: Path, pg_url: str) -> None:
    """The link is the owner's, and so is the vendor's HTTP API while the link is away; the agent knows of neither."""
    async with gateway(tmp_path, pg_url, poll={"hold": "off"}) as gate:
        controller = gate.controller
        gate.configure(
            mode="auto",
            fallback={"url": controller.url, "after_s": 0.2, "hold_down_s": 0.2},
            upstream={"url": controller.url, "heartbeat_interval_s": 2.0},
        )
        agent, owner, other = await pair_with_agent(gate)
        await gate.until_online(owner)

        async def beat_until(*ways: str) -> None:
            async with asyncio.timeout(WAIT_S):
                while [event["way"] for event in owner.events("failover")] != [*ways]:
                    assert await agent.heartbeat(other) in (200, 204, 503)

        # The WebSocket goes away, and the vendor's HTTP API stays.
        await controller.control("POST", "/control/faults", {"kind": "refuse", "status": 503})
        await controller.control("POST", "/control/drop", {"how": "abort"})
        await beat_until("http")
        await controller.control("POST", "/control/legacy/commands", {"ident": agent.cluster_id, "id": "by-http"})
        assert await agent.poll_until(other, "by-http") == ["by-http"]
        assert await agent.result(other, "by-http") == 1
        # It comes back, and after a while so do the calls.
        await controller.control("DELETE", "/control/faults")
        await beat_until("http", "websocket")
        await gate.push(agent, "by-link")
        assert await agent.poll_until(other, "by-link") == ["by-link"]
        assert await agent.result(other, "by-link") == 1
        await gate.until_state(other, "by-link", *ENDED)
        results = [each for each in journal(tmp_path) if each.get("type") == "command_result"]
        assert {each["payload"]["command_id"]: bool(each["connection"]) for each in results} == {
            "by-http": False,
            "by-link": True,
        }
        assert not other.events("failover")


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_a_partial_rollout_works_through_any_replica(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        gate.configure(mode="auto", fallback={"url": gate.controller.url}, rollout={"exclude": ["cluster-2"]})
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        inside, outside = gate.agent(1), gate.agent(2)
        for agent in (inside, outside):
            await agent.register(b)
            for replica in (a, b, a, b):
                assert await agent.heartbeat(replica) < 300
        await gate.push(inside, "c-1")
        assert await inside.poll_until(a, "c-1") == ["c-1"]
        assert await inside.result(b, "c-1") == 1
        await gate.until_state(a, "c-1", *ENDED)
        by_http = [each["path"] for each in journal(tmp_path) if each.get("path", "").endswith("/heartbeat")]
        assert not any(inside.cluster_id in path for path in by_http)
