"""The same bytes get the same answers and have the same effect, however they arrive on the agents' port.

Whole, cut anywhere, byte by byte, joined with the requests before and behind them. `make fuzz` plays many more.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from shim.agent_api import AgentServer, Backends
from shim.config.settings import Listen
from shim.metrics import Metrics
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
from tests.chaos.harness.ways import Peer, cut_one_by_one, one_by_one, pipelined
from tests.support.frontend import Board, offering
from tests.support.virtual import run_virtual

INPUTS = int(os.environ.get("AGENT_SHIM_FUZZ_INPUTS", "10000"))
EXAMPLES = max(100, INPUTS // 100)

LISTEN = Listen(port=0, max_body_bytes=3000, max_status_body_bytes=150_000, header_timeout_s=5, body_timeout_s=7)
POLLS = [draft.render() for draft in RECORDED if draft.method == b"GET" and draft.target.endswith(b"/commands")]

pytestmark = pytest.mark.timeout(120 + INPUTS // 20)

searched = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Recorder:
    """A server in memory whose agent service is a `Board`, and what it was told and counted since the last look."""

    def __init__(self, *, commands: bool) -> None:
        self._commands = commands
        self.board = Board()
        metrics = Metrics(CollectorRegistry())
        self._counters = [metrics.requests, metrics.bad_requests, metrics.replies_lost, metrics.internal_errors]
        self._counters += [metrics.deprecated_calls, metrics.invalid_characters]
        backends = Backends(self.board, self.board)
        self.server = AgentServer(LISTEN, backends, dialects.load(), metrics, token=lambda: TOKEN)
        self._counted: dict[str, float] = {}

    def take(self) -> tuple[Any, ...]:
        """Return the calls and evidence since the last time, and the metrics that they changed."""
        calls = tuple(_essence(entry) for entry in self.board.log)
        self.board.log.clear()
        if self._commands:
            self.board.script = offering()
        before, self._counted = self._counted, self._counts()
        changed = {name: value - before.get(name, 0.0) for name, value in self._counted.items()}
        return (*calls, *sorted((name, value) for name, value in changed.items() if value))

    def _counts(self) -> dict[str, float]:
        return {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for counter in self._counters
            for family in counter.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }


def _essence(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    if entry[0] == "call":
        return "call", entry[1].token, repr(entry[2])
    return (entry[0], *entry[2:]) if entry[0] in ("next", "closed") else entry


@asynccontextmanager
async def recording(*, commands: bool = False) -> AsyncIterator[Peer]:
    """A peer of a server that records."""
    recorder = Recorder(commands=commands)
    await recorder.server.start()
    web = recorder.server._web
    assert web is not None
    try:
        yield Peer(web, recorder.take)
    finally:
        await recorder.server.stop(0)


async def compare(requests: list[bytes], rng: Random, peer: Peer) -> None:
    """Fail for a way in which these requests are answered differently or have another effect."""
    expected = await peer.play(one_by_one(requests))
    for name, segments in [("cut, one by one", cut_one_by_one(requests, rng)), *pipelined(requests, rng)]:
        assert await peer.play(segments) == expected, (name, segments)


@searched
@given(st.randoms(use_true_random=False))
def test_requests_get_the_same_answers_however_they_arrive(rng: Random) -> None:
    async def scenario() -> None:
        async with recording() as peer:
            await compare(conversation(rng), rng, peer)

    run_virtual(scenario())


@searched
@given(st.randoms(use_true_random=False))
def test_evidence_of_delivery_does_not_depend_on_where_requests_are_cut(rng: Random) -> None:
    """What is sent before the reply is no evidence that it was read, so pipelined requests have their calls only."""

    async def scenario() -> None:
        async with recording(commands=True) as peer:
            requests = [request for _ in range(2) for request in (rng.choice(POLLS), *conversation(rng))]
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
