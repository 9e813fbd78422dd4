"""The same bytes get the same answers and have the same effect, however they arrive on the agents' port.

Whole, cut anywhere, byte by byte, joined with the requests before and behind them. `make fuzz` plays many more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any, cast

import pytest
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse, json_response
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

pytest.importorskip("cryptography")

from shim.admin.connection_limit import Connections
from shim.admin.server import HEADERS, make_server
from shim.agent_api import AgentServer, Backends
from shim.agent_api.internal import ClusterListener, Note, note
from shim.cluster.connection_pool import ConnectionPool, P, make_identity
from shim.cluster.forwarding import ReplicaForwarder
from shim.config.settings import Listen
from shim.core.bounds import MAX_HEAD_BYTES
from shim.core.shards import Member
from shim.metrics import ClusterMetrics, Metrics
from shim.protocol import dialects
from tests.chaos.harness.http_requests import (
    RECORDED,
    TOKEN,
    chunks,
    conversation,
    draft_of,
    other_body,
    pieces_of,
)
from tests.chaos.harness.memory_tls import secured
from tests.chaos.harness.memory_transport import connect
from tests.chaos.harness.ways import Peer, TlsPeer, cut_one_by_one, one_by_one, pipelined, serving
from tests.support.frontend import Board, offering
from tests.support.virtual import run_virtual

INPUTS = int(os.environ.get("AGENT_SHIM_FUZZ_INPUTS", "10000"))
EXAMPLES = max(60, INPUTS // 400)

LISTEN = Listen(port=0, max_body_bytes=3000, max_status_body_bytes=150_000, header_timeout_s=5, body_timeout_s=7)
SECRET = "the members' secret"
IDENTITY, FINGERPRINT = make_identity(0.0)
OWNER = Member("owner", "owner", "127.0.0.1:1", FINGERPRINT)
HEARTBEATS = [draft.render() for draft in RECORDED if draft.target.endswith(b"/heartbeat")]
POLLS = [draft.render() for draft in RECORDED if draft.method == b"GET" and draft.target.endswith(b"/commands")]

pytestmark = pytest.mark.timeout(120 + INPUTS // 20)

searched = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Recorder:
    """The agent service of a server in memory: it notes what it was told, and what was counted, since the last look."""

    def __init__(self, *, commands: bool = False) -> None:
        self._commands = commands
        self.board = Board()
        self.backends = Backends(self.board, self.board)
        self.metrics = metrics = Metrics(CollectorRegistry())
        self._counters = [metrics.requests, metrics.bad_requests, metrics.replies_lost, metrics.internal_errors]
        self._counters.append(metrics.invalid_characters)
        self._counted: dict[str, float] = {}

    def take(self) -> tuple[Any, ...]:
        """Return what the service was told since the last time, and the metrics that changed."""
        before, self._counted = self._counted, self._counts()
        changed = {name: value - before.get(name, 0.0) for name, value in self._counted.items()}
        return (*self.take_told(), *sorted((name, value) for name, value in changed.items() if value))

    def take_told(self) -> tuple[Any, ...]:
        """Return the calls and the evidence since the last time."""
        told = tuple(_essence(entry) for entry in self.board.log)
        self.board.log.clear()
        if self._commands:
            self.board.script = offering()
        return told

    def _counts(self) -> dict[str, float]:
        return {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for counter in self._counters
            for family in counter.collect()
            if family.type == "counter"
            for sample in family.samples
            # Bytes that wait behind another request count against the common budget, those of a request alone do not.
            if not sample.name.endswith("_created") and sample.labels.get("reason") != "memory"
        }


def _essence(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    if entry[0] == "call":
        return "call", entry[1].token, repr(entry[2])
    return (entry[0], *entry[2:]) if entry[0] in ("next", "closed") else entry


@asynccontextmanager
async def recording(*, commands: bool = False) -> AsyncIterator[Peer]:
    """A peer of a server of one token; its effects are what was told and counted."""
    recorder = Recorder(commands=commands)
    server = AgentServer(LISTEN, recorder.backends, dialects.load(), recorder.metrics, token=lambda: TOKEN)
    async with serving(server, recorder.take) as peer:
        yield peer


def assume_room_for(requests: list[bytes]) -> None:
    """Leave out requests that would exhaust the server's budget for bytes that wait behind another request."""
    assume(sum(map(len, requests)) <= 2 * LISTEN.max_status_body_bytes)


def twice(requests: list[bytes]) -> list[bytes]:
    """Return each request twice in a row: if it comes whole, its head is not parsed again."""
    return [each for request in requests for each in (request, request)]


async def compare(requests: list[bytes], rng: Random, peer: Peer) -> None:
    """Fail for a way in which these requests are answered differently or have another effect."""
    assume_room_for(requests)
    expected = await peer.play(one_by_one(requests))
    for name, segments in [("cut, one by one", cut_one_by_one(requests, rng)), *pipelined(requests, rng)]:
        assert await peer.play(segments) == expected, (name, segments)


