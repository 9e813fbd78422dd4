"""Modes `http` and `auto`, and `rollout.percent`, with real processes (docs/reference/protocol.md#4-modes)."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import ssl
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import trustme

from shim.core.failover import bucket
from tests.support.processes import TOKEN, Controller, Shim, world
from tests.support.proxies import PickyProxy
from tests.support.sockets import answer, read_head, tcp_server

FAST = {"upstream": {"heartbeat_interval_s": 2.0}}
AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), headers=AUTH) as session:
        yield session


def name_in(low: float, high: float) -> str:
    """A cluster name whose bucket lies in a range."""
    return next(name for name in map("cluster-{}".format, range(10_000)) if low <= bucket(name) < high)


async def register(http: aiohttp.ClientSession, shim: Shim, name: str = "prod-cluster") -> str:
    body = {"agent_id": f"agent-of-{name}", "name": name}
    async with http.post(f"{shim.url}/api/v1/clusters/agent/register", json=body) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["cluster_id"])


async def heartbeat(http: aiohttp.ClientSession, shim: Shim, cluster_id: str, status: str = "healthy") -> int:
    body = {"cluster_id": cluster_id, "agent_id": "agent-1", "status": status}
    async with http.post(f"{shim.url}/api/v1/clusters/agent/{cluster_id}/heartbeat", json=body) as response:
        return response.status


async def drain(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> list[str]:
    async with http.get(f"{shim.url}/api/v1/clusters/agent/{cluster_id}/poll") as response:
        assert response.status == 200, await response.text()
        return [command["id"] for command in (await response.json())["commands"]]


async def result(http: aiohttp.ClientSession, shim: Shim, cluster_id: str, command_id: str) -> int:
    url = f"{shim.url}/api/v1/clusters/agent/{cluster_id}/commands/{command_id}/result"
    async with http.post(url, json={"success": True, "output": "done"}) as response:
        return response.status


async def ways(controller: Controller, kind: str) -> list[str]:
    """By which way messages of a kind came, in order."""
    events, _ = await controller.api.events(0, 0, type=kind, direction="in")
    return [event.get("via", "websocket") for event in events]


def config(controller_url: str, **more: Any) -> dict[str, Any]:
    return {"fallback": {"url": controller_url, "after_s": 0.2, "hold_down_s": 0.2}, "poll": {"hold": "off"}, **more}


async def test_http_passes_everything_on_unchanged(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, mode="http"))
        await shim.start()
        cluster_id = await register(http, shim)
        assert await heartbeat(http, shim, cluster_id) == 200
        assert await ways(controller, "register") == ["http"]
        assert await ways(controller, "heartbeat") == ["http"]
        # the API's own answers come through, also to what no dialect knows
        async with http.get(f"{shim.url}/api/v1/unheard-of?x=%2F") as response:
            assert response.status == 404
        async with http.get(f"{shim.url}/api/v1/clusters/agent/{cluster_id}/tunnel-info") as response:
            assert (response.status, (await response.json())["error"]) == (404, "not registered")
        # its own token is the agent's: a wrong one is refused there
        async with http.post(
            f"{shim.url}//api/v1/agents/register", json={"id": "a", "name": "a"}, headers={"Authorization": "Bearer no"}
        ) as response:
            assert response.status == 401
        body = gzip.compress(json.dumps({"agent_id": "g", "name": "gzipped"}).encode())
        async with http.post(
            f"{shim.url}/api/v1/clusters/agent/register", data=body, headers={"Content-Encoding": "gzip"}
        ) as response:
            assert response.status == 200
        # and it is gone one day
        await controller.control("POST", "/control/legacy", {"refuse": 410})
        assert await heartbeat(http, shim, cluster_id) == 410
        # nothing was said over a WebSocket
        assert set(await ways(controller, "register")) == {"http"}


async def test_the_way_back_has_the_address_the_trust_and_the_proxy_of_the_link(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    """`mode: http` is all that must be written: the vendor is only reachable as the link reaches it."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("vendor.test").configure_cert(context)
    seen: list[tuple[str, dict[str, str]]] = []

    async def vendor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_head(reader))
        writer.write(answer("200 OK"))

    async with tcp_server(vendor, ssl=context) as target:
        proxy = PickyProxy(target)
        async with tcp_server(proxy.converse) as port, world(tmp_path, FAST) as (shim, _):
            shim.write(
                {
                    "mode": "http",
                    "upstream": {
                        "url": "wss://vendor.test./api/v1/clusters/agent/ws",
                        "ca_file": str(tmp_path / "ca.pem"),
                        "proxy": f"http://{PickyProxy.CREDENTIALS}@127.0.0.1:{port}",
                    },
                }
            )
            await shim.start()
            assert await heartbeat(http, shim, "c-1") == 200
            way = f"fallback https://vendor.test. is dialled through http://127.0.0.1:{port} (upstream.proxy)"
            await shim.output(way)
    line, headers = seen[0]
    assert line == "POST /api/v1/clusters/agent/c-1/heartbeat HTTP/1.1"
    assert (headers["host"], headers["authorization"]) == ("vendor.test", AUTH["Authorization"])
    assert proxy.heads == ["CONNECT vendor.test.:443 HTTP/1.1"]


