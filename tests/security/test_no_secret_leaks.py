"""Everything that a full run writes, at level debug, with marked secrets in every place that may hold one."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio

from tests.support.processes import Controller, Shim, world
from tests.support.proxies import ForwardProxy, forward_proxy

TOKEN = "canary-token-of-the-upstream"
REFUSED = "canary-token-that-is-refused"
OWN = "canary-token-of-an-agent"
ADMIN = "canary-token-of-the-admin-port"
PROXY = "canary-password-of-the-proxy"
QUERY = "canary-query-of-the-upstream-url"
GATEWAY = "canary-query-of-the-gateway"
SERVICE = "canary-k8s-service-token"
NAMED = "canary-token-named-token"
MONITORING = "canary-password-of-the-monitoring"
TUNNEL = "canary-credentials-of-the-tunnel"
AGENT_QUERY = "canary-query-of-an-agent"
REPLY = "canary-token-in-a-register-reply"
ECHO = "canary-in-a-malformed-body"
CANARY = re.compile(rb"canary-[a-z0-9-]+")

REGISTER = {
    "agent_id": "agent-1",
    "name": "prod-cluster",
    "k8s_service_token": SERVICE,
    "token": NAMED,
    "grafana_password": MONITORING,
    "prometheus_password": MONITORING,
    "metadata": {"agent_mode": "vm-agent", "api_token": MONITORING},
}
HEARTBEAT = {
    "agent_id": "agent-1",
    "status": "healthy",
    "prometheus_url": "http://p",
    "prometheus_password": MONITORING,
}


class Written:
    """What came out of a run, by place."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}

    def add(self, place: str, text: bytes) -> None:
        self.texts[f"{len(self.texts)} {place}"] = text

    def leaks(self) -> dict[str, set[bytes]]:
        return {place: set(found) for place, text in self.texts.items() if (found := CANARY.findall(text))}


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


class Caller:
    """Calls the shim as an agent does and keeps the bodies of refusals: the agent's own answers are its own."""

    def __init__(self, http: aiohttp.ClientSession, shim: Shim, token: str, written: Written) -> None:
        self._http = http
        self._shim = shim
        self._written = written
        self.headers = {"Authorization": f"Bearer {token}"}

    async def call(self, method: str, path: str, body: Any = None, *statuses: int, **headers: str) -> Any:
        """Call and expect one of the statuses, 200 where none is given."""
        options: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": body}
        url = f"{self._shim.url}{path}"
        async with self._http.request(method, url, headers={**self.headers, **headers}, **options) as response:
            data = await response.read()
            assert response.status in (statuses or (200,)), (path, data)
            told = "\n".join(f"{name}: {value}" for name, value in response.headers.items()).encode()
            self._written.add(f"headers of {path}", told)
            if response.status >= 400:
                self._written.add(f"error of {path}", data)
                return None
            return await response.json() if data else None


async def misbehave(agent: Caller, cluster_id: str) -> None:
    """What is refused must not be echoed."""
    base = f"/api/v1/clusters/agent/{cluster_id}"
    await agent.call("POST", f"{base}/heartbeat", f'{{"status": "{ECHO}"'.encode(), 400)
    await agent.call("POST", f"{base}/heartbeat", f'["{ECHO}"]'.encode(), 400)
    # An unknown path is shown, so that a wrong base path can be seen; its query never is.
    await agent.call("GET", f"/nowhere?token={AGENT_QUERY}&{ECHO}", None, 404)
    await agent.call("GET", f"/api/v1/clusters/agent/register?token={AGENT_QUERY}", None, 405)
    await agent.call("GET", f"{base}/poll", None, 401, Authorization=f"Bearer {ECHO} {ECHO}")
    await agent.call("GET", f"{base}/poll", None, 403, Origin=f"https://{ECHO}")
    await agent.call("GET", f"{base}/poll", None, 403, Host=f"{ECHO}.test")