@searched
@given(st.randoms(use_true_random=False))
def test_requests_get_the_same_answers_however_they_arrive(rng: Random) -> None:
    async def scenario() -> None:
        async with recording() as peer:
            await compare(twice(conversation(rng)), rng, peer)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False))
def test_evidence_of_delivery_does_not_depend_on_where_requests_are_cut(rng: Random) -> None:
    """What is sent before the reply is no evidence that it was read, so pipelined requests have their calls only."""

    async def scenario() -> None:
        async with recording(commands=True) as peer:
            requests = [request for _ in range(2) for request in twice([rng.choice(POLLS), *conversation(rng)])]
            expected = await peer.play(one_by_one(requests))
            assert await peer.play(cut_one_by_one(requests, rng)) == expected
            for name, segments in pipelined(requests, rng):
                outcome = await peer.play(segments)
                assert (outcome.replies, outcome.calls) == (expected.replies, expected.calls), (name, segments)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False))
def test_a_body_has_the_same_effect_with_its_length_in_chunks_and_after_100_continue(rng: Random) -> None:
    async def scenario() -> None:
        async with recording() as peer:
            draft = draft_of(rng)
            if rng.random() < 0.5:
                other_body(draft, rng)
            expected = await peer.play([[draft.render()]])
            body, draft.body = draft.body, b""
            draft.put(b"Expect", b"100-continue")
            assert await peer.play([[draft.render()], [body]]) == expected
            draft.headers = draft.without(b"content-length")
            draft.put(b"Transfer-Encoding", b"chunked")
            head, coded = draft.render(), chunks(body, rng)
            for segments in (
                [[head + coded]],
                [[head], [coded]],
                [[head], *([each] for each in pieces_of(coded, rng))],
            ):
                assert await peer.play(segments) == expected, segments

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False))
def test_requests_get_the_same_answers_by_tls_wherever_records_are_cut(rng: Random) -> None:
    async def scenario() -> None:
        async with recording() as peer:
            requests, secure = conversation(rng), TlsPeer(peer, IDENTITY, rng)
            expected = await peer.play(one_by_one(requests))
            for name, segments in [
                ("one by one", one_by_one(requests)),
                ("cut, one by one", cut_one_by_one(requests, rng)),
                *pipelined(requests, rng),
            ]:
                assert await secure.play(segments) == expected, (name, segments)

    run_virtual(scenario())


# --- through another replica ----------------------------------------------------------------------------------------


class MemoryPool(ConnectionPool):
    """A pool whose connections to the owner are in memory, with TLS if `rng` is given to cut its records."""

    def __init__(self, owner: Callable[[], asyncio.Protocol], rng: Random | None = None) -> None:
        super().__init__()
        self._owner, self._rng = owner, rng

    async def _connect(self, member: Member, make: Callable[[], P], query: str) -> P:
        client = cast("Any", make())
        if (rng := self._rng) is None:
            transport: asyncio.Transport = connect(client, self._owner())
        else:
            waiter = asyncio.get_running_loop().create_future()
            tls = secured(client, self._context, waiter)
            connect(tls, secured(self._owner(), IDENTITY), lambda data: pieces_of(data, rng))
            await waiter
            transport = tls._app_transport
        transport.write(note(Note.JOIN, query, headers=f"Authorization: Bearer {self.secret}\r\n"))
        return client


class Elsewhere:
    """The view of a replica that owns nothing, and of which nobody takes anything."""

    leaving = False

    def is_elsewhere(self, token: str) -> bool:
        return True

    def remote_owner(self, token: str) -> Member:
        return OWNER

    def refresh_soon(self) -> None:
        pass

    async def wait_for_change(self, at_most_s: float) -> None:
        await asyncio.sleep(at_most_s)


class LoopClock:
    """The event loop's virtual time."""

    def __init__(self) -> None:
        self.monotonic_s = self.wall_s = asyncio.get_running_loop().time


async def no_operators(path: str, body: bytes) -> tuple[int, bytes]:
    raise AssertionError(path)


@asynccontextmanager
async def owning() -> AsyncIterator[Peer]:
    """A peer of a replica that owns everything; its effects are what was told."""
    recorder = Recorder()
    server = AgentServer(LISTEN, recorder.backends, dialects.load(), recorder.metrics)
    async with serving(server, recorder.take_told) as peer:
        yield peer


@asynccontextmanager
async def forwarding(rng: Random | None = None) -> AsyncIterator[Peer]:
    """A peer of a replica that owns nothing; its effects are what it or the owner was told.

    The replicas are connected by TLS if `rng` is given.
    """
    recorder, metrics = Recorder(), Metrics(CollectorRegistry())
    owner = ClusterListener(
        *(LISTEN, recorder.backends, dialects.load(), recorder.metrics),
        context=IDENTITY,
        secret=lambda: SECRET,
        owned=lambda token: True,
        operate=no_operators,
    )
    async with serving(owner, recorder.take_told) as behind:
        pool, view = MemoryPool(behind.connect, rng), cast("Any", Elsewhere())
        pool.secret = SECRET
        await pool.open_heartbeats(OWNER)
        forwarder = ReplicaForwarder(view, view, pool, LoopClock(), ClusterMetrics(metrics), lambda: 60.0)
        front = AgentServer(
            LISTEN, Backends(recorder.board, recorder.board, forwarder=forwarder), dialects.load(), metrics
        )
        async with serving(front, recorder.take_told) as peer:
            yield peer
        pool.close()


