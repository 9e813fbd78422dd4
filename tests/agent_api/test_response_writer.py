"""Calls that go by the vendor's HTTP API, as the frontend hands them over and their replies down.

Rules: docs/reference/protocol.md#4-modes.
"""

from __future__ import annotations

import gzip
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import pytest

from shim.agent_api.forwarding import target_of
from shim.config.settings import Listen
from shim.core.agent_calls import Accepted, AgentCall, HeartbeatCall, PollCall, StatusCall
from shim.ports import Caller, CallResult, FallbackScope, ProxyRequest, ProxyResponse
from tests.support.frontend import HEALTH, POLL, get, post, running

PACKED = gzip.compress(b'{"agent_id":"a","name":"n"}', mtime=0)
BEAT = post("/api/v1/clusters/agent/c1/heartbeat", b'{"status": "healthy"}')


class Api:
    """A `ports.Fallback` by hand: it notes what it gets and answers what it is told to."""

    def __init__(self, *replies: ProxyResponse | CallResult | None, everything: bool = True) -> None:
        self.seen: list[ProxyRequest] = []
        self.bodies: list[bytes] = []
        self._replies = list(replies)
        self._everything = everything
        self.in_use = True

    def scope(self) -> FallbackScope:
        return FallbackScope.ALL if self._everything else FallbackScope.SOME

    def handles(self, caller: Caller, call: AgentCall) -> bool:
        return isinstance(call, PollCall)

    async def serve(self, request: ProxyRequest) -> ProxyResponse | CallResult | None:
        self.seen.append(request)
        body = request.body
        self.bodies.append(body if isinstance(body, bytes) else b"".join([piece async for piece in body]))
        return self._replies.pop(0)


def plain(status: int = 200, body: bytes = b'{"a":1}', *headers: tuple[str, str], receipt: Any = None) -> ProxyResponse:
    return ProxyResponse(status, headers, body, receipt)


async def test_a_reply_goes_down_as_it_is() -> None:
    api = Api(plain(418, b"teapot", ("Content-Type", "text/plain"), ("Content-Length", "999"), ("X-Own", "1")))
    async with running(fallback=api, static_headers=lambda: {"Deprecation": "@1"}) as house:
        reply = await house.ask(BEAT)
    assert (reply.status, reply.body) == (418, b"teapot")
    assert reply.headers.items() >= {"content-type": "text/plain", "x-own": "1", "deprecation": "@1"}.items()
    assert api.bodies == [b'{"status": "healthy"}']
    assert isinstance(api.seen[0].call, HeartbeatCall)


async def test_what_nobody_here_understands_goes_there_too() -> None:
    api = Api(*[plain()] * 4)
    async with running(fallback=api) as house:
        for request in (
            get("/api/v9/unheard-of?q=%2F"),
            post("/api/v1/clusters/agent/register", b"{ no json"),
            post(
                "/api/v1/clusters/agent/register",
                gzip.compress(b'{"agent_id":"a","name":"n"}', mtime=0),
                "Content-Encoding: gzip",
            ),
            get("/api/v1/clusters/agent/c1/heartbeat"),
        ):
            assert (await house.ask(request)).status == 200
    assert [seen.target for seen in api.seen[:2]] == ["/api/v9/unheard-of?q=%2F", "/api/v1/clusters/agent/register"]
    assert [seen.call is None for seen in api.seen] == [True, True, False, True]


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "br", "gzip, gzip"])
@pytest.mark.parametrize("large", [False, True])
async def test_a_content_coding_goes_on_unchanged(coding: str, large: bool) -> None:
    api = Api(plain())
    body = PACKED + b"x" * 5000 if large else PACKED
    async with running(Listen(port=0, max_body_bytes=1000), fallback=api) as house:
        request = post("/api/v1/clusters/agent/register", body, f"Content-Encoding: {coding}")
        assert (await house.ask(request)).status == 200
    assert api.bodies == [body]
    assert ("Content-Encoding", coding) in api.seen[0].headers
    assert (api.seen[0].call is not None) is (not large and "gzip" in coding and "," not in coding)


async def test_an_agent_that_waits_with_a_large_body_is_told_to_go_on() -> None:
    api = Api(plain())
    async with running(Listen(port=0, max_body_bytes=1000), fallback=api) as house:
        agent = await house.agent()
        head = "POST /api/v1/agents/a/status HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\n"
        await agent.send(f"{head}Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n".encode())
        assert (await agent.reply()).status == 100
        await agent.send(b"x" * 5000)
        assert (await agent.reply()).status == 200
    assert api.bodies == [b"x" * 5000]


async def test_a_body_larger_than_a_call_is_streamed() -> None:
    api = Api(plain())
    async with running(Listen(port=0, max_body_bytes=1000), fallback=api) as house:
        assert (await house.ask(post("/api/v1/agents/a/status", b"x" * 5000))).status == 200
    assert api.bodies == [b"x" * 5000]
    assert ("Content-Length", "5000") in api.seen[0].headers


async def pieces(*parts: bytes, fault: bool = False) -> AsyncGenerator[bytes, None]:
    for part in parts:
        yield part
    if fault:
        raise aiohttp.ClientPayloadError


async def test_a_streamed_reply_is_chunked_and_the_connection_lives_on() -> None:
    api = Api(ProxyResponse(200, (), pieces(b"one", b"two")), plain())
    async with running(fallback=api) as house:
        agent = await house.agent()
        await agent.send(BEAT)
        reply = await agent.reply()
        assert reply.headers["transfer-encoding"] == "chunked"
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            rest += agent.take() or await agent.receive()
        assert rest == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
        await agent.send(BEAT)
        assert (await agent.reply()).body == b'{"a":1}'


