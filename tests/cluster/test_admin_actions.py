"""Admin actions at other replicas: which answers count, and what an operator is told if none does."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("psycopg")

from shim.bridge.admin_actions import Drain, DrainState
from shim.cluster.admin_actions import ClusterAdmin, ReplicaClient
from shim.core.shards import Member
from shim.errors import OperatorError
from shim.management.subject import Actions, Subject
from tests.support.replicas import ENDED, gateway, pair_with_agent

UNKNOWN, AWAY, LATE = OperatorError(404, "unknown"), OperatorError(503, "b does not answer"), OperatorError(409, "late")


class Answering(ReplicaClient):
    """Other replicas by name, and what each of them answers or raises."""

    def __init__(self, **answers: Any) -> None:
        class Membership:
            def others(self) -> list[Member]:
                return [Member(name, name, "127.0.0.1:1", "f") for name in answers]

        membership: Any = Membership()
        pool: Any = None
        super().__init__(membership, pool)
        self._answers = answers

    async def ask(self, member: Member, action: str, target: str, body: bytes) -> dict[str, Any]:
        answer = self._answers[member.name]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


async def test_one_answer_is_enough_whatever_the_others_say() -> None:
    client = Answering(a=UNKNOWN, b=AWAY, c={"x": 1}, d=LATE)
    assert await client.ask_others("purge", "c-1", b"", required=True) == [("c", {"x": 1})]


@pytest.mark.parametrize("reason", [AWAY, LATE])
async def test_a_reason_is_told_if_an_answer_is_needed_and_none_came(reason: OperatorError) -> None:
    with pytest.raises(OperatorError) as refused:
        await Answering(a=UNKNOWN, b=reason).ask_others("purge", "c-1", b"", required=True)
    assert refused.value is reason
    assert await Answering(a=UNKNOWN, b=reason).ask_others("trace", "c-1", b"") == []


@pytest.mark.parametrize("reason", [AWAY, LATE])
async def test_an_order_for_all_fails_if_one_did_not_take_it(reason: OperatorError) -> None:
    with pytest.raises(OperatorError) as refused:
        await Answering(a={"x": 1}, b=reason).ask_others("drain", "", b"", complete=True)
    assert refused.value is reason
    assert await Answering(a={"x": 1}).ask_others("drain", "", b"", complete=True) == [("a", {"x": 1})]


async def test_nobody_knows_it() -> None:
    assert await Answering(a=UNKNOWN, b=UNKNOWN).ask_others("purge", "c-1", b"", required=True) == []
    assert await Answering().ask_others("purge", "c-1", b"", required=True) == []


class StandingClock:
    wall = 1000.0

    def wall_s(self) -> float:
        return self.wall

    def monotonic_s(self) -> float:
        return 0.0


def test_only_a_drain_that_was_learnt_from_others_ends_with_theirs() -> None:
    actions = Actions(list, StandingClock())
    on, off = Drain(DrainState.DRAINING, 990.0, 1060.0, 1, 0, 0), Drain(DrainState.OFF, 0.0, 0.0, 0, 0, 0)
    actions.record_elsewhere({"a": on, "b": off})
    actions.follow(join=False)
    assert not actions.draining, "a replica that is there already was told, or the drain was cancelled"
    actions.follow(join=True)
    assert actions.progress_here().deadline_unix == 1060.0
    for others, goes_on in (({"a": off, "b": on}, True), ({}, True), ({"a": off, "b": off}, False)):
        actions.record_elsewhere(others)
        actions.follow(join=False)
        assert actions.draining is goes_on
    actions.drain(60)
    actions.record_elsewhere({"a": off})
    actions.follow(join=True)
    assert actions.draining, "this one was told to drain"


DRAINED = Drain(DrainState.DRAINED, 990.0, 1060.0, 0, 0, 0)


class Others:
    """A subject without shards of its own, and what the other replicas answer."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.clock, self.answers = StandingClock(), answers
        ctx: Any = SimpleNamespace(clock=self.clock)
        self.subject = Subject(ctx, list, lambda: {"shards": 16}, self._ask)
        self.actions = self.subject.admin_actions

    async def _ask(self, *_: Any, **__: Any) -> list[tuple[str, dict[str, Any]]]:
        return list(self.answers.items())

    async def state(self) -> DrainState:
        await self.subject.ask_others("progress", "", b"")
        return self.actions.progress().state


