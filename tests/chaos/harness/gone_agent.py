"""Print as JSON what the shim takes for evidence when an agent on another machine goes, and polls from elsewhere.

`python -m tests.chaos.harness.gone_agent`
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from tests.support import network
from tests.support.processes import TOKEN, Controller, Shim, world

AGAIN_S = 1.0  # a poll that overlaps with the reply before it shows nothing, so the next one must not wait for long
BASE = "/api/v1/clusters/agent"
# Of the far agent in each case.
PORTS = {"unreachable": 4441, "unread": 4442, "read": 4443, "returned": 4444, "closed": 4445}
# By default, the kernel ends a connection after so many keep-alive probes without an answer.
PROBES = 2
_AGENT = """
import os, select, signal, socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), source_address=("", int(sys.argv[4])))
connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
connection.sendall(sys.argv[3].encode())
print("sent", flush=True)
for line in sys.stdin:
    if line == "wait\\n":
        connection.recv(1, socket.MSG_PEEK)
    if line == "read\\n":
        connection.recv(65536)
    if line.startswith("stop "):
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        poll.poll()
        os.kill(int(line.split()[1]), signal.SIGSTOP)
    if line == "ask\\n":
        connection.sendall(sys.argv[3].encode())
    print("done", flush=True)
"""


class FarAgent:
    """An agent on the far host, with a poll that waits on a connection from a known port."""

    def __init__(self, far: network.Host, shim: Shim, cluster_id: str, own_port: int, more: str) -> None:
        port = shim.url.rpartition(":")[2]
        head = f"GET {BASE}/{cluster_id}/poll HTTP/1.1\r\nHost: {network.NEAR_ADDRESS}\r\nAuthorization: Bearer {TOKEN}"
        self._process = subprocess.Popen(
            [
                *far.inside,
                sys.executable,
                "-c",
                _AGENT,
                network.NEAR_ADDRESS,
                port,
                f"{head}\r\n{more}\r\n",
                str(own_port),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the far agent ended"

    def do(self, what: str) -> None:
        """`wait` for a reply without reading it, `read` it, `ask` again, or `stop PID`, a process, at its FIN."""
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        self._answer()

    def kill(self) -> None:
        """End the process; its kernel closes the connection."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def far_agent(far: network.Host, shim: Shim, cluster_id: str, own_port: int, more: str) -> Iterator[FarAgent]:
    """A far agent that is gone with the block."""
    agent = FarAgent(far, shim, cluster_id, own_port, more)
    try:
        yield agent
    finally:
        agent.kill()


async def poll(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> list[str]:
    """Poll as the agent's successor does, on another connection."""
    async with http.get(f"{shim.url}{BASE}/{cluster_id}/poll") as response:
        return [each["id"] for each in (await response.json())["commands"]]


async def evidence(http: aiohttp.ClientSession, shim: Shim, cluster_id: str, command_id: str) -> str:
    """Poll until the command is delivered or comes again: what showed that it was read, or `offered again`."""
    delivered = asyncio.create_task(shim.event("command_delivered", command=command_id))
    async with asyncio.timeout(100):
        while not delivered.done():
            polling = asyncio.create_task(poll(http, shim, cluster_id))
            await asyncio.wait((polling, delivered), timeout=AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
            if polling.done() and command_id in polling.result():
                delivered.cancel()
                return "offered again"
            polling.cancel()
    return str(delivered.result()["evidence"])


class Case:
    """A far agent whose poll gets a command, and what becomes of that command."""

    def __init__(
        self, two: network.TwoHosts, http: aiohttp.ClientSession, shim: Shim, controller: Controller, name: str
    ) -> None:
        self._two = two
        self._http = http
        self._shim = shim
        self._controller = controller
        self._name = name
        self._port = PORTS[name]
        self._cluster_id = ""

    async def result(self) -> str:
        """Register the agent and play the case."""
        body = {"agent_id": f"agent-{self._name}", "name": self._name}
        async with self._http.post(f"{self._shim.url}{BASE}/register", json=body) as response:
            self._cluster_id = (await response.json())["cluster_id"]
        more = "Connection: close\r\n" if self._name == "closed" else ""
        with far_agent(self._two.far, self._shim, self._cluster_id, self._port, more) as agent:
            return await getattr(self, self._name)(agent)

    async def _offer(self) -> None:
        await self._controller.api.push({"id": self._name, "cluster_id": self._cluster_id})
        await self._shim.event("command_offered", command=self._name)

    async def _evidence(self) -> str:
        return await evidence(self._http, self._shim, self._cluster_id, self._name)

    async def unreachable(self, agent: FarAgent) -> str:
        """The agent's machine cannot be reached when the reply is written, and never again."""
        with self._two.cut(self._port):
            await self._offer()
            agent.kill()
            return await self._evidence()

    async def unread(self, agent: FarAgent) -> str:
        """The agent's kernel has the reply, the agent dies before it reads it, and the reset is lost."""
        await self._offer()
        agent.do("wait")
        with self._two.cut(self._port):
            agent.kill()
        return await self._evidence()

    async def closed(self, agent: FarAgent) -> str:
        """The same, but the reply was the connection's last: the shim itself closes it."""
        await self._offer()
        agent.do(f"stop {self._shim.pid}")
        await asyncio.to_thread(network.wait_half_closed, self._port)
        with self._two.cut(self._port):
            agent.kill()
            await self._two.dropped(self._port, 3)
            self._shim.send(signal.SIGCONT)
            return await self._evidence()

    async def read(self, agent: FarAgent) -> str:
        """The agent has read the reply, and polls on another connection."""
        await self._offer()
        agent.do("read")
        return await self._evidence()

    async def returned(self, agent: FarAgent) -> str:
        """The agent has read the reply, cannot be reached for a while, and polls again on the same connection."""
        delivered = asyncio.create_task(self._shim.event("command_delivered", command=self._name))
        await self._offer()
        agent.do("read")
        with self._two.cut(self._port):
            await self._two.dropped(self._port, PROBES + 3)
        agent.do("ask")
        return str((await delivered)["evidence"])


async def play(two: network.TwoHosts, folder: Path) -> dict[str, str]:
    """Play all cases on one shim; each by its name, with what was taken for evidence."""
    config = {
        "listen": {"host": "0.0.0.0", "port": 0, "auth": "required"},
        "poll": {"hold": 20},
        "commands": {"evidence_s": 8.0},
    }
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with world(folder, config) as (shim, controller), aiohttp.ClientSession(headers=headers) as http:
        await shim.start()
        shim.url = f"http://{network.NEAR_ADDRESS}:{shim.url.rpartition(':')[2]}"
        return {name: await Case(two, http, shim, controller, name).result() for name in PORTS}


def main() -> int:
    """Print the cases as JSON."""
    inside = network.reenter("tests.chaos.harness.gone_agent", [])
    if inside is not None:
        return inside
    with tempfile.TemporaryDirectory() as folder:
        two = network.TwoHosts()
        Path("/proc/sys/net/ipv4/tcp_keepalive_probes").write_text(f"{PROBES}\n")
        print(json.dumps(asyncio.run(play(two, Path(folder)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