@searched
@given(st.randoms(use_true_random=False))
def test_requests_get_the_same_answers_through_another_replica(rng: Random) -> None:
    """The unchanged bytes of heartbeats of all agents share one connection: none may be read differently there."""

    async def scenario() -> None:
        requests = [request for _ in range(2) for request in twice([rng.choice(HEARTBEATS), *conversation(rng)])]
        assume_room_for(requests)
        async with owning() as direct, forwarding() as forwarded:
            expected = await direct.play(one_by_one(requests))
            for name, segments in [("cut, one by one", cut_one_by_one(requests, rng)), *pipelined(requests, rng)]:
                outcome = await forwarded.play(segments)
                assert outcome == expected, (name, segments)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False))
def test_requests_get_the_same_answers_through_another_replica_wherever_records_are_cut(rng: Random) -> None:
    async def scenario() -> None:
        requests = [request for _ in range(2) for request in (rng.choice(HEARTBEATS), *conversation(rng))]
        assume_room_for(requests)
        async with forwarding() as plain, forwarding(Random(rng.getrandbits(32))) as secure:
            expected = await plain.play(one_by_one(requests))
            for name, segments in [("one by one", one_by_one(requests)), *pipelined(requests, rng)]:
                assert await secure.play(segments) == expected, (name, segments)

    run_virtual(scenario())


BEAT = HEARTBEATS[0]


def beat(*headers: bytes, body: bytes = b"{}", version: bytes = b"HTTP/1.1") -> bytes:
    lines = [b"POST /api/v1/agents/a/heartbeat " + version, b"Authorization: Bearer t", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", b""]) + body


def longest_head() -> bytes:
    """A poll whose head has all the bytes that it may have."""
    start = POLLS[0][:-2] + b"X: " + b"x" * 16_000 + b"\r\nZ: " + b"z" * 16_000 + b"\r\nY: \r\n\r\n"
    return start.replace(b"Y: ", b"Y: " + b"y" * (MAX_HEAD_BYTES - len(start)))


ONCE_DIFFERENT = {
    "the longest head": longest_head(),
    "the most lines": beat(b"Host: localhost", *(b"X-%d: y" % number for number in range(125))),
    "no Host": beat(version=b"HTTP/1.0"),
    "HTTP/1.0 on a connection that stays": beat(b"Connection: keep-alive", version=b"HTTP/1.0"),
    "a body too large": beat(b"Host: localhost", body=b" " * 4000),
    "a body too large after 100 Continue": beat(b"Host: localhost", b"Expect: tea", body=b" " * 4000),
    "no gzip": beat(b"Host: localhost", b"Content-Encoding: gzip"),
    "a chunked body that never ends": beat(b"Host: localhost", b"Transfer-Encoding: chunked")
    .replace(b"Content-Length: 2\r\n", b"")
    .replace(b"{}", b"2\r\n{}\r\n"),
}


@pytest.mark.parametrize("name", ONCE_DIFFERENT)
def test_another_replica_answers_as_the_owner_does(name: str) -> None:
    async def scenario() -> None:
        async with owning() as direct, forwarding() as forwarded:
            request = ONCE_DIFFERENT[name]
            assert await forwarded.play([[request]]) == await direct.play([[request]])
            expected = await direct.play([[request], [BEAT]])
            for segments in ([[request], [BEAT]], [[request, BEAT]]):
                assert await forwarded.play(segments) == expected

    run_virtual(scenario())


# --- the admin port ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def administering() -> AsyncIterator[Peer]:
    """A peer of connections to the admin port; a handler of the test reads every body and notes it."""
    noted: list[tuple[str, str, str, bytes]] = []

    async def note_request(request: BaseRequest) -> StreamResponse:
        body = await request.read()
        noted.append(("call", request.method, request.path_qs, body))
        return json_response({"size": len(body)})

    def take() -> tuple[Any, ...]:
        taken = tuple(noted)
        noted.clear()
        return taken

    server = make_server(note_request, max_body_bytes=3000)
    try:
        yield Peer(Connections(server, {"access_log": None, "keepalive_timeout": 1000.0}, HEADERS), take)
    finally:
        server.pre_shutdown()
        await server.shutdown(1.0)


@searched
@given(st.randoms(use_true_random=False))
def test_the_admin_port_gives_the_same_answers_however_requests_arrive(rng: Random) -> None:
    async def scenario() -> None:
        async with administering() as peer:
            await compare(conversation(rng), rng, peer)

    run_virtual(scenario())
