"""The start of a replica: what it needs, what it waits for, and what ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from shim.cluster.replica import advertised
from tests.support.processes import Shim, free_port
from tests.support.replicas import elsewhere, gateway, token


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_replicas_with_other_settings_are_refused_by_the_name_of_the_key(tmp_path: Path, pg_url: str) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    async with gateway(tmp_path, pg_url) as gate:
        (a,) = await gate.add("a")
        await gate.settled(a)
        config = {
            "store": {"url": pg_url},
            "cluster": {"port": 0, "lease_s": 7},
            "upstream": {"url": "wss://elsewhere.example", "token": "t"},
        }
        async with Shim(folder, config) as shim:
            await shim.launch()
            assert await shim.wait() == 2
            (refused,) = shim.events("config_refused")
            for key in ("cluster.lease_s", "upstream.url", "upstream.token"):
                assert f"{key}: the replicas that run on this database have another value" in refused["error"]
        assert [each["name"] for each in (await gate.status(a))["replicas"]] == ["a"]


ONE_BRIDGE = """
import asyncio, sys
from shim import app
from shim.config import loader
from shim.log import setup

UPSTREAM = ["upstream.url=http://127.0.0.1:9", "upstream.token=t"]

async def serve():
    settings = loader.load(None, {}, [*UPSTREAM, "listen.port=0", "admin.port=0", "store.path=:memory:"])
    shim = app.App(settings, lambda: settings, setup("error", "json"))
    running = asyncio.create_task(shim.run())
    await shim.ready.wait()
    shim.stop_requested.set()
    return await running

assert asyncio.run(serve()) == app.EXIT_OK
assert "shim.store.sqlite" in sys.modules
assert not [name for name in sys.modules if name.startswith(("psycopg", "cryptography", "shim.cluster"))]
"""


def test_nothing_of_a_cluster_is_imported_without_one() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_BRIDGE], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "given, expected",
    [
        ("10.0.0.7", "10.0.0.7:7081"),
        ("10.0.0.7:9", "10.0.0.7:9"),
        ("pod-1.shim.ns.svc", "pod-1.shim.ns.svc:7081"),
        ("[fd00::7]", "[fd00::7]:7081"),
        ("[fd00::7]:9", "[fd00::7]:9"),
    ],
)
def test_the_advertised_address_has_the_port_that_is_listened_on(given: str, expected: str) -> None:
    assert advertised(given, 7081) == expected


@pytest.mark.parametrize(
    "cluster, said",
    [
        ({"host": "0.0.0.0"}, "cluster.advertise: must be set while cluster.host is every address"),
        ({"advertise": "http://a"}, "cluster.advertise: must be a host name or an address"),
        ({"port": 7080}, "cluster.port: must differ from listen.port"),
        ({"lease_s": 0.5}, "cluster.lease_s: must be from 1 to 600"),
    ],
)
async def test_what_makes_no_sense_is_told_by_its_key(tmp_path: Path, cluster: dict[str, object], said: str) -> None:
    config = {"listen": {"port": 7080}, "store": {"url": "postgresql://shim@127.0.0.1/shim"}, "cluster": cluster}
    async with Shim(tmp_path, config) as shim:
        await shim.launch()
        assert await shim.wait() == 2
        assert said in "\n".join(shim.lines)


@pytest.fixture
def server() -> Iterator[Any]:
    """A server of the test's own, which is stopped, with a database for the shim."""
    from tests.support.postgres import running  # noqa: PLC0415 - the driver is an extra

    with running("fsync = off") as server:
        server.create("shim")
        server.stop()
        yield server


def on(url: str) -> dict[str, Any]:
    return {
        "store": {"url": url},
        "cluster": {"port": 0},
        "admin": {"port": free_port()},
        "upstream": {"url": "http://127.0.0.1:1", "token": "t"},
    }


async def ask(shim: Shim, path: str) -> tuple[int, Any]:
    url = f"http://127.0.0.1:{shim.config['admin']['port']}{path}"
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        return response.status, await response.json()


@pytest.mark.needs("postgresql")
async def test_a_database_that_is_away_at_the_start_is_awaited(tmp_path: Path, server: Any) -> None:
    async with Shim(tmp_path, on(server.url())) as shim:
        await shim.launch()
        awaited = await shim.event("database_awaited")
        assert awaited["error"].startswith("store.url: no connection: ")
        assert await ask(shim, "/healthz") == (200, {"status": "ok"})
        status, told = await ask(shim, "/readyz")
        assert (status, told["reasons"]) == (503, ["the store cannot be written", "agents are not served yet"])
        status, told = await ask(shim, "/status.json")
        assert (status, told["overall"]["code"]) == (200, "store_unwritable")
        server.start()
        await shim.event("serving")
        await shim.event("shard_taken")
        assert await shim.stop() == 0


@pytest.mark.needs("postgresql")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_replica_that_waits_for_its_database_can_be_stopped(
    tmp_path: Path, server: Any, number: signal.Signals
) -> None:
    async with Shim(tmp_path, on(server.url())) as shim:
        await shim.launch()
        await shim.event("database_awaited")
        assert await shim.stop(number) == 0


@pytest.mark.needs("postgresql")
@pytest.mark.parametrize(
    "change, statement, code, said",
    [
        ({"password": "wrong"}, "", 70, "store.url: the server refuses the password"),
        ({"database": "nowhere"}, "", 70, "store.url: there is no such database"),
        ({}, "CREATE SCHEMA agent_shim; CREATE TABLE agent_shim.orders (id integer)", 70, "another application"),
        ({"user": "poor", "password": "p"}, "CREATE ROLE poor LOGIN PASSWORD 'p'", 70, "GRANT CREATE ON DATABASE"),
    ],
)
async def test_what_no_waiting_mends_ends_the_start_at_once(
    tmp_path: Path, server: Any, change: dict[str, str], statement: str, code: int, said: str
) -> None:
    server.start()
    if statement:
        server.sql(statement, "shim")
    async with Shim(tmp_path, on(server.url(**change))) as shim:
        await shim.launch()
        assert await shim.wait() == code
        assert said in shim.events("stopped_by_fault")[0]["error"]
        assert not shim.events("database_awaited")


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_an_empty_token_file_does_not_refuse_agents_whose_link_is_at_another_replica(
    tmp_path: Path, pg_url: str
) -> None:
    file = tmp_path / "token"
    file.write_text(token(1))
    async with gateway(tmp_path, pg_url, listen={"port": 0, "auth": "required"}) as gate:
        gate.configure(upstream={"url": gate.controller.url, "token_file": str(file)})
        replicas = await gate.add("first", "second")
        await gate.settled(*replicas)
        agent = gate.agent(1)
        await agent.register(replicas[0])
        _, other = await elsewhere(gate, agent)
        assert await agent.heartbeat(other) == 204
        file.write_text("")
        for replica in replicas:
            await replica.event("token_unreadable")
        assert await agent.heartbeat(other) == 204


@pytest.mark.needs("postgresql")
async def test_a_database_of_a_newer_shim_ends_the_start_with_78(tmp_path: Path, server: Any) -> None:
    server.start()
    async with Shim(tmp_path, on(server.url())) as shim:
        await shim.start()
        assert await shim.stop() == 0
        server.sql("UPDATE meta SET value = '99' WHERE key = 'min_reader_version'", "shim")
        await shim.launch()
        assert await shim.wait() == 78
