"""The same WebSocket messages have the same effect, however they arrive: on the upstream link, and on proxied sockets.

Whole, cut anywhere, byte by byte, joined, in fragments with pings in between, by TLS. `make fuzz` plays many more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from random import Random
from typing import Any, NamedTuple

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

pytest.importorskip("cryptography")

from shim.agent_api import AgentServer, Backends
from shim.bridge.websocket_agents import WebSocketEvent
from shim.cluster.connection_pool import make_identity
from shim.config.settings import Listen, Settings, Upstream
from shim.fallback.websocket_proxy import AGENT_PATH, WebSocketProxy
from shim.metrics import Metrics
from shim.ports import DialRequest, Frame
from shim.protocol import dialects
from shim.upstream import AiohttpUpstream
from shim.upstream.dialler import Dialler
from tests.chaos.harness.http_requests import TOKEN
from tests.chaos.harness.memory_tls import TlsEnd, client_context, secured
from tests.chaos.harness.memory_transport import MemoryTransport
from tests.chaos.harness.ways import OVER_S, TURNS, Segments, serving
from tests.chaos.harness.websocket_frames import (
    MAX_MESSAGE_BYTES,
    accepting,
    arrivals,
    conversation,
    cut,
    read_frames,
    spoilt,
    whole,
)
from tests.support.frontend import Board
from tests.support.sockets import Events, Tasks
from tests.support.virtual import run_virtual

INPUTS = int(os.environ.get("AGENT_SHIM_FUZZ_INPUTS", "10000"))
EXAMPLES = max(15, INPUTS // 1000)

IDENTITY, _ = make_identity(0.0)
UPSTREAM = Upstream(max_message_bytes=MAX_MESSAGE_BYTES, insecure_skip_verify=True)
HANDSHAKE = (
    f"GET {AGENT_PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
).encode()

pytestmark = pytest.mark.timeout(120 + INPUTS // 20)

searched = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

End = MemoryTransport | TlsEnd


class Outcome(NamedTuple):
    """All that the same messages must lead to. `passed_on` are the frames that the other side of a proxy received."""

    effects: tuple[Any, ...]
    replies: list[Frame]
    closed: bool
    passed_on: list[Frame]
    both_closed: bool


async def turns() -> None:
    """Let everything happen that needs no time."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


class MemoryDialler(Dialler):
    """A dialler whose connections end in the test, with TLS if `rng` is given to cut its records."""

    def __init__(self, rng: Random | None = None) -> None:
        super().__init__(UPSTREAM.dialling, {}, max_message_bytes=MAX_MESSAGE_BYTES)
        self.ends: asyncio.Queue[End] = asyncio.Queue()
        self._rng = rng

    def _open_session(self) -> aiohttp.ClientSession:
        session = super()._open_session()
        connector: Any = session.connector
        connector._create_connection = self._connect  # the method by which aiohttp's connector opens connections
        return session

    async def _connect(self, request: aiohttp.ClientRequest, *_: Any) -> Any:
        assert self._session is not None
        protocol = self._session.connector._factory()  # type: ignore[union-attr]
        if self._rng is None:
            self.ends.put_nowait(MemoryTransport(protocol))
        else:
            waiter = asyncio.get_running_loop().create_future()
            self.ends.put_nowait(TlsEnd(secured(protocol, client_context(), waiter), IDENTITY, self._rng))
            await waiter
        return protocol

    async def accept(self) -> tuple[End, bytes]:
        """Return the controller's end of the next connection with the handshake on it, and the answer to send."""
        end = await self.ends.get()
        if isinstance(end, TlsEnd):
            await end.handshake()
        await turns()
        handshake = bytes(end.written)
        end.written.clear()
        return end, accepting(handshake)


async def send(end: End, segments: Segments) -> None:
    """Send segments, one after the shim has handled the one before it."""
    for segment in segments:
        end.send(segment)
        await turns()


def behind(head: bytes, segments: Segments, *, joined: bool) -> Segments:
    """Return segments with a handshake, or the answer to one, in front: on its own or in the first piece."""
    if joined and segments:
        first, *others = segments[0]
        return [[head + first, *others], *segments[1:]]
    return [[head], *segments]


# --- the upstream link ------------------------------------------------------------------------------------------------


class Link:
    """Upstream links of a shim in memory; the test is the controller."""

    def __init__(self, rng: Random | None = None) -> None:
        self.tasks = Tasks()
        self._url = f"{'ws' if rng is None else 'wss'}://controller{AGENT_PATH}"
        self._dialler = MemoryDialler(rng)
        self.upstream = AiohttpUpstream(UPSTREAM, self.tasks.spawn, {})
        self.upstream._dialler = self._dialler

    async def play(self, segments: Segments, *, joined: bool = False) -> Outcome:
        """Open a link, send segments on it, and hang up. `joined`: the first piece arrives with the handshake."""
        events = Events()
        self.upstream.dial(DialRequest(self._url, "t"), events, lambda _: None)
        end, answer = await self._dialler.accept()
        await send(end, behind(answer, segments, joined=joined))
        await asyncio.sleep(OVER_S)
        closed = end.is_closing()
        end.hang_up()
        await asyncio.sleep(OVER_S)
        effects = tuple(entry for entry in events.log if entry[0] != "frame")
        replies = read_frames(bytes(end.written))
        if replies and replies[-1].kind == "close":
            # RFC 6455 section 5.5.2: no pong is due once the peer's close frame has arrived.
            replies = [reply for reply in replies if reply.kind != "pong"]
        return Outcome(effects, replies, closed, [], end.is_closing())