async def test_bodies_of_any_size_are_streamed(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, mode="http"))
        await shim.start()
        big = {"nodes": ["x" * 1000] * 5000, "timestamp": "2026-01-01T00:00:00Z"}
        body = BytesIO(json.dumps(big).encode())
        async with http.post(f"{shim.url}/api/v1/agents/agent-1/status", data=body) as response:
            assert response.status == 200
        events, _ = await controller.api.events(0, 0, type="status", direction="in")
        assert events[0]["payload"]["nodes"] == big["nodes"]


async def test_rollback_and_return_without_touching_the_agent(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url))
        await shim.start()
        cluster_id = await register(http, shim)
        assert await heartbeat(http, shim, cluster_id) == 200
        await controller.until(type="heartbeat", direction="in")
        await controller.api.push({"id": "from-the-socket", "cluster_id": cluster_id})
        await shim.event("command_queued")

        shim.write(config(controller.url, mode="http"))
        shim.send(signal.SIGHUP)
        await shim.event("config_reloaded", mode="http")
        await controller.control("POST", "/control/legacy/commands", {"ident": cluster_id, "id": "from-http"})
        # what is on disk comes first; both are delivered once
        assert await drain(http, shim, cluster_id) == ["from-the-socket", "from-http"]
        assert await drain(http, shim, cluster_id) == []
        # an id that came one way is not delivered again the other way
        await controller.control("POST", "/control/legacy/commands", {"ident": cluster_id, "id": "from-the-socket"})
        assert await drain(http, shim, cluster_id) == []
        # results go back the way their commands came
        assert await result(http, shim, cluster_id, "from-http") == 200
        assert await result(http, shim, cluster_id, "from-the-socket") == 200
        got = await controller.until(2, type="command_result", direction="in")
        assert {e["payload"]["command_id"]: e.get("via", "websocket") for e in got} == {
            "from-http": "http",
            "from-the-socket": "websocket",
        }

        shim.write(config(controller.url))
        shim.send(signal.SIGHUP)
        await shim.event("config_reloaded", mode="websocket")
        before = len(await ways(controller, "heartbeat"))
        assert await heartbeat(http, shim, cluster_id, "another status: it goes up at once") == 200
        await controller.until(before + 1, type="heartbeat", direction="in")
        assert (await ways(controller, "heartbeat"))[-1] == "websocket"


async def test_what_the_api_hands_out_and_no_agent_can_take_is_said(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, mode="http"))
        await shim.start()
        cluster_id = await register(http, shim)
        for command_id in ("no/path/has/it", "good"):
            await controller.control("POST", "/control/legacy/commands", {"ident": cluster_id, "id": command_id})
        assert await drain(http, shim, cluster_id) == ["good"]
        await shim.event("command_rejected", command="no/path/has/it", code="malformed")


async def test_an_agent_that_registered_by_http_is_known_when_it_goes_by_the_socket(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, mode="http"))
        await shim.start()
        cluster_id = await register(http, shim)
        shim.write(config(controller.url))
        shim.send(signal.SIGHUP)
        await shim.event("config_reloaded", mode="websocket")
        assert await heartbeat(http, shim, cluster_id) == 200
        registers = await controller.until(2, type="register", direction="in")
        assert registers[1]["payload"]["name"] == "prod-cluster"
        assert registers[1]["payload"]["cluster_id"] == cluster_id


