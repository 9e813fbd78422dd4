"""The real process is driven into the sentences of its health summary, and every view of it says the same."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
import pytest_asyncio

from shim.core.failover import bucket
from shim.fallback.policy import PATIENCE_S
from shim.management.health_summary import SENTENCES
from tests.chaos.harness.waiting import last
from tests.e2e.test_operate import run
from tests.support.processes import TOKEN, Shim, world
from tests.support.sockets import read_head, tcp_server

WAIT_S = 60.0
# A controller that leaves a heartbeat without its acknowledgement for two intervals is taken for stalled.
FAST = {"upstream": {"heartbeat_interval_s": 2.0}, "poll": {"hold": "off"}}
BASE = "/api/v1/clusters/agent"
ADMIN_TOKEN = "the-admin-token-of-this-test"


pytestmark = pytest.mark.timeout(400)


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), headers=headers) as session:
        yield session


class Agent:
    """A legacy agent that heartbeats until it is told to stop."""

    def __init__(self, http: aiohttp.ClientSession, shim: Shim, name: str = "prod", cluster_id: str = "") -> None:
        self._http, self._shim, self._name = http, shim, name
        self.cluster_id = cluster_id
        self._beating: asyncio.Task[None] | None = None

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self._http.request(method, self._shim.url + path, json=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def register(self) -> int:
        status, body = await self.call(
            "POST", f"{BASE}/register", {"agent_id": f"pod-{self._name}", "name": self._name}
        )
        self.cluster_id = body.get("cluster_id", self.cluster_id)
        return status

    async def heartbeat(self) -> int:
        body = {"agent_id": f"pod-{self._name}", "cluster_id": self.cluster_id, "status": "healthy"}
        return (await self.call("POST", f"{BASE}/{self.cluster_id}/heartbeat", body))[0]

    async def poll(self) -> list[str]:
        _, body = await self.call("GET", f"{BASE}/{self.cluster_id}/poll")
        return [command["id"] for command in body["commands"]]

    async def _beat(self) -> None:
        while True:
            await self.heartbeat()
            await asyncio.sleep(0.3)

    async def __aenter__(self) -> Self:
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._beating is not None
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)


class Health:
    """What the status stream of a shim says, snapshot by snapshot."""

    def __init__(self, http: aiohttp.ClientSession, shim: Shim) -> None:
        self._http, self._shim = http, shim

    async def _snapshots(self) -> AsyncIterator[tuple[dict[str, Any], set[str]]]:
        async with self._http.get(f"{self._shim.admin}/events") as response:
            async for line in response.content:
                if line.startswith(b'data: {"overall"'):
                    status: dict[str, Any] = json.loads(line[6:])
                    overall = status["overall"]
                    yield status, {overall["code"], *(each["code"] for each in overall["problems"])}

    async def until(
        self, code: str, wait_s: float = WAIT_S, wanted: Callable[[dict[str, Any]], bool] = bool
    ) -> dict[str, Any]:
        """Wait for a snapshot that says a sentence, as the headline or among its problems, and is as wanted."""
        said: set[str] = set()
        try:
            async with asyncio.timeout(wait_s), aclosing(self._snapshots()) as snapshots:
                async for status, said in snapshots:
                    if code in said and wanted(status):
                        await self._everywhere(code, status)
                        return status
        except TimeoutError:
            pass
        raise AssertionError(f"{code} was not said, but {said}")

    async def said(self, code: str) -> bool:
        """Return whether one of the snapshots until the end of the stream says a sentence."""
        async with asyncio.timeout(WAIT_S), aclosing(self._snapshots()) as snapshots:
            return any([code in said async for _, said in snapshots])

    async def passes(self, code: str, after: Callable[[], Awaitable[None]]) -> None:
        """Wait for a sentence that stands for seconds only: the stream is read from before its cause on."""
        reading = asyncio.Event()

        async def read() -> None:
            async with asyncio.timeout(WAIT_S), aclosing(self._snapshots()) as snapshots:
                async for _, said in snapshots:
                    reading.set()
                    if code in said:
                        return
            raise AssertionError(f"{code} was not said")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            await reading.wait()
            await after()

    async def gone(self, *codes: str) -> None:
        """Wait for a snapshot that says none of these."""
        async with asyncio.timeout(WAIT_S), aclosing(self._snapshots()) as snapshots:
            async for _, said in snapshots:
                if said.isdisjoint(codes):
                    return

    async def _everywhere(self, code: str, status: dict[str, Any]) -> None:
        """The other views agree: what is wrong is a problem, is in the metric, and nothing is called well."""
        overall = status["overall"]
        wrong = SENTENCES[code].level in ("warning", "bad")
        assert wrong is (code in {each["code"] for each in overall["problems"]})
        if not wrong:
            return
        assert overall["level"] in ("warning", "bad")
        async with self._http.get(f"{self._shim.admin}/metrics") as response:
            text = await response.text()
        assert f'agent_shim_health_problem{{problem="{code}"}}' in text


def with_token(folder: Path) -> dict[str, Any]:
    (folder / "admin-token").write_text(ADMIN_TOKEN)
    return {**FAST, "commands": {"evidence_s": 1}, "admin": {"port": 0, "token_file": str(folder / "admin-token")}}


async def test_one_agents_life(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        health, agent = Health(http, shim), Agent(http, shim)
        await health.until("nobody_called")
        await agent.register()
        async with agent:
            await health.until("all_well")
            assert (await agent.call("POST", f"/api/v1{BASE}/register", {}))[0] == 404
            told = await health.until("calls_refused")
            assert f"1 call refused in the last minute: 404 POST /api/v1{BASE}/register" in told["overall"]["text"]
            await shim.event("call_refused", status=404)
            # the same call again, so that the minute is not over before the command has started
            assert (await agent.call("POST", f"/api/v1{BASE}/register", {}))[0] == 404
            code, out, _ = await run("status", "--url", shim.admin)
            assert (code, "refused in the last minute: 404" in out.splitlines()[0]) == (0, True)

            shim.write({"mode": "no such mode"})
            await shim.event("config_faulty")
            await health.until("configuration_faulty")

            await health.passes("link_connecting", controller.kill)
            told = await health.until("link_down")
            assert "it cannot be reached" in told["overall"]["text"]


async def test_commands_in_doubt_and_a_drain(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, controller):
        await shim.start()
        agent = Agent(http, shim)
        await agent.register()
        async with (
            agent,
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as other,
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}) as admin,
        ):
            health = Health(admin, shim)
            await controller.api.push({"id": "k1", "cluster_id": agent.cluster_id})
            await shim.event("command_queued")
            async with other.get(f"{shim.url}{BASE}/{agent.cluster_id}/poll") as response:
                assert [each["id"] for each in (await response.json())["commands"]] == ["k1"]
            await health.until("commands_in_doubt")  # that connection stays open and unused
            for timeout_s, said in ((3600, "draining"), (0.1, "drain_timed_out")):
                async with admin.delete(f"{shim.admin}/drain") as response:
                    assert response.status == 200
                async with admin.post(f"{shim.admin}/drain", json={"timeout_s": timeout_s}) as response:
                    assert response.status == 200
                await health.until(said)
            assert await agent.poll() == ["k1"]
            result = f"{BASE}/{agent.cluster_id}/commands/k1/result"
            assert (await agent.call("POST", result, {"success": True}))[0] == 200
            await health.until("drained")


async def test_what_the_controller_makes_of_an_agent(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        health, agent = Health(http, shim), Agent(http, shim)

        async def fault(**fields: Any) -> None:
            await controller.control("DELETE", "/control/faults")
            if fields:
                await controller.control("POST", "/control/faults", fields)

        await fault(kind="register_error", error="name is not valid", code="400")
        assert await agent.register() == 400
        told = await health.until("registration_refused")
        assert "The controller refuses to register prod (400): name is not valid." in str(told["overall"])
        await fault()
        assert await agent.register() == 200
        async with agent:
            await fault(kind="no_heartbeat_acks")
            await health.until("heartbeats_unacknowledged")
            await fault(kind="not_registered", error="quota exceeded")
            told = await health.until("heartbeats_refused")
            assert "refuses the heartbeats of prod: quota exceeded" in str(told["overall"])
            await fault(kind="not_registered", error="cluster not found")
            await controller.control("POST", "/control/faults", {"kind": "no_register_answer"})
            told = await health.until("registration_unanswered")
            told = await health.until("agent_unknown")
            assert "The controller does not know prod: cluster not found." in str(told["overall"])
            code, out, _ = await run("doctor", "--url", shim.admin, "--set", f"upstream.url={controller.url}")
            assert (code, "FAIL" in out, "does not know prod" in out) == (1, True, True)
            await fault()
            await health.gone("agent_unknown", "registration_unanswered")


async def test_an_agent_with_a_saved_id_and_no_name(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, _):
        await shim.start()
        health = Health(http, shim)
        async with Agent(http, shim, cluster_id="saved-id"):
            told = await health.until("name_unknown")
            assert told["overall"]["level"] == "bad"
            assert "saved-id" in told["overall"]["text"]
            assert "identity.name" in told["overall"]["problems"][0]["hint"]
        await shim.stop()
        shim.write({"identity": {"name": "prod"}})
        await shim.start()
        async with Agent(http, shim, cluster_id="saved-id"):
            await health.until("all_well")


async def test_tokens_and_identities(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await controller.control("POST", "/control/faults", {"kind": "refuse", "status": 401})
        await shim.start()
        health = Health(http, shim)
        await health.until("token_refused")
        await controller.control("DELETE", "/control/faults")
        shim.send(signal.SIGTERM)
        await shim.wait()
        await controller.control("POST", "/control/faults", {"kind": "close_after_register", "code": 1000})
        await shim.start()
        agent = Agent(http, shim)
        await agent.register()
        async with agent:
            await health.until("identity_contended")


async def test_calls_by_http(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    inside = next(name for name in map("cluster-{}".format, range(999)) if bucket(name) < 10)
    outside = next(name for name in map("cluster-{}".format, range(999)) if bucket(name) > 50)
    async with world(tmp_path, FAST) as (shim, controller):
        config: dict[str, Any] = {"rollout": {"percent": 10}, "fallback": {"url": controller.url}}
        shim.write(config)
        await shim.start()
        health, agents = Health(http, shim), [Agent(http, shim, inside), Agent(http, shim, outside)]
        for agent in agents:
            assert await agent.register() == 200
        await health.until("all_well", wanted=lambda status: status["sessions"]["by_http"]["rollout"] == 1)
        async with agents[0], agents[1]:
            told = await health.until("all_well", wanted=lambda status: status["sessions"]["by_http"]["rollout"] == 1)
            assert "1 agent alive, 1 agent by HTTP (outside the rollout)." in told["overall"]["text"]
            row = next(each for each in told["sessions"]["items"] if each["name"] == outside)
            assert (row["http"]["why"], row["http"]["status"], row["silent"]) == ("rollout", 200, False)
            _, out, _ = await run("status", "--url", shim.admin)
            assert f"by HTTP (outside 10 %, hash {bucket(outside):.1f}), last call 0 s ago: 200" in out
            await controller.control("POST", "/control/legacy", {"refuse": 401})
            told = await health.until("fallback_failing")
            assert told["overall"]["level"] == "bad"
            code, out, _ = await run("doctor", "--url", shim.admin, "--set", f"upstream.url={controller.url}")
            assert (code, "The vendor's HTTP API did not serve" in out) == (1, True)
            await controller.control("POST", "/control/legacy", {"refuse": 0})
        config["rollout"] = {"percent": 10, "include": [outside]}
        shim.write(config)
        await shim.event("config_reloaded")
        async with agents[0], agents[1]:
            await health.until("fallback_failing", wanted=lambda status: status["sessions"]["fresh"] == 2)


async def test_mode_http_and_an_api_that_is_gone(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write({"mode": "http", "fallback": {"url": controller.url}})
        await shim.start()
        health = Health(http, shim)
        told = await health.until("all_by_http")
        assert "no agent by HTTP yet" in told["overall"]["text"]
        agent = Agent(http, shim)
        await agent.register()
        async with agent:
            told = await health.until("all_by_http")
            await controller.kill()
            told = await health.until("fallback_failing")
            assert "no answer, heartbeat" in told["overall"]["text"]
        await health.until("fallback_failed", 90)  # a minute later, without a call since


async def test_an_api_that_takes_calls_and_never_answers(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    async with world(tmp_path, FAST) as (shim, _), tcp_server(converse) as port:
        shim.write({"mode": "http", "fallback": {"url": f"http://127.0.0.1:{port}"}})
        await shim.start()
        body, patience = {"status": "healthy"}, aiohttp.ClientTimeout(total=PATIENCE_S + 1)
        with pytest.raises(TimeoutError):  # as an agent does whose own time limit comes first
            await http.post(f"{shim.url}{BASE}/gone/heartbeat", json=body, timeout=patience)
        told = await Health(http, shim).until("fallback_failing")
        assert "no answer, heartbeat (the agent hung up after" in told["overall"]["text"]


@pytest.mark.parametrize(
    "stalls, told", [(False, "its reply stopped before the end"), (True, "without the rest of the reply")]
)
async def test_a_large_reply_that_stops_halfway_is_no_success(
    tmp_path: Path, http: aiohttp.ClientSession, stalls: bool, told: str
) -> None:
    """The status line of a streamed reply says 200 long before anybody knows how the reply ends."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 400_000)
        await writer.drain()
        if stalls:
            await reader.read()

    async with world(tmp_path, FAST) as (shim, _), tcp_server(converse) as port:
        shim.write({"mode": "http", "fallback": {"url": f"http://127.0.0.1:{port}"}})
        await shim.start()
        patience = aiohttp.ClientTimeout(sock_read=PATIENCE_S + 1)
        async with http.get(f"{shim.url}/api/v1/large", timeout=patience) as response:
            assert response.status == 200
            with pytest.raises((aiohttp.ClientPayloadError, TimeoutError)):
                await response.read()
        status = await Health(http, shim).until("fallback_failing")
        assert told in status["overall"]["text"]
        assert status["fallback_calls"]["last_failure"]["status"] in {0, None}


