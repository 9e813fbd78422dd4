"""The reverse proxy of modes `http` and `auto`, against a server that shows what it gets."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import pytest
from aiohttp import web

from shim.agent_api.forwarding import head
from shim.config.settings import Fallback, Upstream
from shim.fallback.reverse_proxy import MAX_READ_BYTES, ReverseProxy, Unreachable
from shim.ports import Caller, ProxyRequest, ProxyResponse
from shim.protocol.http import header_text

DIALLING = Fallback().dialling(Upstream())


def request(target: str = "/api/v1/x", body: Any = b"", headers: Any = (), method: str = "POST") -> ProxyRequest:
    return ProxyRequest(method, target, tuple(headers), body, Caller("tok", 1), None, 0.0)


@asynccontextmanager
async def api(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[tuple[ReverseProxy, str]]:
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    proxy = ReverseProxy({})
    try:
        yield proxy, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await proxy.close()
        await runner.cleanup()


async def echo(seen: web.Request) -> web.Response:
    return web.json_response(
        {
            "method": seen.method,
            "target": seen.raw_path,
            "headers": [[name.decode(), value.decode()] for name, value in seen.raw_headers],
            "body": (await seen.read()).decode(),
        }
    )


async def body_of(reply: ProxyResponse) -> bytes:
    return reply.body if isinstance(reply.body, bytes) else b"".join([piece async for piece in reply.body])


@pytest.mark.parametrize("method, status", [("POST", 204), ("HEAD", 200), ("HEAD", 404)])
async def test_what_has_no_body_is_not_awaited(method: str, status: int) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status)

    async with api(answer) as (proxy, base):
        assert (await proxy.send(base, DIALLING, request(method=method), None, whole=False)).body == b""


async def test_only_hop_by_hop_headers_and_the_host_are_changed() -> None:
    headers = [
        ("Host", "127.0.0.1:7080"),
        ("User-Agent", "Go-http-client/1.1"),
        ("Authorization", "Bearer of-the-agent"),
        ("Connection", "keep-alive, X-Of-This-Hop"),
        ("X-Of-This-Hop", "1"),
        ("Proxy-Authorization", "Basic eA=="),
        ("Te", "trailers"),
        ("X-Kept", "1"),
        ("X-Kept", "2"),
    ]
    async with api(echo) as (proxy, url):
        reply = await proxy.send(url, DIALLING, request(body=b"{}", headers=headers), None, whole=False)
        seen = json.loads(await body_of(reply))
    got = {name: [v for n, v in seen["headers"] if n == name] for name, _ in seen["headers"]}
    assert got.pop("Host") == [url.removeprefix("http://")]
    assert got == {
        "User-Agent": ["Go-http-client/1.1"],
        "Authorization": ["Bearer of-the-agent"],
        "X-Kept": ["1", "2"],
        "Content-Length": ["2"],
    }


async def test_bytes_beyond_ascii_in_headers_arrive_as_they_came_in_both_directions() -> None:
    arrived: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nX-Utf: c\xc3\xa4f\r\nX-Latin: c\xe4f\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy = ReverseProxy({})
    try:
        headers = [("X-Utf", header_text(b"c\xc3\xa4f")), ("X-Latin", header_text(b"c\xe4f"))]
        base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        reply = await proxy.send(base, DIALLING, request(method="GET", headers=headers), None, whole=False)
    finally:
        await proxy.close()
        server.close()
    assert b"X-Utf: c\xc3\xa4f\r\nX-Latin: c\xc3\xa4f\r\n" in arrived[0]
    assert b"X-Utf: c\xc3\xa4f\r\nX-Latin: c\xe4f\r\n" in head(reply, {}, keep=True, http11=True)[0]


async def test_the_upstream_token_may_stand_in_for_the_agents() -> None:
    async with api(echo) as (proxy, url):
        reply = await proxy.send(
            url, DIALLING, request(headers=[("Authorization", "Bearer mine")]), "theirs", whole=False
        )
        seen = json.loads(await body_of(reply))
    assert [value for name, value in seen["headers"] if name == "Authorization"] == ["Bearer theirs"]


@pytest.mark.parametrize(
    "base,target,arrives",
    [
        ("", "/api/v1/x?a=%2F&b", "/api/v1/x?a=%2F&b"),
        ("/base", "/api", "/base/api"),
        ("/base/", "/api", "/base/api"),
        ("", "/a%2fb/%20", "/a%2fb/%20"),
    ],
)
async def test_the_target_arrives_as_it_came(base: str, target: str, arrives: str) -> None:
    async with api(echo) as (proxy, url):
        reply = await proxy.send(url + base, DIALLING, request(target, method="GET"), None, whole=False)
        assert json.loads(await body_of(reply))["target"] == arrives


async def test_a_streamed_body_keeps_its_length() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    async with api(echo) as (proxy, url):
        headers = [("Content-Length", "1000000")]
        reply = await proxy.send(url, DIALLING, request(body=pieces(), headers=headers), None, whole=False)
        seen = json.loads(await body_of(reply))
    assert ["Content-Length", "1000000"] in seen["headers"]
    assert seen["body"] == "x" * 1_000_000


async def test_large_replies_come_in_pieces_and_as_they_were() -> None:
    packed = gzip.compress(b"y" * 3_000_000, 0)

    async def large(_: web.Request) -> web.Response:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip", "Keep-Alive": "timeout=5"})

    async with api(large) as (proxy, url):
        reply = await proxy.send(url, DIALLING, request(), None, whole=False)
        assert not isinstance(reply.body, bytes)
        assert {"Content-Encoding", "Keep-Alive"} & {name for name, _ in reply.headers} == {"Content-Encoding"}
        assert await body_of(reply) == packed


async def test_redirects_are_handed_down() -> None:
    async def moved(_: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "https://elsewhere.example/"})

    async with api(moved) as (proxy, url):
        reply = await proxy.send(url, DIALLING, request(), None, whole=False)
    assert (reply.status, dict(reply.headers)["Location"]) == (307, "https://elsewhere.example/")


async def test_a_reply_that_is_read_here_is_plain() -> None:
    async def poll(seen: web.Request) -> web.Response:
        assert seen.headers["Accept-Encoding"] == "identity"
        return web.Response(body=gzip.compress(b'{"commands": []}'), headers={"Content-Encoding": "gzip"})

    async with api(poll) as (proxy, url):
        reply = await proxy.send(url, DIALLING, request(headers=[("Accept-Encoding", "gzip")]), None, whole=True)
    assert reply.body == b'{"commands": []}'
    assert "Content-Encoding" not in dict(reply.headers)


async def test_large_replies_at_once_are_read_up_to_a_bound_of_all_together() -> None:
    one_has_ended = asyncio.Event()

    async def large(seen: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(seen)
        await response.write(bytes(MAX_READ_BYTES * 9 // 10))
        await one_has_ended.wait()
        return response

    async with api(large) as (proxy, url), asyncio.timeout(30):

        async def ask() -> ProxyResponse:
            try:
                return await proxy.send(url, DIALLING, request(), None, whole=True)
            finally:
                one_has_ended.set()  # the server lets none end before: it can only be the refused one

        outcomes = await asyncio.gather(ask(), ask(), return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ProxyResponse", "Unreachable"]
        assert (await ask()).status == 200, "what was reserved is free again"


async def test_what_cannot_be_asked_or_breaks_off_is_unreachable() -> None:
    async def breaks_off(seen: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(seen)
        await response.write(b"x")
        assert seen.transport is not None
        seen.transport.abort()
        return response

    async def bomb(_: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(bytes(MAX_READ_BYTES + 1)), headers={"Content-Encoding": "gzip"})

    async def flood(_: web.Request) -> web.Response:
        return web.Response(body=BytesIO(bytes(MAX_READ_BYTES + 1)))

    async def lies(_: web.Request) -> web.Response:
        return web.Response(body=b"no gzip", headers={"Content-Encoding": "gzip"})

    async with api(breaks_off) as (proxy, url):
        with pytest.raises(Unreachable):
            await proxy.send(url, DIALLING, request(), None, whole=True)
    nobody = ReverseProxy()
    with pytest.raises(Unreachable):
        await nobody.send(url, DIALLING, request(), None, whole=False)
    await nobody.close()
    for handler in (lies, bomb, flood):
        async with api(handler) as (proxy, url):
            with pytest.raises(Unreachable):
                await proxy.send(url, DIALLING, request(), None, whole=True)