async def test_auto_goes_by_http_while_the_link_is_down_and_comes_back(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, mode="auto"))
        await shim.start()
        await shim.event("link_state", state="online")
        cluster_id = await register(http, shim)
        assert await ways(controller, "register") == ["websocket"]
        # the WebSocket goes, the HTTP API stays
        await controller.control("POST", "/control/faults", {"kind": "refuse", "status": 503})
        await controller.control("POST", "/control/drop", {"how": "abort"})
        await shim.event("link_lost")
        async with asyncio.timeout(60):
            while "http" not in await ways(controller, "heartbeat"):
                assert await heartbeat(http, shim, cluster_id) == 200
        assert await shim.event("failover", way="http")
        await controller.control("POST", "/control/legacy/commands", {"ident": cluster_id, "id": "c-1"})
        assert await drain(http, shim, cluster_id) == ["c-1"]
        assert await result(http, shim, cluster_id, "c-1") == 200
        # the HTTP API fails too: the agent has its normal answers all the same
        await controller.control("POST", "/control/legacy", {"refuse": 503})
        for _ in range(5):
            assert await heartbeat(http, shim, cluster_id) in (200, 503)
        assert await heartbeat(http, shim, cluster_id) == 200
        # the WebSocket is back, and after a while so are the calls
        await controller.control("DELETE", "/control/faults")
        async with asyncio.timeout(60):
            while [event["way"] for event in shim.events("failover")] != ["http", "websocket"]:
                assert await heartbeat(http, shim, cluster_id) in (200, 503)
        assert await heartbeat(http, shim, cluster_id) == 200
        assert (await ways(controller, "heartbeat"))[-1] == "websocket"


async def test_a_rollout_serves_its_share_and_the_rest_as_before(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    inside, outside = name_in(0, 10), name_in(10, 50)
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, rollout={"percent": 10}))
        await shim.start()
        ids = [await register(http, shim, name) for name in (inside, outside)]
        assert await ways(controller, "register") == ["websocket", "http"]
        for cluster_id in ids:
            assert await heartbeat(http, shim, cluster_id) == 200
        assert sorted(await ways(controller, "heartbeat")) == ["http", "websocket"]
        shim.write(config(controller.url, rollout={"percent": 50}))
        await shim.event("config_reloaded")
        assert await heartbeat(http, shim, ids[1]) == 200
        registers = await controller.until(3, type="register", direction="in")
        assert (registers[2]["payload"]["name"], registers[2].get("via")) == (outside, None)


async def test_the_sunset_ends_both_other_ways_and_every_reply_says_when_it_comes(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    sunset = {"deprecation_at": "2025-10-16", "at": "2025-11-15T00:00:00Z", "link": "https://example.com/guide"}
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, mode="http", sunset=sunset))
        await shim.start()
        await register(http, shim)
        assert await ways(controller, "register") == ["websocket"]
        async with http.get(f"{shim.url}/api/v1/health") as response:
            assert response.headers["Deprecation"] == "@1760572800"
            assert response.headers["Sunset"] == "Sat, 15 Nov 2025 00:00:00 GMT"
            assert response.headers["Link"] == '<https://example.com/guide>; rel="deprecation"'


async def test_http_mode_without_the_api_says_so(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        shim.write(config(controller.url, mode="http"))
        await shim.start()
        await controller.kill()
        async with http.post(
            f"{shim.url}/api/v1/clusters/agent/register", json={"agent_id": "a", "name": "n"}
        ) as answer:
            assert (answer.status, (await answer.json())["success"]) == (502, False)


@pytest.mark.parametrize(
    "sent, status",
    [
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 408),
        (b"Content-Length: 2000000\r\n\r\nhello", 408),
        (b"Content-Length: 2000000\r\nExpect: tea\r\n\r\nhello", 417),
    ],
    ids=["malformed", "stalled", "large", "expectation"],
)
async def test_a_body_that_cannot_be_passed_on_is_not_blamed_on_the_api(
    tmp_path: Path, http: aiohttp.ClientSession, sent: bytes, status: int
) -> None:
    async def vendor(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    async with world(tmp_path, FAST) as (shim, _), tcp_server(vendor) as port:
        listen = {"port": 0, "body_timeout_s": 0.5}
        shim.write(config(f"http://127.0.0.1:{port}", mode="http", listen=listen))
        await shim.start()
        host, _, own = shim.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(own))
        writer.write(b"POST /api/v1/agents/a/status HTTP/1.1\r\nHost: localhost\r\n" + sent)
        line, _ = await read_head(reader)
        assert line.startswith(f"HTTP/1.1 {status} ")
        writer.close()
        async with http.get(f"{shim.admin}/status.json") as response:
            found = await response.json()
        assert [problem["code"] for problem in found["overall"]["problems"]] == ["calls_refused"]
        assert found["fallback_calls"]["calls"] == 0


