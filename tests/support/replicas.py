"""Replicas of a gateway as processes, on a real PostgreSQL, with the development controller and agents over HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.processes import Controller, Shim

TOKENS = "agent-token-"
ADMIN_TOKEN = "admin-token-of-a-person"
SHARDS = 16
WAIT_S = 90.0
HEADERS = {"User-Agent": "Go-http-client/1.1"}


def token(number: int) -> str:
    """The own token of an agent."""
    return f"{TOKENS}{number}"


def any_certificate() -> ssl.SSLContext:
    """A client's context that trusts everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Agent:
    """An agent with a token of its own, whose every call may go to another replica."""

    def __init__(self, http: aiohttp.ClientSession, number: int) -> None:
        self._http = http
        self.name = f"cluster-{number}"
        self.agent_id = f"agent-{number}"
        self.cluster_id = ""
        self.headers = {"Authorization": f"Bearer {token(number)}"}

    def through(self, http: aiohttp.ClientSession) -> None:
        """Call by these connections from now on."""
        self._http = http

    async def call(self, replica: Shim, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded body."""
        return await self.raw(replica, method, f"/api/v1/clusters/agent/{path}", body)

    async def raw(self, replica: Shim, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The same with a whole path."""
        url = f"{replica.url}{path}"
        sent = None if body is None else io.BytesIO(json.dumps(body).encode())
        async with self._http.request(method, url, data=sent, headers=self.headers) as response:
            data = await response.read()
            return response.status, json.loads(data) if data else None

    def websocket(self, replica: Shim) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """A connection as a newer agent makes it, with the same token."""
        return self._http.ws_connect(f"{replica.url}/api/v1/clusters/agent/ws", headers=self.headers)

    async def register(self, replica: Shim) -> None:
        """Until it is registered, as agents do."""
        async with asyncio.timeout(WAIT_S):
            while True:
                body = {"agent_id": self.agent_id, "name": self.name}
                status, reply = await self.call(replica, "POST", "register", body)
                if status == 200:
                    self.cluster_id = reply["cluster_id"]
                    return
                assert status == 503, reply
                await asyncio.sleep(0.2)

    async def heartbeat(self, replica: Shim) -> int:
        """The status."""
        body = {"cluster_id": self.cluster_id, "agent_id": self.agent_id, "status": "healthy"}
        status, _ = await self.call(replica, "POST", f"{self.cluster_id}/heartbeat", body)
        return status

    async def poll(self, replica: Shim) -> list[str]:
        """The ids of the commands."""
        status, reply = await self.call(replica, "GET", f"{self.cluster_id}/poll")
        assert status == 200, reply
        return [command["id"] for command in reply["commands"]]

    async def poll_until(self, replica: Shim, command: str) -> list[str]:
        """Poll as agents do, until a command has come; all that came."""
        found: list[str] = []
        async with asyncio.timeout(WAIT_S):
            while command not in found:
                status, reply = await self.call(replica, "GET", f"{self.cluster_id}/poll")
                if status == 503:  # on a busy machine a lease may end
                    await asyncio.sleep(0.2)
                    continue
                assert status == 200, reply
                found += [each["id"] for each in reply["commands"]]
        return found

    async def result(self, replica: Shim, command: str) -> int:
        """Post a result until it is taken; the number of tries."""
        async with asyncio.timeout(WAIT_S):
            tries = 0
            while True:
                tries += 1
                path = f"{self.cluster_id}/commands/{command}/result"
                status, reply = await self.call(replica, "POST", path, {"success": True, "output": "done"})
                if status < 300:
                    return tries
                assert status == 503, reply
                await asyncio.sleep(0.2)


class Gateway:
    """Replicas by name, their controller and their agents."""

    def __init__(
        self, folder: Path, controller: Controller, http: aiohttp.ClientSession, config: dict[str, Any]
    ) -> None:
        self._folder = folder
        self._config = config
        self._http = http
        self._stack = AsyncExitStack()
        self.controller = controller
        self.replicas: dict[str, Shim] = {}

    def configure(self, **config: Any) -> None:
        """Change sections of the replicas that are started from now on."""
        self._config |= config

    async def do(self, replica: Shim, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Carry out an operator's action on the admin port."""
        async with self._http.request(method, replica.admin + path, json=body) as response:
            return response.status, await response.json()

    async def until_drain(self, replica: Shim, *states: str) -> None:
        """Wait until the drain of all replicas is in one of these states, as this one sees it."""
        async with asyncio.timeout(WAIT_S):
            while (await self.admin(replica, "/status.json"))["drain"]["state"] not in states:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def add(self, *names: str) -> list[Shim]:
        """Start replicas, side by side."""
        added = []
        for name in names:
            folder = self._folder / name
            folder.mkdir(exist_ok=True)
            config = self._config | {"cluster": self._config["cluster"] | {"replica": name}}
            shim = await self._stack.enter_async_context(Shim(folder, config))
            self.replicas[name] = shim
            added.append(shim)
        await asyncio.gather(*(shim.start() for shim in added))
        return added

    def agent(self, number: int) -> Agent:
        """Agents share no connection: how one goes on is evidence."""
        http = aiohttp.ClientSession(timeout=self._http.timeout, headers=HEADERS)
        self._stack.push_async_callback(http.close)
        return Agent(http, number)

    async def status(self, replica: Shim) -> dict[str, Any]:
        """Return the part of its status about replicas."""
        async with self._http.get(f"{replica.admin}/status.json") as response:
            return dict((await response.json())["replicas"])

    async def until(self, replica: Shim, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the view of a replica fits."""
        async with asyncio.timeout(WAIT_S):
            while True:
                status = await self.status(replica)
                if fits(status):
                    return status
                await asyncio.sleep(0.05)

    async def settled(self, *replicas: Shim) -> list[int]:
        """Wait until exactly these replicas have all shards between them, evenly; how many each has."""
        async with asyncio.timeout(WAIT_S):
            while True:
                seen = [await self.status(replica) for replica in replicas]
                owned = [len(each["owned"]) for each in seen]
                if sum(owned) == seen[0]["shards"] and max(owned) - min(owned) <= 1:
                    return owned
                await asyncio.sleep(0.05)

    async def owner(self, agent: Agent) -> Shim:
        """The replica that has an agent's session."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for replica in self.replicas.values():
                    async with self._http.get(f"{replica.admin}/status.json") as response:
                        status = await response.json()
                    if any(each["id"] == agent.cluster_id for each in status["sessions"]["items"]):
                        return replica
                await asyncio.sleep(0.05)

    async def push(self, agent: Agent, command: str) -> None:
        """Have the controller send a command, as soon as the agent is there."""
        async with asyncio.timeout(WAIT_S):
            while True:
                spec = {"cluster_id": agent.cluster_id, "id": command, "type": "command", "payload": {"n": 1}}
                async with self._http.post(f"{self.controller.url}/control/commands", json=spec) as response:
                    if response.status < 300:
                        return
                await asyncio.sleep(0.1)

    async def trace(self, replica: Shim, command: str) -> list[dict[str, Any]]:
        """Return the trace of a command, from whichever replica has it."""
        async with self._http.get(f"{replica.admin}/commands/{command}.json") as response:
            return list((await response.json())["commands"]) if response.status == 200 else []

    async def until_state(self, replica: Shim, command: str, *states: str) -> dict[str, Any]:
        """Wait until a command is in one of these states."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for found in await self.trace(replica, command):
                    if found["state"] in states:
                        return found
                await asyncio.sleep(0.05)

    async def admin(self, replica: Shim, path: str) -> Any:
        """JSON of the admin port."""
        async with self._http.get(replica.admin + path) as response:
            return await response.json()

    async def until_online(self, replica: Shim) -> None:
        """Wait until a replica has a link to the controller."""
        async with asyncio.timeout(WAIT_S):
            while not (await self.admin(replica, "/status.json"))["links"]["online"]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def until_websocket_agents(self, replica: Shim, number: int) -> None:
        """Wait until a replica knows of so many agents that speak WebSocket by themselves."""
        async with asyncio.timeout(WAIT_S):
            while len((await self.admin(replica, "/status.json"))["websocket_agents"]["items"]) != number:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def until_ready(self, replica: Shim) -> None:
        """Wait until Kubernetes would send agents there."""
        async with asyncio.timeout(WAIT_S):
            while True:
                if await self.admin(replica, "/readyz") == {"status": "ready"}:
                    return
                await asyncio.sleep(0.1)

    async def metrics(self, replica: Shim) -> str:
        """Return the metrics as Prometheus reads them."""
        async with self._http.get(f"{replica.admin}/metrics") as response:
            return await response.text()

    async def until_held(self, replica: Shim, polls: int = 1) -> None:
        """Wait until a replica's own bridges hold so many polls."""
        async with asyncio.timeout(WAIT_S):
            while True:
                if f"agent_shim_polls_held {float(polls)}" in await self.metrics(replica):
                    return
                await asyncio.sleep(0.02)

    async def aclose(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def gateway(folder: Path, url: str, lease_s: float = 5, **config: Any) -> AsyncIterator[Gateway]:
    """A gateway without replicas yet, on the database of `url`, whose agents have tokens of their own."""
    options = ("--token-prefix", TOKENS, "--journal", str(folder / "journal.jsonl"))
    timeout = aiohttp.ClientTimeout(total=WAIT_S)
    (folder / "admin-token").write_text(ADMIN_TOKEN)
    person = HEADERS | {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=person) as http,
        Controller(folder, http, *options) as controller,
    ):
        await controller.start()
        settings = {
            "upstream": {"url": controller.url},
            "admin": {"port": 0, "token_file": str(folder / "admin-token")},
            "store": {"url": url},
            "cluster": {"port": 0, "lease_s": lease_s},
            "commands": {"evidence_s": 60},
            **config,
        }
        made = Gateway(folder, controller, http, settings)
        try:
            yield made
        finally:
            await made.aclose()


# --- what happened ----------------------------------------------------------------------------------------------------


ENDED = ("answered", "closed")
"""The controller has the result, or will: a connection that acknowledges heartbeats must do so once more."""


LONG = {"hold": 25, "max_hold_s": 25}


def events(found: dict[str, Any]) -> list[str]:
    return [step["event"] for step in found["trace"]]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def assert_no_double_owner(folder: Path) -> int:
    """Once a token's next connection was opened, nothing comes in on the one before. Returns how many were next."""
    opened: dict[str, list[tuple[float, int]]] = defaultdict(list)
    last: dict[int, float] = {}
    for event in journal(folder):
        if event["kind"] == "opened":
            opened[event["owner"]].append((event["monotonic_s"], event["connection"]))
        elif event["kind"] in ("received", "ping_received"):
            last[event["connection"]] = event["monotonic_s"]
    successors = 0
    for connections in opened.values():
        for (_, before), (next_at, _) in pairwise(connections):
            assert last.get(before, 0.0) < next_at, "two owners sent at once"
            successors += 1
    return successors


async def pair_with_agent(gate: Gateway) -> tuple[Agent, Shim, Shim]:
    """Start the replicas a and b, and register an agent: it, the owner of its shard, and the other replica."""
    a, b = await gate.add("a", "b")
    await gate.settled(a, b)
    agent = gate.agent(1)
    await agent.register(a)
    return agent, *await elsewhere(gate, agent)


async def elsewhere(gate: Gateway, agent: Agent) -> tuple[Shim, Shim]:
    """The owner of an agent's shard, and another replica."""
    owner = await gate.owner(agent)
    return owner, next(replica for replica in gate.replicas.values() if replica is not owner)


async def owned_by(gate: Gateway, replica: Shim, agents: list[Agent]) -> list[Agent]:
    return [agent for agent in agents if await gate.owner(agent) is replica]
