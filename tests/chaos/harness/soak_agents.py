"""Agents that call as fast as they are answered, in a process of their own: raw HTTP/1.1 on sockets and epoll.

A `Plan` comes as a line of JSON on stdin. Each agent has one keep-alive connection. It sends some heartbeats, polls,
and posts the results of the commands that it got, again and again. Every second agent pipelines its heartbeats. Once a
second the number of calls so far goes to stdout. When stdin ends the agents stop, and the last line is what they
`Found`.
"""

from __future__ import annotations

import os
import re
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator

import msgspec

IDLE_S = 0.2
TOLD_EVERY_S = 1.0
BEATS, POLL, RESULTS = "heartbeats", "polls", "results"
_IDS = re.compile(rb'"id": ?"([^"]+)"')


class Plan(msgspec.Struct, kw_only=True):
    """`batch` is the number of heartbeats between two polls; `clusters` are the ids that the agents have."""

    host: str
    port: int
    token: str
    clusters: list[str]
    batch: int


class Found(msgspec.Struct):
    """Calls by kind, answers that were no success, how often each command was received, results that got a 2xx."""

    calls: dict[str, int]
    refused: dict[str, int]
    received: dict[str, int]
    taken: list[str]


class Agent:
    """One agent on its connection."""

    def __init__(self, plan: Plan, cluster: str, *, pipelines: bool) -> None:
        self.sock = socket.create_connection((plan.host, plan.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.waiting, self.phase = 0, RESULTS
        self.posted: list[str] = []
        self._at_once, self._rounds = (plan.batch, 1) if pipelines else (1, plan.batch)
        self._beaten = 0
        self._buffer = b""
        self._head = (
            f"Host: {plan.host}:{plan.port}\r\nUser-Agent: Go-http-client/1.1\r\nAuthorization: Bearer {plan.token}\r\n"
        )
        self._path = f"/api/v1/clusters/agent/{cluster}"
        body = {"cluster_id": cluster, "agent_id": f"agent-of-{cluster}", "status": "healthy"}
        body |= {"metadata": {"version": "v1.28.3", "k8s_nodes": 3, "cpu_usage": 12.5}}  # type: ignore[dict-item]
        self._beats = self._post("/heartbeat", msgspec.json.encode(body)) * self._at_once
        self._poll = f"GET {self._path}/poll HTTP/1.1\r\n{self._head}\r\n".encode()

    def _post(self, path: str, body: bytes) -> bytes:
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def beat(self) -> None:
        self._beaten += 1
        self._send(BEATS, self._at_once, self._beats)

    @property
    def has_beaten_enough(self) -> bool:
        """True once for each batch of heartbeats."""
        return self._beaten % self._rounds == 0

    def poll(self) -> None:
        self._send(POLL, 1, self._poll)

    def answer(self, commands: list[str]) -> None:
        """Post a result for each command."""
        self.posted = commands
        posts = [self._post(f"/commands/{command}/result", b'{"success":true,"output":"done"}') for command in commands]
        self._send(RESULTS, len(commands), b"".join(posts))

    def _send(self, phase: str, count: int, data: bytes) -> None:
        self.phase, self.waiting = phase, count
        self.sock.sendall(data)

    def replies(self) -> Iterator[tuple[bytes, bytes]]:
        """Read what is there; yields status and body of each complete reply. Raises `ConnectionError`."""
        data = self.sock.recv(262_144)
        if not data:
            raise ConnectionResetError("the shim has closed a connection")
        data = self._buffer + data if self._buffer else data
        begin = 0
        while (head := data.find(b"\r\n\r\n", begin)) >= 0:
            at = data.find(b"Content-Length: ", begin, head)
            end = head + 4 + (0 if at < 0 else int(data[at + 16 : data.index(b"\r", at)]))
            if len(data) < end:
                break
            self.waiting -= 1
            yield data[begin + 9 : begin + 12], data[head + 4 : end]
            begin = end
        self._buffer = data[begin:]


class Soak:
    """All agents."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._calls: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._received: Counter[str] = Counter()
        self._taken: list[str] = []
        self._ended = False

    def run(self) -> Found:
        made = [Agent(self._plan, each, pipelines=n % 2 == 0) for n, each in enumerate(self._plan.clusters)]
        agents = {agent.sock.fileno(): agent for agent in made}
        epoll = select.epoll()
        for fd, agent in agents.items():
            epoll.register(fd, select.EPOLLIN)
            agent.beat()
        os.set_blocking(sys.stdin.fileno(), False)
        told_at = time.monotonic()
        while any(agent.waiting for agent in agents.values()):
            for fd, _ in epoll.poll(IDLE_S):
                self._serve(agents[fd])
            if time.monotonic() - told_at >= TOLD_EVERY_S:
                told_at = time.monotonic()
                print(sum(self._calls.values()), flush=True)
                self._ended = self._ended or sys.stdin.buffer.read(1) == b""
        return Found(dict(self._calls), dict(self._refused), dict(self._received), self._taken)

    def _serve(self, agent: Agent) -> None:
        commands: list[str] = []
        for status, body in agent.replies():
            self._calls[agent.phase] += 1
            good = status[:1] == b"2"
            if not good:
                self._refused[f"{agent.phase} {status.decode()}"] += 1
            if agent.phase is RESULTS:
                command = agent.posted[-1 - agent.waiting]
                if good:
                    self._taken.append(command)
            elif agent.phase is POLL:
                commands = [found.decode() for found in _IDS.findall(body)]
                self._received.update(commands)
        if agent.waiting:
            return
        if commands:
            agent.answer(commands)
        elif agent.phase is BEATS and agent.has_beaten_enough:
            agent.poll()
        elif not self._ended:
            agent.beat()


def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    print(msgspec.json.encode(Soak(plan).run()).decode(), flush=True)


if __name__ == "__main__":
    main()