@pytest.mark.parametrize(
    "file, content, key",
    [
        ("token", "", "upstream.token_file"),
        ("token", "two words", "upstream.token_file"),
        ("ca.pem", "x", "fallback.ca_file"),
    ],
)
async def test_a_fault_of_the_shims_own_files_is_not_blamed_on_the_api(
    tmp_path: Path, http: aiohttp.ClientSession, file: str, content: str, key: str
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        (tmp_path / "token").write_text(TOKEN)
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
        upstream = {"url": controller.url, "token": "", "token_file": str(tmp_path / "token")}
        https = controller.url.replace("http:", "https:")
        fallback = {"url": https, "ca_file": str(tmp_path / "ca.pem"), "use_upstream_token": True}
        shim.write({"mode": "http", "upstream": upstream, "fallback": fallback})
        await shim.start()
        (tmp_path / file).write_text(content)
        async with http.get(f"{shim.url}/api/v1/clusters/agent/c-1/poll") as response:
            assert response.status == 502
            error = (await response.json())["error"]
        assert error.startswith(f"no answer of the vendor's HTTP API: {key}: ")
        assert content == "x" or not any(word in error for word in content.split())
        async with http.get(f"{shim.admin}/status.json") as response:
            (problem,) = (await response.json())["overall"]["problems"]
        assert problem["code"] == "fallback_failing"
        assert key in problem["text"]
        assert "doctor" in problem["hint"]


async def test_a_token_file_that_keeps_the_link_down_is_named_to_the_agent(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        (tmp_path / "token").write_text(TOKEN)
        upstream = {"url": controller.url, "token": "", "token_file": str(tmp_path / "token")}
        shim.write({"upstream": upstream, "heartbeat": {"when_link_down": "fail"}, "register": {"deadline_s": 1}})
        await shim.start()
        cluster_id = await register(http, shim)
        (tmp_path / "token").write_text("")
        await controller.control("POST", "/control/drop", {"how": "abort"})
        await shim.event("token_unreadable", link="default")
        expected = "the controller cannot be reached: upstream.token_file: the file is empty"
        for path in ("register", f"{cluster_id}/heartbeat"):
            body = {"agent_id": "agent-2", "name": "another"}
            async with http.post(f"{shim.url}/api/v1/clusters/agent/{path}", json=body) as response:
                assert (response.status, (await response.json())["error"]) == (503, expected)
        async with http.get(f"{shim.admin}/status.json") as response:
            assert "upstream.token_file" in (await response.json())["overall"]["text"]


async def test_a_switch_drops_no_connection_and_a_crash_in_the_middle_of_it_loses_nothing(tmp_path: Path) -> None:
    opened: list[float] = []
    trace = aiohttp.TraceConfig()

    async def on_open(_: object, __: object, ___: object) -> None:
        opened.append(asyncio.get_running_loop().time())

    trace.on_connection_create_end.append(on_open)
    async with (
        world(tmp_path, FAST) as (shim, controller),
        aiohttp.ClientSession(trace_configs=[trace], headers=AUTH, connector=aiohttp.TCPConnector(limit=1)) as agent,
    ):
        shim.write(config(controller.url))
        await shim.start()
        cluster_id = await register(agent, shim)
        for mode in ("http", "auto", "websocket"):
            shim.write(config(controller.url, mode=mode))
            shim.send(signal.SIGHUP)
            await shim.event("config_reloaded", mode=mode)
            assert await heartbeat(agent, shim, cluster_id) == 200
        assert len(opened) == 1
        await controller.api.push({"id": "before-the-crash", "cluster_id": cluster_id})
        await shim.event("command_queued")
        shim.write(config(controller.url, mode="http"))
        shim.send(signal.SIGHUP)
        await shim.kill()
        await shim.start()
        assert shim.events("serving")[-1]["mode"] == "http"
        await controller.control("POST", "/control/legacy/commands", {"ident": cluster_id, "id": "after-it"})
        assert await drain(agent, shim, cluster_id) == ["before-the-crash", "after-it"]