async def work(agent: Caller, shim: Shim, controller: Controller) -> str:
    """Register, heartbeat, fetch a command and answer it."""
    reply = await agent.call("POST", "/api/v1/clusters/agent/register", REGISTER)
    cluster_id = str(reply["cluster_id"])
    base = f"/api/v1/clusters/agent/{cluster_id}"
    await agent.call("POST", f"{base}/heartbeat?token={AGENT_QUERY}", HEARTBEAT)
    tunnel = {"cluster_id": cluster_id, "status": "REQUIRED", "credentials": TUNNEL}
    message = {"type": "tunnel_status", "payload": tunnel}
    await controller.control("POST", "/control/send", {"message": message, "cluster_id": cluster_id})
    pushed = await controller.api.push({"cluster_id": cluster_id, "type": "scale", "payload": {"replicas": 3}})
    await shim.event("command_queued", command=pushed["id"])
    commands = (await agent.call("GET", f"{base}/poll"))["commands"]
    assert [command["id"] for command in commands] == [pushed["id"]]
    await agent.call("POST", f"{base}/commands/{pushed['id']}/result", {"success": True, "output": "done"})
    while not shim.events("result_closed"):  # an acknowledged heartbeat tells that the controller has it
        await agent.call("POST", f"{base}/heartbeat", HEARTBEAT)
    return cluster_id


async def admin_pages(http: aiohttp.ClientSession, shim: Shim, command_id: str, written: Written) -> None:
    """Every page of the admin port, with the token, with a wrong one, without."""
    data = ("/status.json", "/config.json", f"/commands/{command_id}.json")
    paths = ("/", "/metrics", "/readyz", *data, "/nothing", "/status.js")
    for token in ("", ECHO, ADMIN):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        for path in paths:
            async with http.get(f"{shim.admin}{path}", headers=headers) as response:
                written.add(f"admin {path} {response.status}", await response.read())
        async with http.post(f"{shim.admin}/commands/{command_id}/purge", headers=headers) as response:
            written.add(f"admin purge {response.status}", await response.read())


def files(folder: Path) -> list[tuple[str, bytes]]:
    """The store's files, for nobody else's eyes; without the tunnel's credentials, which must survive a restart."""
    paths = list(folder.glob("agent-shim.db*"))
    assert {path.stat().st_mode & 0o077 for path in paths} == {0}
    return [(path.name, path.read_bytes().replace(TUNNEL.encode(), b"")) for path in paths]


async def through_trouble(agent: Caller, shim: Shim, controller: Controller, cluster_id: str, folder: Path) -> None:
    """Errors that quote secrets, a gateway, a refused token, a controller that goes away."""
    heartbeat = f"/api/v1/clusters/agent/{cluster_id}/heartbeat"
    other = {"agent_id": "agent-2", "name": "other", "k8s_service_token": SERVICE}
    for quoted in (TOKEN, SERVICE):
        fault = {"kind": "register_error", "error": f"validation failed for {quoted}", "count": 1}
        await controller.control("POST", "/control/faults", fault)
        await agent.call("POST", "/api/v1/clusters/agent/register", other, 400)
    for message in (
        {"type": "error", "payload": {"error": f"rejected: Bearer {TOKEN}"}},
        {"type": "news", "payload": {"token": ECHO}},
        {"type": "command", "payload": {"cluster_id": cluster_id, "command_id": 7, "type": {"secret": ECHO}}},
    ):
        await controller.control("POST", "/control/send", {"message": message})
    await controller.control("POST", "/control/send", {"text": f'{{"type": "{ECHO}'})
    await shim.event("frame_ignored")
    gateway = f"ws://{controller.address}/gateway/ws?session={GATEWAY}"
    await controller.control("POST", "/control/faults", {"kind": "gateway", "url": gateway, "count": 1})
    await agent.call("POST", "/api/v1/clusters/agent/register", REGISTER)
    await shim.event("gateway_open")

    after = len(shim.lines)
    (folder / "token").write_text(REFUSED)
    await shim.event("token_refused", after)
    await agent.call("POST", heartbeat, HEARTBEAT, 401, 200)  # or already by HTTP, with the agent's own token
    after = len(shim.lines)
    (folder / "token").write_text(TOKEN)
    await shim.event("link_state", after, state="online")
    await agent.call("POST", heartbeat, HEARTBEAT)
    after = len(shim.lines)
    await controller.kill()
    await shim.event("link_lost", after)
    await fail_over(agent, heartbeat, shim, after)
    await controller.start()
    await shim.event("link_state", after, state="online")