def answer(drain: Drain = DRAINED, **more: Any) -> dict[str, Any]:
    return {"drain": msgspec.to_builtins(drain), **more}


async def test_a_drain_of_shards_that_nobody_counts_is_late_after_its_deadline() -> None:
    others = Others(a=answer(shards=15, starting=False))
    others.actions.drain(60)
    assert await others.state() is DrainState.DRAINING
    others.clock.wall = 1060.0
    assert await others.state() is DrainState.TIMED_OUT, "drain --wait waits no longer than it was told"
    others.answers["b"] = answer(shards=1, starting=False)
    assert await others.state() is DrainState.DRAINED


async def test_a_replica_of_an_earlier_version_does_not_tell_its_shards() -> None:
    others = Others(a=answer())
    others.actions.drain(60)
    assert await others.state() is DrainState.DRAINED


async def test_the_shards_of_a_replica_whose_commands_are_not_counted_do_not_count() -> None:
    others = Others(a=answer(shards=8, starting=False), b=answer(shards=8, starting=True))
    others.actions.drain(60)
    assert await others.state() is DrainState.DRAINING
    others.answers["b"] = answer(shards=8, starting=False)
    assert await others.state() is DrainState.DRAINED
    others.actions.resume()
    assert others.actions.drain(60).state is DrainState.DRAINED
    assert others.actions.progress().state is DrainState.DRAINING, "who had the shards in an earlier drain is no answer"


async def test_a_replica_that_drains_is_counted_although_it_has_not_asked_all_others_yet() -> None:
    nobody: Any = None
    subject = Others().subject
    admin = ClusterAdmin(subject, nobody, nobody, nobody, nobody)
    for draining in (False, True):
        _, reply = await admin.carry_out("/progress/", b"")
        assert msgspec.json.decode(reply)["starting"] is not draining
        subject.admin_actions.drain(60)