@asynccontextmanager
async def linked(rng: Random | None = None) -> AsyncIterator[Link]:
    """Links by plain TCP, or by TLS if `rng` is given."""
    link = Link(rng)
    try:
        yield link
    finally:
        await link.upstream.close()
        await link.tasks.finish()


@searched
@given(st.randoms(use_true_random=False))
def test_messages_of_the_controller_have_the_same_effect_however_they_arrive(rng: Random) -> None:
    async def scenario() -> None:
        async with linked() as link:
            ways = arrivals(conversation(rng), rng, masked=False)
            expected = await link.play(next(ways)[1])
            for name, segments in ways:
                assert await link.play(segments) == expected, (name, segments)
                assert await link.play(segments, joined=True) == expected, (name, "with the handshake", segments)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False))
def test_violations_of_the_protocol_by_the_controller_have_the_same_effect_however_they_arrive(rng: Random) -> None:
    async def scenario() -> None:
        async with linked() as link:
            joined = spoilt(b"".join(whole(message) for message in conversation(rng)), rng)
            expected = await link.play([[joined]])
            for name, segments in cut(joined, rng):
                assert await link.play(segments) == expected, (name, segments)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False))
def test_messages_of_the_controller_have_the_same_effect_by_tls_wherever_records_are_cut(rng: Random) -> None:
    async def scenario() -> None:
        async with linked() as plain, linked(Random(rng.getrandbits(32))) as secure:
            ways = arrivals(conversation(rng), rng, masked=False)
            expected = await plain.play(next(ways)[1])
            for name, segments in ways:
                outcome = await secure.play(segments, joined=rng.random() < 0.5)
                assert outcome == expected, (name, segments)

    run_virtual(scenario())


# --- the sockets of agents that are proxied ---------------------------------------------------------------------------