async def test_an_api_that_redirects(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: https://login.test/\r\nContent-Length: 0\r\n\r\n")

    async with world(tmp_path, FAST) as (shim, _), tcp_server(converse) as port:
        shim.write({"mode": "http", "fallback": {"url": f"http://127.0.0.1:{port}"}})
        await shim.start()
        async with http.get(f"{shim.url}{BASE}/gone/poll", allow_redirects=False) as response:
            assert response.status == 302
        told = await Health(http, shim).until("fallback_failing")
        assert "302 poll" in told["overall"]["text"]
        assert "fallback.url must be the address itself" in told["overall"]["problems"][0]["hint"]


async def test_what_takes_its_time_to_show(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        health, agent = Health(http, shim), Agent(http, shim)

        async def tunnels() -> None:
            while True:
                await agent.call("GET", "/api/agents/only-tunnels/tunnel/status")
                await asyncio.sleep(1)

        asking = asyncio.create_task(tunnels())
        await health.until("agents_arriving")
        told = await health.until("not_registered", 60)
        assert told["overall"]["text"] == "Called, not registered: only-tunnels."
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await agent.register()
        await controller.api.push({"id": "k1", "cluster_id": agent.cluster_id})
        await shim.event("command_queued")
        await health.until("agents_silent", 100)
        await health.until("commands_not_fetched", 100)
        await shim.kill()
        await shim.start()
        await health.until("no_agent_alive")


async def test_a_store_that_cannot_be_written_and_a_shim_that_stops(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, FAST) as (shim, _):
        await shim.start()
        health = Health(http, shim)
        with closing(sqlite3.connect(tmp_path / "agent-shim.db", isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            await health.until("store_unwritable")
            database.execute("ROLLBACK")
        await health.until("nobody_called")
        # a request whose body is still on its way keeps the shim for a moment
        host, _, port = shim.url.removeprefix("http://").rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {BASE}/register HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        await writer.drain()
        watching = asyncio.create_task(health.said("stopping"))
        await health.until("nobody_called")  # a reader is served before the end begins
        shim.send(signal.SIGTERM)
        assert await watching
        writer.close()


async def test_a_log_that_nobody_reads(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    ready, config = tmp_path / "ready.json", {**FAST, "log": {"level": "debug"}}
    os.mkfifo(tmp_path / "log")
    pipe = os.open(tmp_path / "log", os.O_RDWR)  # open for reading as well, so that the shim's end is no broken pipe
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    try:
        async with world(tmp_path, config) as (shim, _):
            shim.program = ("/bin/sh", "-c", 'exec "$@" 2>"$0"', str(tmp_path / "log"), *shim.program)
            await shim.launch("--ready-file", str(ready))
            async with asyncio.timeout(WAIT_S):
                while not ready.exists():
                    await last(0.05)
            told = json.loads(ready.read_text())
            shim.url, shim.admin = f"http://{told['listen']}", f"http://{told['admin']}"
            assert (await run("health", "--url", shim.admin, "--wait", "30"))[0] == 0

            async def flood(number: int) -> None:
                agent = Agent(http, shim, cluster_id=f"c{number}-{'x' * 200}")
                for turn in range(10_000):
                    result = f"{BASE}/{agent.cluster_id}/commands/k{turn}-{'x' * 200}/result"
                    with suppress(aiohttp.ClientError):
                        await agent.call("POST", result, {"success": True})

            flooding = asyncio.gather(*(flood(number) for number in range(20)))
            told = await Health(http, shim).until("log_lines_lost", 300)
            assert "could not be written." in str(told["overall"]["problems"])
            assert told["log"]["lost"] > 0
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
            assert await shim.stop() == 0
    finally:
        os.close(pipe)


async def test_a_reader_that_keeps_the_stores_log(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        health, agent = Health(http, shim), Agent(http, shim)
        await agent.register()
        async with agent:
            await health.until("all_well")
            with closing(sqlite3.connect(tmp_path / "agent-shim.db", isolation_level=None)) as database:
                database.execute("BEGIN")
                database.execute("SELECT count(*) FROM sqlite_master").fetchall()  # takes its snapshot
                for number in range(100):
                    ident, payload = f"k{number}", {"script": "x" * 500_000}
                    await controller.api.push({"id": ident, "cluster_id": agent.cluster_id, "payload": payload})
                    await shim.event("command_queued", command=ident)
                    assert await agent.poll() == [ident]
                    result = f"{BASE}/{agent.cluster_id}/commands/{ident}/result"
                    assert (await agent.call("POST", result, {"success": True}))[0] == 200
                    if shim.events("store_log_pinned"):
                        break
                told = await health.until("store_log_pinned")
                assert "its write-ahead log has grown to " in str(told["overall"]["problems"])
                database.execute("ROLLBACK")
            await health.gone("store_log_pinned")