async def fail_over(agent: Caller, heartbeat: str, shim: Shim, after: int) -> None:
    """Heartbeat until calls go by HTTP, where only the proxy answers."""
    while not any('"failover"' in line for line in shim.lines[after:]):
        await agent.call("POST", heartbeat, HEARTBEAT, 200, 502)
    await agent.call("POST", heartbeat, HEARTBEAT, 200, 502)


@asynccontextmanager
async def watched(folder: Path, controller: Controller, more: dict[str, Any], written: Written) -> AsyncIterator[Shim]:
    """A shim at level debug; what it has written is kept, before and after its end."""
    async with Shim(folder, {"poll": {"hold": "off"}, "log": {"level": "debug"}, **more}) as shim:
        await shim.start()
        yield shim
        for name, data in files(folder):
            written.add(name, data)
        await shim.stop()
        for name, data in files(folder):
            written.add(name, data)
        written.add("log", "\n".join(shim.lines).encode())


async def test_a_configured_token(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    written = Written()
    for name, secret in (("token", TOKEN), ("admin-token", ADMIN)):
        (tmp_path / name).write_text(secret + "\n")
    passed = ForwardProxy()
    async with forward_proxy(passed) as proxy, world(tmp_path, None, "--token", TOKEN) as (_, controller):
        more = {
            "upstream": {
                "url": f"{controller.url}?key={QUERY}",
                "token_file": str(tmp_path / "token"),
                "proxy": f"http://someone:{PROXY}@{proxy}",
                "heartbeat_interval_s": 2.0,
            },
            "admin": {"port": 0, "token_file": str(tmp_path / "admin-token")},
            "mode": "auto",
            "fallback": {"url": controller.url, "after_s": 0.1, "hold_down_s": 0.1},
        }
        async with watched(tmp_path, controller, more, written) as shim:
            agent = Caller(http, shim, TOKEN, written)
            cluster_id = await work(agent, shim, controller)
            await misbehave(agent, cluster_id)
            await through_trouble(agent, shim, controller, cluster_id, tmp_path)
            await admin_pages(http, shim, shim.events("command_queued")[0]["command"], written)
    credentials = base64.b64encode(f"someone:{PROXY}".encode()).decode()
    for secret in (credentials, QUERY, GATEWAY, TOKEN, REFUSED):
        assert any(secret in head for head in passed.heads), "the secret was used"
    assert b'"level": "debug"' in list(written.texts.values())[-1]
    assert written.leaks() == {}


async def test_tokens_of_agents(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    written = Written()
    async with world(tmp_path, None, "--token", OWN) as (_, controller):
        more = {"upstream": {"url": controller.url, "heartbeat_interval_s": 2.0, "auth": "query"}}
        async with watched(tmp_path, controller, more, written) as shim:
            cluster_id = await work(Caller(http, shim, OWN, written), shim, controller)
            refused = Caller(http, shim, REFUSED, written)
            await refused.call("POST", "/api/v1/clusters/agent/register", REGISTER, 401)
            await refused.call("GET", f"/api/v1/clusters/agent/{cluster_id}/poll", None, 401)
            await admin_pages(http, shim, shim.events("command_queued")[0]["command"], written)
            await controller.kill()
            await shim.event("link_lost")
    assert written.leaks() == {}
