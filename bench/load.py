"""Agents' requests from another process, lean enough not to be what is measured: raw HTTP/1.1 on sockets and epoll.

A `Plan` comes as JSON on stdin, the `Found` goes as JSON to stdout. In the mode `held` every connection sends one
request and waits; `{"held": n}` is written when all are out, and the process lives until its stdin ends. In the mode
`polling` it goes on to poll again at once after each answer, and notes when which command was in hand.
"""

from __future__ import annotations

import os
import re
import select
import socket
import sys
import time

import msgspec

BACKLOG = 64
IDLE_S = 0.2
ANSWERED_S = 30.0
_IDS = re.compile(rb'"id": ?"([^"]+)"')


class Plan(msgspec.Struct, kw_only=True):
    """`requests` are dealt round the connections. `closed`: each connection sends the next request when it has its
    answer, for `duration_s` or `total` requests. `paced`: each request goes out every `interval_s`, spread evenly.
    `held`: once. `polling`: for ever; the first polls are spread over `spread_s`.
    """

    host: str
    port: int
    requests: list[bytes]
    connections: int
    mode: str = "closed"
    duration_s: float = 1.0
    total: int = 0
    interval_s: float = 5.0
    spread_s: float = 0.0


class Found(msgspec.Struct):
    """`latencies_us` are sorted; `errors` are answers that are no success, and connections that ended early."""

    answers: int
    errors: int
    took_s: float
    bytes_in: int
    bytes_out: int
    latencies_us: list[int]
    in_hand_s: dict[str, float] = {}


class Agent:
    """One keep-alive connection."""

    __slots__ = ("buffer", "request", "sent_s", "sock", "waiting")

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.sock = socket.create_connection((host, port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.request = request
        self.sent_s = 0.0
        self.waiting = False
        self.buffer = b""


class Load:
    """One run of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.errors = self.bytes_in = self.bytes_out = 0
        self._latencies_us: list[int] = []
        self._agents: dict[int, Agent] = {}
        self._epoll = select.epoll()
        self._in_hand_s: dict[str, float] = {}

    def run(self) -> Found:
        plan = self.plan
        for number in range(plan.connections):
            agent = Agent(plan.host, plan.port, plan.requests[number % len(plan.requests)])
            self._agents[agent.sock.fileno()] = agent
            self._epoll.register(agent.sock.fileno(), select.EPOLLIN)
        started_s = time.perf_counter()
        {"closed": self._closed, "paced": self._paced, "held": self._held, "polling": self._polling}[plan.mode]()
        took_s = time.perf_counter() - started_s
        for agent in self._agents.values():
            agent.sock.close()
        found = sorted(self._latencies_us)
        return Found(len(found), self.errors, took_s, self.bytes_in, self.bytes_out, found, self._in_hand_s)

    def _send(self, agent: Agent) -> None:
        if agent.waiting:
            self.errors += 1
            return
        agent.waiting = True
        self.bytes_out += len(agent.request)
        agent.sent_s = time.perf_counter()
        agent.sock.send(agent.request)

    def _receive(self, agent: Agent) -> bool:
        """Read what is there; True if that completes the answer."""
        data = agent.sock.recv(65_536)
        if not data:
            self.errors += 1
            self._epoll.unregister(agent.sock.fileno())
            return False
        self.bytes_in += len(data)
        data = agent.buffer + data if agent.buffer else data
        head = data.find(b"\r\n\r\n")
        if head < 0 or len(data) < head + 4 + _length(data, head):
            agent.buffer = data
            return False
        agent.buffer = b""
        agent.waiting = False
        if self.plan.mode == "polling":
            now_s = time.monotonic()
            for found in _IDS.finditer(data, head):
                self._in_hand_s[found[1].decode()] = now_s
        self._latencies_us.append(int((time.perf_counter() - agent.sent_s) * 1e6))
        if data[9:10] != b"2":
            self.errors += 1
        return True

    def _serve(self, timeout_s: float) -> list[Agent]:
        """Wait for answers; the agents that got theirs."""
        agents = self._agents
        return [agent for fd, _ in self._epoll.poll(timeout_s) if self._receive(agent := agents[fd])]

    def _closed(self) -> None:
        plan, left = self.plan, self.plan.total - self.plan.connections
        end_s = time.perf_counter() + plan.duration_s
        for agent in self._agents.values():
            self._send(agent)
        while time.perf_counter() < end_s if not plan.total else left > -plan.connections:
            for agent in self._serve(IDLE_S):
                left -= 1
                if not plan.total or left >= 0:
                    self._send(agent)

    def _paced(self) -> None:
        agents, plan = list(self._agents.values()), self.plan
        start_s, due = time.perf_counter(), 0
        while (at_s := due * plan.interval_s / len(plan.requests)) < plan.duration_s:
            wait_s = start_s + at_s - time.perf_counter()
            if wait_s > 0:
                self._serve(wait_s)
            else:
                agent = agents[due % plan.connections]
                agent.request = plan.requests[due % len(plan.requests)]
                self._send(agent)
                due += 1
        end_s = time.perf_counter() + max(plan.interval_s, ANSWERED_S)
        while any(agent.waiting for agent in agents) and time.perf_counter() < end_s:
            self._serve(IDLE_S)

    def _polling(self) -> None:
        start_s, between_s = time.perf_counter(), self.plan.spread_s / len(self._agents)
        for number, agent in enumerate(list(self._agents.values())):
            while (wait_s := start_s + number * between_s - time.perf_counter()) > 0:
                for served in self._serve(wait_s):
                    self._send(served)
            self._send(agent)
        print(msgspec.json.encode({"held": len(self._agents)}).decode(), flush=True)
        os.set_blocking(sys.stdin.fileno(), False)
        while sys.stdin.buffer.read(1) is None:
            for agent in self._serve(IDLE_S):
                self._send(agent)

    def _held(self) -> None:
        for number, agent in enumerate(self._agents.values(), 1):
            self._send(agent)
            if number % BACKLOG == 0:
                time.sleep(0.02)
        print(msgspec.json.encode({"held": len(self._agents)}).decode(), flush=True)
        sys.stdin.buffer.read()


def _length(data: bytes, head: int) -> int:
    at = data.find(b"Content-Length: ", 0, head)
    return 0 if at < 0 else int(data[at + 16 : data.index(b"\r", at)])


def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    print(msgspec.json.encode(Load(plan).run()).decode(), flush=True)


if __name__ == "__main__":
    main()