# --- on real processes ----------------------------------------------------------------------------------------------


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_an_agent_that_speaks_websocket_is_carried_by_any_replica_and_known_to_the_owner(
    tmp_path: Path, pg_url: str
) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        agent, owner, other = await pair_with_agent(gate)
        async with agent.websocket(other) as socket:
            payload = {"agent_id": agent.agent_id, "name": agent.name, "cluster_id": agent.cluster_id}
            await socket.send_json({"type": "register", "request_id": "r-1", "payload": payload})
            answer = await socket.receive_json(timeout=120)
            assert (answer["type"], answer["request_id"]) == ("register_success", "r-1")
            await gate.until_websocket_agents(owner, 1)
            assert (await gate.admin(other, "/status.json"))["websocket_agents"]["items"] == []


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_a_person_may_ask_any_replica(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        agent, owner, other = await pair_with_agent(gate)
        await gate.push(agent, "c-1")
        await gate.until_state(other, "c-1", "queued")
        reply = await gate.do(other, "POST", "/commands/c-1/purge")
        assert reply[0] == 200, reply
        assert reply[1]["command"]["state"] == "dead"
        assert (await gate.do(other, "POST", "/commands/c-1/redeliver"))[1]["command"]["state"] == "queued"
        assert (await gate.do(other, "POST", "/commands/nobody/purge"))[0] == 404
        assert (await gate.do(other, "POST", f"/agents/{agent.agent_id}/forget"))[0] == 409  # it calls
        assert await agent.poll_until(owner, "c-1") == ["c-1"]
        await agent.result(owner, "c-1")
        await gate.until_state(owner, "c-1", *ENDED)
        status, reply = await gate.do(other, "POST", "/drain", {"timeout_s": 60})
        assert (status, reply["drain"]["state"]) == (200, "draining")
        await gate.until_drain(owner, "draining", "drained")
        assert (await gate.do(owner, "DELETE", "/drain"))[0] == 200
        await gate.until_drain(other, "off")


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(240)
async def test_a_replica_that_starts_during_a_drain_takes_part_in_it(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        (a,) = await gate.add("a")
        await gate.settled(a)
        assert (await gate.do(a, "POST", "/drain", {"timeout_s": 600}))[0] == 200
        (b,) = await gate.add("b")
        await gate.settled(a, b)
        await gate.until_drain(b, "draining", "drained")
        assert await a.stop() == 0  # the shards that come from it drain, too
        await gate.settled(b)
        agent = gate.agent(1)
        await agent.register(b)
        await gate.push(agent, "refused")
        found = await gate.controller.control("GET", "/control/commands/refused?wait=result&timeout_s=60")
        assert found["results"][0]["payload"]["code"] == "queue_full"
        (c,) = await gate.add("c")  # it does not drain at first, which cancels nothing at b
        await gate.settled(b, c)
        await gate.until_drain(c, "draining", "drained")
        assert await b.stop() == 0
        await gate.settled(c)
        await agent.register(c)
        await gate.push(agent, "refused-2")
        found = await gate.controller.control("GET", "/control/commands/refused-2?wait=result&timeout_s=60")
        assert found["results"][0]["payload"]["code"] == "queue_full"
        assert (await gate.do(c, "DELETE", "/drain"))[0] == 200
        await gate.push(agent, "taken")
        await gate.until_state(c, "taken", "queued")


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(240)
async def test_a_drain_that_a_replica_did_not_take_is_no_success(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        b.send(signal.SIGSTOP)
        status, reply = await gate.do(a, "POST", "/drain", {"timeout_s": 600})
        assert status == 503
        assert reply["error"] == "the replica b does not answer; the others follow the order: repeat it"
        await gate.until_drain(a, "draining", "drained")
        await gate.settled(a)  # b has lost its lease
        assert (await gate.do(a, "POST", "/drain", {"timeout_s": 600}))[0] == 200
        b.send(signal.SIGCONT)
        await gate.settled(a, b)
        await gate.until_drain(b, "draining", "drained")


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(240)
async def test_a_drain_does_not_end_before_the_shards_of_a_dead_replica_are_counted(
    tmp_path: Path, pg_url: str
) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        agent, owner, other = await pair_with_agent(gate)
        await gate.push(agent, "c-1")
        await gate.until_state(owner, "c-1", "queued")
        token_file = str(tmp_path / "admin-token")
        wait = ["drain", "--wait", "--timeout", "600", "--url", other.admin, "--token-file", token_file]
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "shim", *wait, stdout=PIPE)
        try:
            assert process.stdout is not None
            assert b"1 command" in await process.stdout.readline()
            await owner.kill()
            await gate.settled(other)
            await gate.until_state(other, "c-1", "queued")
            assert process.returncode is None
            assert await agent.poll_until(other, "c-1") == ["c-1"]
            await agent.result(other, "c-1")
            ended = asyncio.ensure_future(process.wait())
            while not ended.done():  # the controller has confirmed a result when it acknowledges a later heartbeat
                await agent.heartbeat(other)
                await asyncio.wait([ended], timeout=1)
            assert ended.result() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(240)
async def test_a_replica_that_comes_back_follows_what_was_ordered_without_it(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        for method, body, states in (
            ("POST", {"timeout_s": 600}, ("draining", "drained")),
            ("DELETE", None, ("off",)),
        ):
            b.send(signal.SIGSTOP)
            await gate.settled(a)  # b is no member any longer, so it is not asked
            assert (await gate.do(a, method, "/drain", body))[0] == 200
            b.send(signal.SIGCONT)
            await gate.settled(a, b)
            await gate.until_drain(b, *states)
            await gate.until_drain(a, *states)