class Noted:
    """Keeps every event of an agent's WebSocket."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fails = False

    def record(self, event: WebSocketEvent) -> None:
        more = {"registers": (event.anew,), "registered": (event.cluster_id,), "closed": ()}[event.event]
        self.log.append((event.event, event.token, event.payload, *more))
        if self.fails and event.event == "registered":
            raise RuntimeError("a defect of a listener")


class Proxied:
    """Proxied WebSockets of a shim in memory; the test is the agent and the controller."""

    def __init__(self, server: AgentServer, dialler: MemoryDialler, noted: Noted, rng: Random | None) -> None:
        self._server, self._dialler, self._rng = server, dialler, rng
        self.noted = noted

    async def play(self, segments: Segments, *, by_agent: bool, joined: bool = False) -> Outcome:
        """Open a WebSocket, send segments from one side of it, and hang up both."""
        self.noted.log.clear()
        agent = await self._connect()
        await send(agent, behind(HANDSHAKE, segments if by_agent and joined else [], joined=joined))
        controller, answer = await self._dialler.accept()
        await send(controller, behind(answer, [] if by_agent else segments, joined=joined))
        if by_agent and not joined:
            await send(agent, segments)
        await asyncio.sleep(OVER_S)
        closed = agent.is_closing(), controller.is_closing()
        agent.hang_up()
        controller.hang_up()
        await asyncio.sleep(OVER_S)
        head, _, returned = bytes(agent.written).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        to_agent, to_controller = read_frames(returned), read_frames(bytes(controller.written))
        passed_on, replies = (to_controller, to_agent) if by_agent else (to_agent, to_controller)
        return Outcome(tuple(self.noted.log), replies, closed[0], passed_on, closed[1])

    async def _connect(self) -> End:
        assert self._server._web is not None
        if self._rng is None:
            return MemoryTransport(self._server._web())
        end = TlsEnd(secured(self._server._web(), IDENTITY), client_context(), self._rng)
        await end.handshake()
        return end


@asynccontextmanager
async def proxied(rng: Random | None = None) -> AsyncIterator[Proxied]:
    """Proxied WebSockets by plain TCP, or by TLS on both sides if `rng` is given."""
    tasks, noted, board, metrics = Tasks(), Noted(), Board(), Metrics(CollectorRegistry())
    url = "http://controller" if rng is None else "https://controller"
    chosen = Settings(upstream=Upstream(url=url, max_message_bytes=MAX_MESSAGE_BYTES, insecure_skip_verify=True))
    websockets = WebSocketProxy(lambda: chosen, metrics, tasks.spawn, noted.record)
    websockets._dialler = dialler = MemoryDialler(rng)
    backends = Backends(board, board, websockets=websockets, max_message_bytes=MAX_MESSAGE_BYTES)
    server = AgentServer(Listen(port=0), backends, dialects.load(), metrics, token=lambda: TOKEN)
    async with serving(server, tuple):
        yield Proxied(server, dialler, noted, rng)
    await tasks.finish()


@searched
@given(st.randoms(use_true_random=False), st.booleans())
def test_proxied_messages_are_passed_on_the_same_however_they_arrive(rng: Random, by_agent: bool) -> None:
    async def scenario() -> None:
        async with proxied() as peer:
            ways = arrivals(conversation(rng), rng, masked=by_agent)
            expected = await peer.play(next(ways)[1], by_agent=by_agent)
            for name, segments in ways:
                for joined in (False, True):
                    outcome = await peer.play(segments, by_agent=by_agent, joined=joined)
                    assert outcome == expected, (name, joined, segments)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False), st.booleans())
def test_proxied_violations_of_the_protocol_have_the_same_effect_however_they_arrive(
    rng: Random, by_agent: bool
) -> None:
    async def scenario() -> None:
        async with proxied() as peer:
            mask = rng.randbytes(4) if by_agent else b""
            sent = spoilt(b"".join(whole(message, mask) for message in conversation(rng)), rng)
            expected = await peer.play([[sent]], by_agent=by_agent)
            for name, segments in cut(sent, rng):
                assert await peer.play(segments, by_agent=by_agent) == expected, (name, segments)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False), st.booleans())
def test_proxied_messages_are_passed_on_the_same_by_tls_wherever_records_are_cut(rng: Random, by_agent: bool) -> None:
    async def scenario() -> None:
        async with proxied() as plain, proxied(Random(rng.getrandbits(32))) as secure:
            ways = arrivals(conversation(rng), rng, masked=by_agent)
            expected = await plain.play(next(ways)[1], by_agent=by_agent)
            for name, segments in ways:
                outcome = await secure.play(segments, by_agent=by_agent, joined=rng.random() < 0.5)
                assert outcome == expected, (name, segments)

    run_virtual(scenario())


# --- every place ------------------------------------------------------------------------------------------------------

COMMAND = Frame("text", b'{"type":"command","request_id":"r","payload":{"command_id":"k","type":"x","payload":{}}}')
REGISTER = Frame("text", b'{"type":"register","request_id":"r","payload":{"name":"n","agent_id":"a"}}')
REGISTERED = Frame("text", b'{"type":"register_success","request_id":"r","payload":{"cluster_id":"c"}}')
EVERYTHING = [Frame("ping", b"?"), COMMAND, Frame("binary", b""), REGISTERED, Frame("close", b"\x03\xe8bye")]


def cut_at_every_place(messages: Iterable[Frame], mask: bytes = b"") -> list[Segments]:
    """Return the same bytes cut in two at every place, with time between the parts."""
    joined = b"".join(whole(message, mask) for message in messages)
    return [[[joined[:at]], [joined[at:]]] for at in range(1, len(joined))]


def test_messages_of_the_controller_have_the_same_effect_cut_at_every_place() -> None:
    async def scenario() -> None:
        async with linked() as link:
            expected = await link.play([[whole(message)] for message in EVERYTHING])
            assert [effect[0] for effect in expected.effects] == ["message", "bad", "message", "closed"]
            for segments in cut_at_every_place(EVERYTHING):
                assert await link.play(segments) == expected, segments

    run_virtual(scenario())


@pytest.mark.parametrize("by_agent", [False, True])
def test_proxied_messages_are_passed_on_the_same_cut_at_every_place(by_agent: bool) -> None:
    async def scenario() -> None:
        mask, messages = (b"\x01\x80\xff\x7f", [REGISTER, *EVERYTHING]) if by_agent else (b"", EVERYTHING)
        async with proxied() as peer:
            expected = await peer.play([[whole(message, mask)] for message in messages], by_agent=by_agent)
            assert expected.passed_on == messages
            for segments in cut_at_every_place(messages, mask):
                assert await peer.play(segments, by_agent=by_agent) == expected, segments

    run_virtual(scenario())


# --- one agent alone --------------------------------------------------------------------------------------------------


def test_a_defect_ends_one_proxied_websocket_and_not_the_process() -> None:
    async def scenario() -> None:
        async with proxied() as peer:
            peer.noted.fails = True
            agent = await peer._connect()
            await send(agent, [[HANDSHAKE, whole(REGISTER, b"mask")]])
            controller, answer = await peer._dialler.accept()
            await send(controller, [[answer, whole(REGISTERED)]])
            assert agent.is_closing()
            assert controller.is_closing()
            assert [entry[0] for entry in peer.noted.log] == ["registers", "registered", "closed"]
            peer.noted.fails = False
            again = await peer.play([[whole(COMMAND)]], by_agent=False)
            assert again.passed_on == [COMMAND]

    with pytest.raises(RuntimeError, match="a defect of a listener"):  # the task's, for `App.spawn_isolated`
        run_virtual(scenario())
