"""Simulated agents that live through everything: they die, come back as another pod, and behave badly on the wire.

What an agent *has received* is what its process has read whole. Bad behaviour therefore reads from raw sockets, byte by
byte where it must: asyncio's streams would take from the kernel what the agent never asked for, and a reply that lies
unread in the kernel when a process dies is the very thing that must not count as delivered.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from devtools.agents import (
    AgentProfile,
    Callbacks,
    CallOutcome,
    Command,
    Connection,
    EventKind,
    Exchange,
    Identity,
    LegacyAgent,
    PollStyle,
    Pool,
    Response,
    Result,
    WireError,
)
from devtools.agents import Event as AgentEvent
from shim.clock import Clock
from tests.chaos.harness import events as ev
from tests.chaos.harness.waiting import last
from tests.support.generations import ALL, Verdict

REAL_POLL_S = 5.0
REAL_STATUS_S = 30.0
RESTART_S = 5.0
_SECOND = "second poll"
_OPERATIONS = {
    EventKind.REGISTER: "register",
    EventKind.HEARTBEAT: "heartbeat",
    EventKind.STATUS: "status",
    EventKind.POLL: "poll",
    EventKind.RESULT: "result",
    EventKind.TUNNEL: "tunnel_poll",
}


@dataclass(frozen=True, slots=True)
class Cast:
    """One part: a session that lasts while its agents come and go.

    `rude` is the share of polls and posts that are done badly. `adopted`: its agents hold a cluster id that the shim
    has never seen, and never register.
    """

    name: str
    dialect: str
    style: PollStyle = PollStyle.TICKER
    rude: float = 0.0
    adopted: bool = False

    @property
    def drains(self) -> bool:
        return self.dialect != "clusters"

    @property
    def kept_id(self) -> str:
        return f"cl-kept-{self.name}" if self.adopted else ""


CAST = (
    Cast("cluster-polite", "clusters_agent"),
    Cast("cluster-serial", "clusters_agent", PollStyle.SERIAL, rude=0.05),
    Cast("cluster-rude", "clusters_agent", PollStyle.PAUSE, rude=0.3),
    Cast("agent-polite", "agents"),
    Cast("agent-rude", "agents", PollStyle.PAUSE, rude=0.3),
    Cast("b3", "clusters", rude=0.1),
    Cast("adopted", "clusters_agent", rude=0.1, adopted=True),
)


NAMELESS = frozenset(cast.name for cast in CAST if cast.adopted)  # whom nobody ever registered


class _WatchedPool(Pool):
    """Connections that report each reply read whole, also if its call was given up or its process is dying."""

    def __init__(self, url: str, now_s: Callable[[], float], took: Callable[[bytes], object]) -> None:
        super().__init__(url, now_s)
        self._took = took
        self.where = lambda: url

    async def dial(self) -> Connection:
        parts = urlsplit(self.where())
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        return await super().dial()

    def discard(self, connection: Connection) -> None:
        self._took(bytes(connection.reader._buffer))  # type: ignore[attr-defined]
        super().discard(connection)


class Part:
    """Runs the agents of one session, one after another. While `polite` they behave well."""

    def __init__(
        self,
        cast: Cast,
        url: str,
        token: str,
        pace: float,
        note: Callable[[ev.AnyEvent], None],
        rng: random.Random,
    ) -> None:
        self.cast = cast
        self.agent: LegacyAgent | None = None
        self.connected = asyncio.Event()
        self._url = url
        self._token = token
        self._pace = pace
        self._note = note
        self._rng = rng
        self._clock = Clock()
        self._pods = 0
        self._cluster_id = cast.kept_id
        self._life: asyncio.Task[None] | None = None
        self._down: asyncio.Event | None = None
        self._polls: set[asyncio.Task[Any]] = set()
        self.polite = False
        self.where = lambda: url  # a service of several replicas chooses one for each connection
        self.rude_calls: dict[str, int] = {}

    # --- lives --------------------------------------------------------------------------------------------------------

    @property
    def process(self) -> str:
        return f"{self.cast.name}-pod{self._pods}"

    @property
    def agent_id(self) -> str:
        return self.process if self.cast.dialect == "clusters_agent" else f"agent-{self.cast.name}"

    def new_pod(self) -> None:
        """The next agent has another id, where the dialect's ids change with the pod."""
        self._pods += 1

    def forget_id(self) -> None:
        """The next agent has lost its saved cluster id and registers again."""
        self._cluster_id = self.cast.kept_id

    def profile(self) -> AgentProfile:
        cast = self.cast
        return AgentProfile(
            dialect=cast.dialect,
            poll_interval_s=REAL_POLL_S if cast.drains else None,
            poll_style=cast.style,
            tunnel_interval_s=REAL_POLL_S,
            status_interval_s=REAL_STATUS_S if cast.dialect == "agents" else None,
        ).scaled(1 / self._pace)

    async def run(self) -> None:
        """Keep an agent alive until cancelled; a process that exits is started again, as Kubernetes does it."""
        while True:
            if self._down is not None:
                await self._down.wait()
                self._down = None
            self._life = asyncio.create_task(self._live())
            try:
                await asyncio.wait((self._life,))
            except asyncio.CancelledError:
                await self._end()
                raise
            if not self._life.cancelled():
                self._life.result()
            if self._down is None:
                await last(RESTART_S / self._pace)

    async def die(self) -> Callable[[], None]:
        """Kill the agent as a crash does; what is returned lets the next one start."""
        down = self._down = asyncio.Event()
        await self._end()
        return down.set

    async def _end(self) -> None:
        life = self._life
        if life is None or life.done():
            return
        life.cancel()
        with suppress(asyncio.CancelledError):
            await life

    async def _live(self) -> None:
        who = Identity(agent_id=self.agent_id, cluster_name=self.cast.name, token=self._token, tunnel_enabled=True)
        callbacks = Callbacks(event=self._on_event, call=self._call, execute=self._execute)
        agent = LegacyAgent(self._url, who, self.profile(), self._clock, callbacks, self._cluster_id)
        agent._control = _WatchedPool(self._url, self._now, self._take)
        agent._default = _WatchedPool(self._url, self._now, self._take)
        for pool in (agent._control, agent._default):
            pool.where = self.where
        agent._drain_pool = agent._default if self.cast.dialect != "agents" else agent._control
        self.agent = agent
        self._note(ev.Life(self._now(), self.cast.name, born=True, detail=self.process))
        how = "exited"
        try:
            await agent.run()
        except asyncio.CancelledError:
            how = "killed"
            raise
        finally:
            for poll in self._polls:
                poll.cancel()
            self._cluster_id = agent.cluster_id or self._cluster_id
            self.agent = None
            self._note(ev.Life(self._now(), self.cast.name, born=False, detail=how))

    # --- what happens -------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock.monotonic_s()

    def _on_event(self, event: AgentEvent) -> None:
        if event.what is EventKind.COMMAND and event.command is not None:
            self._received(event.command.id)
            return
        if event.what is EventKind.EXIT:
            return
        contact = ev.Contact(
            event.at_s, self.cast.name, event.what.value, event.outcome.value, event.started_s, event.status
        )
        self._note(contact)
        if event.outcome is CallOutcome.OK and event.what is EventKind.HEARTBEAT:
            self.connected.set()
        if event.what is EventKind.RESULT and event.command is not None:
            self._note(ev.Posted(event.at_s, event.command.id, event.status))
        if event.response is not None:
            self._read_as_every_generation(event.what, event.response)

    def _read_as_every_generation(self, what: EventKind, response: Response) -> None:
        operation = _OPERATIONS.get(what)
        for generation in ALL:
            if generation.dialect != self.cast.dialect or operation not in generation.routes:
                continue
            reading = generation.read(operation, response.status, response.body)
            if reading.verdict is Verdict.BROKEN:
                self._note(ev.Spoilt(self._now(), self.cast.name, what.value, f"{generation.label}: {reading.reason}"))

    def _received(self, command_id: str) -> None:
        self._note(ev.Received(self._now(), command_id, self.cast.name, self.process))

    def _take(self, buffered: bytes) -> None:
        """Note the commands of a reply that was read whole, with or without its head."""
        body = buffered if buffered.startswith(b"{") else self._whole_reply(buffered)
        try:
            commands = json.loads(body or b"{}").get("commands") or []
        except ValueError:
            return
        for command in commands:
            self._received(command["id"])

    async def _execute(self, command: Command) -> Result:
        payload = command.payload or {}
        await last(float(payload.get("takes_s", 0)))
        return Result(success=not payload.get("fails"), output=f"done {command.id}")

    async def post_unknown(self, command_id: str) -> None:
        """Post a result for a command that nobody has ever heard of."""
        agent = self.agent
        if agent is not None and self.cast.drains and (agent.cluster_id or self.cast.dialect == "agents"):
            await agent.answer(Command(command_id, "unknown"), Result())

    # --- bad behaviour ------------------------------------------------------------------------------------------------

    async def _call(self, exchange: Exchange) -> Response:
        ways = _RUDE_POLLS if exchange.what is EventKind.POLL else _RUDE_POSTS
        task = asyncio.current_task()
        second = task is not None and task.get_name() == _SECOND
        never = self.polite or second or exchange.what in (EventKind.REGISTER, EventKind.TUNNEL, EventKind.STATUS)
        if never or self._rng.random() >= self.cast.rude:
            return await exchange.send()
        name, way = self._rng.choice(ways)
        self.rude_calls[name] = self.rude_calls.get(name, 0) + 1
        return await way(self, exchange)

    async def _dial(self) -> socket.socket:
        parts = urlsplit(self.where())
        raw = socket.socket()
        raw.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(raw, (parts.hostname, parts.port))
        except BaseException:
            raw.close()
            raise
        return raw

    async def _raw(self, talk: Callable[[socket.socket], Awaitable[Response | None]]) -> Response:
        """Hold a conversation on a socket of one's own; it is closed as a dying process closes it."""
        raw: socket.socket | None = None
        try:
            raw = await self._dial()
            answer = await talk(raw)
        except OSError as error:
            raise WireError(type(error).__name__) from error
        finally:
            if raw is not None:
                raw.close()
        if answer is None:
            raise WireError("misbehaved")
        return answer

    async def _leave_mid_poll(self, exchange: Exchange) -> Response:
        async def talk(raw: socket.socket) -> None:
            await asyncio.get_running_loop().sock_sendall(raw, exchange.pool.encode(exchange.request))
            await last(self._rng.uniform(0, 10) / self._pace)

        return await self._raw(talk)

    async def _leave_mid_reply(self, exchange: Exchange) -> Response:
        """Read a few bytes and go. They may be all there are."""

        async def talk(raw: socket.socket) -> Response | None:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(raw, exchange.pool.encode(exchange.request))
            wanted, got = self._rng.randint(1, 400), b""
            try:
                async with asyncio.timeout(25 / self._pace):
                    while len(got) < wanted and (more := await loop.sock_recv(raw, wanted - len(got))):
                        got += more
            except asyncio.CancelledError:
                self._take(got)  # a dying process that had read the whole reply has received it
                raise
            except TimeoutError:
                pass
            body = self._whole_reply(got)
            return None if body is None else Response(200, {}, body, 0)

        return await self._raw(talk)

    async def _never_read(self, exchange: Exchange) -> Response:
        """Let the reply lie. Heartbeats go on, on another connection."""

        async def talk(raw: socket.socket) -> None:
            await asyncio.get_running_loop().sock_sendall(raw, exchange.pool.encode(exchange.request))
            await last(self._rng.uniform(5, 90) / self._pace)

        return await self._raw(talk)

    async def _pipeline(self, exchange: Exchange) -> Response:
        """Send the next request before the reply is there, read nothing, and go: that request is no evidence."""

        async def talk(raw: socket.socket) -> None:
            data = exchange.pool.encode(exchange.request)
            await asyncio.get_running_loop().sock_sendall(raw, data + data)
            await last(self._rng.uniform(1, 20) / self._pace)

        return await self._raw(talk)

    async def _poll_twice(self, exchange: Exchange) -> Response:
        """A second poll at the same time, on a connection of its own. Both replies are read."""
        agent = self.agent
        if agent is not None:
            second = asyncio.create_task(agent.poll(), name=_SECOND)
            self._polls.add(second)
            second.add_done_callback(self._polls.discard)
        return await exchange.send()

    async def _half_body(self, exchange: Exchange) -> Response:
        async def talk(raw: socket.socket) -> None:
            data = exchange.pool.encode(exchange.request)
            await asyncio.get_running_loop().sock_sendall(raw, data[: len(data) - self._rng.randint(1, 20)])
            await last(self._rng.choice((0, 20 / self._pace)))

        return await self._raw(talk)

    async def _no_reply_wanted(self, exchange: Exchange) -> Response:
        """A whole request, and gone before the answer."""

        async def talk(raw: socket.socket) -> None:
            await asyncio.get_running_loop().sock_sendall(raw, exchange.pool.encode(exchange.request))

        return await self._raw(talk)

    async def _impatient(self, exchange: Exchange) -> Response:
        """A client with a short time-out of its own: it gives up a held poll in an orderly way."""
        short = replace(exchange, request=replace(exchange.request, timeout_s=self._rng.uniform(2, 10) / self._pace))
        return await short.send()

    @staticmethod
    def _whole_reply(data: bytes) -> bytes | None:
        """The body of a whole 200 reply, `None` if some of it is missing."""
        head, found, body = data.partition(b"\r\n\r\n")
        if not found or b" 200 " not in head.split(b"\r\n")[0] + b" ":
            return None
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                return body if len(body) >= int(value) else None
        return None


_RUDE_POLLS = (
    ("hangs up in a poll", Part._leave_mid_poll),
    ("hangs up in a reply", Part._leave_mid_reply),
    ("never reads", Part._never_read),
    ("pipelines and leaves", Part._pipeline),
    ("polls twice at once", Part._poll_twice),
    ("gives up a held poll", Part._impatient),
)
_RUDE_POSTS = (
    ("sends half a body", Part._half_body),
    ("leaves before the answer", Part._no_reply_wanted),
)