async def test_a_streamed_reply_of_known_length_is_not_chunked() -> None:
    api = Api(ProxyResponse(200, (("Content-Length", "6"),), pieces(b"one", b"two")))
    async with running(fallback=api) as house:
        reply = await house.ask(BEAT)
    assert reply.body == b"onetwo"
    assert "transfer-encoding" not in reply.headers


async def test_an_old_client_gets_the_stream_until_the_connection_ends() -> None:
    api = Api(ProxyResponse(200, (), pieces(b"one", b"two")))
    async with running(fallback=api) as house:
        agent = await house.agent()
        await agent.send(b"GET /api/v1/x HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert (await agent.closed_by_peer()).endswith(b"\r\n\r\nonetwo")


async def test_a_reply_that_breaks_off_ends_the_connection_without_its_last_chunk() -> None:
    api = Api(ProxyResponse(200, (), pieces(b"one", fault=True)))
    async with running(fallback=api) as house:
        agent = await house.agent()
        await agent.send(BEAT)
        assert (await agent.closed_by_peer()).endswith(b"3\r\none\r\n")
        assert house.count("replies_lost_total") == 1


async def test_a_reply_with_commands_settles_its_receipt() -> None:
    api = Api(plain(200, b'{"commands":[]}', receipt="receipt-1"))
    async with running(fallback=api) as house:
        assert (await house.ask(POLL)).status == 200
        await house.board.until("clean")
        assert house.board.steps == ["written", "clean"]


async def test_what_comes_back_goes_to_the_agent_service() -> None:
    api = Api(None, CallResult(Accepted()), None)
    async with running(fallback=api) as house:
        assert (await house.ask(BEAT)).status == 200
        assert (await house.ask(BEAT)).status == 200
        assert len(house.board.calls) == 1  # the second was answered by the fallback
        assert (await house.ask(get("/unheard-of"))).status == 502


async def test_only_some_calls_go_there() -> None:
    api = Api(plain(), None, CallResult(Accepted()), everything=False)
    async with running(fallback=api) as house:
        assert (await house.ask(BEAT)).json == {"success": True}
        assert (await house.ask(POLL)).json == {"a": 1}
        assert (await house.ask(POLL)).json["commands"] == []
        assert (await house.ask(POLL)).json == {"success": True}
        assert (await house.ask(post("/api/v1/agents/a/status"))).status == 200
        assert [type(call) for call in house.board.calls] == [HeartbeatCall, PollCall, StatusCall]


async def test_who_must_show_a_token_must_do_so_here_too() -> None:
    api = Api(plain(), plain())
    async with running(Listen(port=0, auth="required"), fallback=api) as house:
        assert (await house.ask(BEAT)).status == 401
        assert (await house.ask(get("/unheard-of"))).status == 401
        assert (await house.ask(HEALTH)).status == 200
        assert (await house.ask(get("/unheard-of", "Authorization: Bearer t"))).status == 200


async def test_an_unknown_status_has_no_phrase_and_no_content_has_no_length() -> None:
    api = Api(plain(799, b""), plain(204, b""))
    async with running(fallback=api) as house:
        assert (await house.ask(BEAT)).status == 799
        reply = await house.ask(BEAT)
    assert (reply.status, "content-length" in reply.headers) == (204, False)


@pytest.mark.parametrize("body", [b"", None])
@pytest.mark.parametrize("status", [204, 304])
async def test_behind_a_reply_without_a_body_nothing_follows_on_the_connection(status: int, body: bytes | None) -> None:
    api = Api(ProxyResponse(status, (("Content-Length", "9"),), pieces() if body is None else body), plain())
    async with running(fallback=api) as house:
        agent = await house.agent()
        await agent.send(BEAT)
        reply = await agent.reply()
        assert (reply.status, reply.headers.keys() & {"content-length", "transfer-encoding"}) == (status, set())
        await agent.send(BEAT)
        assert (await agent.reply()).body == b'{"a":1}'


@pytest.mark.parametrize("length", ["442", None])
@pytest.mark.parametrize("body", [b"", None])
async def test_to_head_the_length_is_the_apis_and_no_body_follows(length: str | None, body: bytes | None) -> None:
    headers = () if length is None else (("Content-Length", length),)
    api = Api(ProxyResponse(200, headers, pieces() if body is None else body), plain())
    async with running(fallback=api) as house:
        agent = await house.agent()
        await agent.send(get("/unheard-of", method="HEAD"))
        reply = await agent.reply(head_only=True)
        assert (reply.headers.get("content-length"), "transfer-encoding" in reply.headers) == (length, False)
        await agent.send(BEAT)
        assert (await agent.reply()).body == b'{"a":1}'


@pytest.mark.parametrize(
    "raw,base,target",
    [
        ("//api/v1/x", "", "/api/v1/x"),
        ("/base/api/v1/x?y", "/base", "/api/v1/x?y"),
        ("/base//api", "base/", "/api"),
        ("/base?x", "/base", "/?x"),
        ("/basement/api", "/base", "/basement/api"),
        ("http://127.0.0.1:7080/base//api?x=http://y", "/base", "/api?x=http://y"),
        ("HTTP://[::1]?x", "", "/?x"),
        ("/x?y=http://z/w", "", "/x?y=http://z/w"),
    ],
)
def test_targets(raw: str, base: str, target: str) -> None:
    assert target_of(raw, base) == target
