"""The admin port of a real shim over HTTP: what it shows to whom, and what may be changed."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import trustme

from tests.support.processes import TOKEN, Controller, Shim, world

ADMIN_TOKEN = "the-admin-token-of-this-test"
REGISTER = {"agent_id": "agent-1", "name": "prod-cluster"}
DATA = ("/status.json", "/config.json", "/events", "/commands/k1.json")
CHANGES = (
    ("POST", "/commands/k1/purge"),
    ("POST", "/commands/k1/redeliver"),
    ("POST", "/agents/a1/forget"),
    ("POST", "/drain"),
    ("DELETE", "/drain"),
)


class Asker:
    """Asks one admin port."""

    def __init__(self, http: aiohttp.ClientSession, base: str) -> None:
        self._http = http
        self._base = base

    async def __call__(
        self, path: str, method: str = "GET", token: str = "", body: Any = None, **headers: str
    ) -> tuple[int, Any]:
        """Status, and the JSON or text of the answer."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        async with self._http.request(method, self._base + path, headers=sent, data=data) as response:
            if response.content_type == "text/event-stream":
                return response.status, None
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text


async def register(http: aiohttp.ClientSession, shim: Shim) -> str:
    async with http.post(f"{shim.url}/api/v1/clusters/agent/register", json=REGISTER) as response:
        return str((await response.json())["cluster_id"])


async def heartbeat(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> None:
    body = {"cluster_id": cluster_id, "agent_id": "agent-1", "status": "healthy"}
    async with http.post(f"{shim.url}/api/v1/clusters/agent/{cluster_id}/heartbeat", json=body) as response:
        assert response.status < 300


async def poll(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> list[str]:
    async with http.get(f"{shim.url}/api/v1/clusters/agent/{cluster_id}/poll") as response:
        return [command["id"] for command in (await response.json())["commands"]]


async def answer(http: aiohttp.ClientSession, shim: Shim, cluster_id: str, command_id: str) -> None:
    path = f"/api/v1/clusters/agent/{cluster_id}/commands/{quote(command_id, safe='')}/result"
    body = {"success": True, "output": "in-the-output"}
    async with http.post(shim.url + path, json=body) as response:
        assert response.status < 300


def with_token(folder: Path) -> dict[str, Any]:
    (folder / "admin-token").write_text(ADMIN_TOKEN + "\n")
    return {"admin": {"port": 0, "token_file": str(folder / "admin-token")}, "poll": {"hold": "off"}}


# --- who may see what -------------------------------------------------------------------------------------------------


async def test_without_a_token_it_may_be_read_and_nothing_changed(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        ask = Asker(http, shim.admin)
        status, page = await ask("/")
        assert (status, 'data-token="none"' in page) == (200, True)
        assert (await ask("/status.json"))[1]["token_required"] is False
        assert (await ask("/commands/k1.json"))[0] == 404
        for method, path in CHANGES:
            status, refusal = await ask(path, method)
            assert (status, "admin.token_file" in refusal["error"]) == (403, True)
        assert await ask("/nowhere") == (404, {"error": "not found"})
        assert await ask("/agents%2F%7Bid%7D%2Fforget", "POST") == (404, {"error": "not found"})
        assert (await ask("/status.json", "POST"))[0] == 405
        assert await shim.stop() == 0


async def test_with_a_token_all_but_health_and_metrics_is_closed(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, _):
        await shim.start()
        ask = Asker(http, shim.admin)
        for path in ("/healthz", "/readyz", "/metrics", "/", "/status.js", "/status.css", "/uplot.js", "/icon.svg"):
            assert (await ask(path))[0] == 200
        assert 'data-token="required"' in (await ask("/"))[1]
        for method, path in (*(("GET", path) for path in DATA), *CHANGES):
            for wrong in ("", "wrong", TOKEN):
                status, refusal = await ask(path, method, wrong)
                assert (status, "token" in refusal["error"]) == (401, True), path
        assert (await ask("/status.json", token=ADMIN_TOKEN))[0] == 200
        assert (await ask("/drain", "DELETE", ADMIN_TOKEN))[0] == 200
        # another token counts from now on, and without one nobody gets in
        (tmp_path / "admin-token").write_text("another-token")
        assert (await ask("/status.json", token=ADMIN_TOKEN))[0] == 401
        assert (await ask("/status.json", token="another-token"))[0] == 200
        (tmp_path / "admin-token").unlink()
        status, refusal = await ask("/status.json", token="another-token")
        assert (status, "admin.token_file" in refusal["error"]) == (503, True)
        await shim.stop()
        assert ADMIN_TOKEN not in "\n".join(shim.lines)


async def test_other_sites_pages_and_other_hosts_names_get_nothing(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    config = with_token(tmp_path)
    config["admin"]["allowed_hosts"] = ["status.example"]
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        ask = Asker(http, shim.admin)
        host = shim.admin.removeprefix("http://")
        for allowed in (
            {},
            {"Sec_Fetch_Site": "same-origin", "Origin": shim.admin},
            {"Sec_Fetch_Site": "none"},
            {"Host": f"localhost:{host.rpartition(':')[2]}"},
            {"Host": "10.1.2.3:7090"},
            {"Host": "status.example"},
        ):
            assert (await ask("/status.json", token=ADMIN_TOKEN, **allowed))[0] == 200, allowed
        for foreign in (
            {"Host": "rebound.example"},
            {"Host": "rebound.localhost"},
            {"Host": f"rebound.example:{host.rpartition(':')[2]}"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
        ):
            for method, path in (("GET", "/status.json"), ("GET", "/events"), *CHANGES):
                assert (await ask(path, method, ADMIN_TOKEN, **foreign))[0] == 403, (path, foreign)
        # a link on another site may lead to the page, which holds no data; a foreign name may not
        assert (await ask("/", Sec_Fetch_Site="cross-site"))[0] == 200
        assert (await ask("/", Host="rebound.example"))[0] == 403
        # probes and Prometheus call by whatever name they have
        assert (await ask("/metrics", Host="agent-shim.prod.svc"))[0] == 200
        assert await shim.stop() == 0


async def test_every_answer_keeps_browsers_in_bounds(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        for path in ("/", "/status.json", "/events", "/nowhere", "/commands/k1.json", "/uplot.LICENSE"):
            async with http.get(shim.admin + path) as response:
                headers = response.headers
                policy = dict(
                    part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";")
                )
                assert policy["default-src"] == "'none'"
                assert {policy[key] for key in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
                assert {policy[key] for key in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert headers["Referrer-Policy"] == "no-referrer"
                assert headers["Cache-Control"] == "no-store"
                assert "aiohttp" not in headers["Server"]
                assert not [name for name in headers if name.lower().startswith("access-control")]
        async with http.get(shim.admin + "/uplot.LICENSE") as response:
            assert "MIT License" in await response.text()
        async with http.get(shim.admin + "/") as response:
            page = await response.text()
        # nothing inline, nothing from elsewhere
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|https?://|//", page)
        assert await shim.stop() == 0


# --- events -----------------------------------------------------------------------------------------------------------


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    name = ""
    async for line in response.content:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


async def test_events_follow_the_link_and_end_with_the_shim(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path) as (shim, controller):
        await shim.start()
        await register(http, shim)
        async with http.get(shim.admin + "/events") as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            stream = events(response)
            name, series = await anext(stream)
            assert (name, set(map(len, series.values()))) == ("series", {len(series["at"])})
            await controller.kill()
            async with asyncio.timeout(60):
                async for name, data in stream:
                    if name == "status" and data["links"]["items"][0]["phase"] == "down":
                        break
                async for name, data in stream:
                    if name == "samples":
                        assert len(data["at"]) == 1
                        break
            # an open page does not keep the shim from stopping
            assert await shim.stop() == 0


async def test_a_page_too_many_is_refused_and_one_that_left_makes_room(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path) as (shim, _), aiohttp.ClientSession() as pages:
        await shim.start()
        ask = Asker(http, shim.admin)
        opened = [await pages.get(shim.admin + "/events") for _ in range(16)]
        assert {response.status for response in opened} == {200}
        assert (await ask("/events"))[0] == 503
        opened[0].close()
        async with asyncio.timeout(60):
            while (await ask("/events"))[0] != 200:
                pass
        for response in opened:
            response.close()
        assert await shim.stop() == 0


# --- single commands --------------------------------------------------------------------------------------------------


async def trace_of(ask: Asker, command_id: str, *events: str) -> dict[str, Any]:
    """The command, once its trace holds these events."""
    async with asyncio.timeout(60):
        while True:
            status, found = await ask(f"/commands/{quote(command_id, safe='')}.json", token=ADMIN_TOKEN)
            if status == 200 and set(events) <= {step["event"] for step in found["commands"][0]["trace"]}:
                (command,) = found["commands"]
                assert isinstance(command, dict)
                return command


async def test_a_trace_tells_the_whole_life_without_payload(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, controller):
        await shim.start()
        ask = Asker(http, shim.admin)
        cluster_id = await register(http, shim)
        await heartbeat(http, shim, cluster_id)
        odd = "job:7 é&b.json"
        command = {"id": odd, "cluster_id": cluster_id, "type": "exec", "payload": {"secret": "in-the-payload"}}
        await controller.api.push(command)
        waiting = await trace_of(ask, odd, "arrived")
        assert (waiting["state"], waiting["type"], waiting["session"]["id"]) == ("queued", "exec", cluster_id)
        assert await poll(http, shim, cluster_id) == [odd]
        await answer(http, shim, cluster_id, odd)
        await heartbeat(http, shim, cluster_id)
        done = await trace_of(ask, odd, "arrived", "offered", "result")
        assert (done["agent"], done["attempts"], done["result"]) == ("prod-cluster", 1, {"success": True, "code": None})
        times = [step["at"] for step in done["trace"]]
        assert times == sorted(times)
        assert "in-the-" not in json.dumps(done)
        assert await shim.stop() == 0


async def waiting_command(http: aiohttp.ClientSession, shim: Shim, controller: Controller, command_id: str) -> str:
    cluster_id = await register(http, shim)
    await heartbeat(http, shim, cluster_id)
    await controller.api.push({"id": command_id, "cluster_id": cluster_id})
    await shim.event("command_queued", command=command_id)
    return cluster_id


async def test_purge_redeliver_and_drain_over_http(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, controller):
        await shim.start()
        ask = Asker(http, shim.admin)
        cluster_id = await waiting_command(http, shim, controller, "k1")

        async def order(path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
            return await ask(path, method, ADMIN_TOKEN, body)

        status, answered = await order("/commands/k1/purge", {"reason": "a test"})
        assert (status, answered["command"]["state"]) == (200, "dead")
        assert (await order("/commands/k1/purge"))[0] == 409
        assert (await order("/commands/nobody/purge"))[0] == 404
        assert (await order("/commands/k1/redeliver", {"session": "another"}))[0] == 404
        status, answered = await order("/commands/k1/redeliver", {"session": cluster_id})
        assert (status, answered["command"]["state"]) == (200, "queued")

        for body in (b"{", {"timeout_s": 0}, {"timeout_s": "soon"}, {"unknown": 1}, []):
            assert (await order("/drain", body))[0] == 400
        assert (await order("/drain", b"x" * 100_000))[0] == 413
        status, answered = await order("/drain", {"timeout_s": 60})
        assert (status, answered["drain"]["state"], answered["drain"]["commands"]) == (200, "draining", 1)
        assert (await ask("/readyz"))[1]["reasons"] == ["draining"]
        assert await poll(http, shim, cluster_id) == ["k1"]
        await answer(http, shim, cluster_id, "k1")
        status, answered = await order("/drain", method="DELETE")
        assert (status, answered["drain"]["state"]) == (200, "off")
        assert (await ask("/readyz"))[0] == 200
        assert await shim.stop() == 0


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_address_that_it_says_agents_need_leads_to_the_shim(tmp_path: Path, host: str, tls: bool) -> None:
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    listen: dict[str, Any] = {"host": host, "port": 0}
    if tls:
        authority.issue_cert(host).private_key_and_cert_chain_pem.write_to_path(tmp_path / "tls.pem")
        listen["tls"] = dict.fromkeys(("cert_file", "key_file"), str(tmp_path / "tls.pem"))
    config = {"listen": listen, "admin": {"host": host, "port": 0}}
    async with world(tmp_path, config) as (shim, _), aiohttp.ClientSession() as http:
        await shim.start()
        await shim.event("link_state", state="online")
        _, status = await Asker(http, shim.admin)("/status.json")
        url = status["agents_url"]
        assert status["overall"]["text"] == f"No agent has called yet. Set the agent's PIPEOPS_API_URL to {url}."
        async with http.get(f"{url}/api/v1/health", ssl=context) as response:
            assert response.status == 200
