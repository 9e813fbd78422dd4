"""Dialling: what goes out, how every failure is told, and that no token is ever told with it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from shim.config.settings import Upstream
from shim.ports import DialFailure, DialRequest, WebSocket
from shim.upstream import AiohttpUpstream
from shim.upstream.dial_errors import failure_of, retry_after_s
from tests.support.sockets import Events, Tasks, accept_websocket, answer, connect, dial, read_head, refusal, tcp_server

TOKEN = "to&ken=canary"


@asynccontextmanager
async def dialling(settings: Upstream | None = None) -> AsyncIterator[AiohttpUpstream]:
    tasks = Tasks()
    upstream = AiohttpUpstream(settings or Upstream(), tasks.spawn, environ={})
    try:
        yield upstream
    finally:
        await upstream.close()
        await tasks.finish()


class Handshakes:
    """Accepts WebSockets and keeps the request lines and headers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.append(await accept_websocket(reader, writer))
        await reader.read(1)


@pytest.mark.parametrize(
    "in_header,in_query,line,header",
    [
        (True, False, "GET /base%2Fx/ws?tenant=a%26b&cluster_uuid=u%201 HTTP/1.1", f"Bearer {TOKEN}"),
        (
            False,
            True,
            "GET /base%2Fx/ws?tenant=a%26b&cluster_uuid=u%201&token=to%26ken%3Dcanary HTTP/1.1",
            None,
        ),
        (
            True,
            True,
            "GET /base%2Fx/ws?tenant=a%26b&cluster_uuid=u%201&token=to%26ken%3Dcanary HTTP/1.1",
            f"Bearer {TOKEN}",
        ),
    ],
)
async def test_the_token_goes_where_it_is_wanted(
    in_header: bool, in_query: bool, line: str, header: str | None
) -> None:
    handshakes = Handshakes()
    async with tcp_server(handshakes.converse) as port, dialling() as upstream:
        url = f"ws://127.0.0.1:{port}/base%2Fx/ws?tenant=a%26b"
        await connect(upstream, DialRequest(url, TOKEN, in_header, in_query, (("cluster_uuid", "u 1"),)), Events())
    seen, headers = handshakes.seen[0]
    assert seen == line
    assert headers.get("authorization") == header
    assert headers["host"] == f"127.0.0.1:{port}"
    assert headers["user-agent"].startswith("agent-shim/")
    assert not {"sec-websocket-extensions", "origin", "cookie"} & set(headers)


@pytest.mark.parametrize(
    "response,expected",
    [
        (answer("401 Unauthorized"), DialFailure("status", 401, None, "HTTP 401")),
        (answer("403 Forbidden", "Retry-After: nonsense"), DialFailure("status", 403, None, "HTTP 403")),
        (answer("429 Too Many Requests", "Retry-After: 7"), DialFailure("status", 429, 7.0, "HTTP 429")),
        (
            answer("503 Gone", "Date: Tue, 01 Jan 2030 00:00:00 GMT", "Retry-After: Tue, 01 Jan 2030 00:01:30 GMT"),
            DialFailure("status", 503, 90.0, "HTTP 503"),
        ),
        (answer("200 OK"), DialFailure("status", 200, None, "HTTP 200")),
        (answer("307 Moved"), DialFailure("status", 307, None, "HTTP 307")),
        (
            answer("101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Accept: no"),
            DialFailure("handshake", 0, None, "Invalid challenge response"),
        ),
        (
            b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
            DialFailure("handshake", 0, None, "the answer is no HTTP, or its head is too large"),
        ),
    ],
)
async def test_answers_that_are_no_websocket(response: bytes, expected: DialFailure) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(response)

    async with tcp_server(converse) as port, dialling() as upstream:
        assert await refusal(upstream, DialRequest(f"ws://127.0.0.1:{port}/ws", TOKEN, in_query=True)) == expected


async def test_a_redirect_is_never_followed() -> None:
    handshakes = Handshakes()
    async with tcp_server(handshakes.converse) as target:

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(answer("302 Found", f"Location: http://127.0.0.1:{target}/ws"))

        async with tcp_server(converse) as port, dialling() as upstream:
            failure = await refusal(upstream, DialRequest(f"ws://127.0.0.1:{port}/ws", TOKEN))
    assert failure.status == 302
    assert handshakes.seen == []


async def test_a_controller_that_hangs_up_is_dialled_once() -> None:
    """By itself aiohttp sends an idempotent request a second time when the first connection is cut."""
    dials = 0

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dials
        dials += 1
        await read_head(reader)

    async with tcp_server(converse) as port, dialling() as upstream:
        failure = await refusal(upstream, DialRequest(f"ws://127.0.0.1:{port}/ws", TOKEN))
    assert (failure.reason, failure.status, dials) == ("handshake", 0, 1)


async def test_a_silent_controller_times_out() -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with tcp_server(converse) as port, dialling(Upstream(connect_timeout_s=0.1)) as upstream:
        failure = await refusal(upstream, DialRequest(f"ws://127.0.0.1:{port}/ws", TOKEN))
    assert failure.reason == "timeout"


async def test_nothing_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with dialling() as upstream:
            failure = await refusal(upstream, DialRequest(f"ws://127.0.0.1:{unused.getsockname()[1]}/ws", TOKEN))
    assert failure == DialFailure("tcp", detail="Connection refused")


async def test_a_name_that_does_not_exist() -> None:
    async with dialling(Upstream(connect_timeout_s=12)) as upstream:  # resolvers may be slow to say no
        failure = await refusal(upstream, DialRequest("ws://controller.invalid/ws", TOKEN))
    assert failure.reason == "dns"
    assert failure.detail.startswith("cannot resolve controller.invalid: ")


async def test_dials_share_a_look_up_that_hangs_and_ask_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up cannot be cancelled. If each dial began its own, they would be as many as there were dials."""
    loop = asyncio.get_running_loop()
    answered, asked = asyncio.Event(), []

    async def look_up(host: str, port: int, **options: object) -> list[object]:
        asked.append(host)
        await answered.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

    monkeypatch.setattr(loop, "getaddrinfo", look_up)
    hasty = Upstream(connect_timeout_s=0.2)
    async with tcp_server(Handshakes().converse) as port, dialling(hasty) as upstream:
        request = DialRequest(f"ws://controller.test:{port}/ws", TOKEN)
        for _ in range(3):
            assert (await refusal(upstream, request)).reason == "timeout"
        assert asked == ["controller.test"]
        answered.set()
        for _ in range(20):  # the steps from the answer to the end of the look-up
            await asyncio.sleep(0)
        for _ in range(2):
            await dial(upstream, request)  # its own time may be over before it is connected
        assert len(asked) == 3, "an answer is used by those who waited for it, and by nobody later"


async def test_a_token_that_cannot_be_a_header_is_told_without_it() -> None:
    async with tcp_server(Handshakes().converse) as port, dialling() as upstream:
        failure = await refusal(upstream, DialRequest(f"ws://127.0.0.1:{port}/ws", "to\r\nken"))
    assert failure == DialFailure("handshake", detail="ValueError")


@pytest.mark.parametrize(
    "headers,expected",
    [
        ({}, None),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": " 12 "}, 12.0),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "1.5"}, None),
        ({"Retry-After": "²"}, None),
        ({"Retry-After": "9" * 400}, 999_999_999.0),
        ({"Retry-After": "Tue, 01 Jan 2030 00:00:10 GMT"}, None),
        ({"Retry-After": "Tue, 01 Jan 2030 00:00:10 GMT", "Date": "Tue, 01 Jan 2030 00:00:00 GMT"}, 10.0),
        ({"Retry-After": "Tue, 01 Jan 2030 00:00:00 GMT", "Date": "Tue, 01 Jan 2030 00:00:10 GMT"}, 0.0),
        ({"Retry-After": "Tue, 01 Jan 2030 00:00:10", "Date": "Tue, 01 Jan 2030 00:00:00 GMT"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers) == expected


def test_an_unexpected_error_tells_only_its_type() -> None:
    assert failure_of(RuntimeError(TOKEN)) == DialFailure("handshake", detail="RuntimeError")


async def test_no_log_and_no_failure_shows_the_token(caplog: pytest.LogCaptureFixture) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _ = await read_head(reader)
        status = line.split("/ws/")[1][:3]
        if status != "cut":
            writer.write(answer(f"{status} No", "Location: /elsewhere"))

    with caplog.at_level(logging.DEBUG):
        async with tcp_server(converse) as port, dialling() as upstream:
            for path in ("401", "302", "101", "cut", "700"):
                url = f"ws://127.0.0.1:{port}/ws/{path}"
                failure = await refusal(upstream, DialRequest(url, TOKEN, in_query=True, query=(("key", "canary"),)))
                assert "canary" not in repr(failure)
    assert "canary" not in caplog.text
    assert "canary" not in repr(DialRequest("ws://h", TOKEN))


async def test_the_way_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with tcp_server(Handshakes().converse) as port, dialling() as upstream:
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                await connect(upstream, DialRequest(f"ws://127.0.0.1:{port}/ws?key=canary", TOKEN), Events())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("shim.")]
    assert lines == [f"upstream ws://127.0.0.1:{port} is dialled direct"]


async def test_a_failing_handler_of_the_dial_result_drops_the_socket(caplog: pytest.LogCaptureFixture) -> None:
    def defect(outcome: WebSocket | DialFailure) -> None:
        raise RuntimeError("a defect of a handler")

    events = Events()
    async with tcp_server(Handshakes().converse) as port, dialling() as upstream:
        upstream.dial(DialRequest(f"ws://127.0.0.1:{port}/ws", TOKEN), events, defect)
        await events.until("closed")
    assert events.log == [("closed", False, 0)]
    assert "a defect of a handler" in caplog.text


async def test_events_never_come_before_the_socket_was_handed_over() -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        writer.write(b"\x81\x0f" + b'{"type":"eager"}'[:15])  # in one segment with the handshake's answer
        await reader.read(1)

    events = Events()
    order: list[object] = []
    handed_over: Callable[[WebSocket | DialFailure], None] = lambda outcome: order.append(list(events.log))  # noqa: E731
    async with tcp_server(converse) as port, dialling() as upstream:
        upstream.dial(DialRequest(f"ws://127.0.0.1:{port}/ws", TOKEN), events, handed_over)
        await events.until("bad")
    assert order == [[]]


async def test_shutdown_ends_pending_dials_without_a_result() -> None:
    accepted = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        accepted.set()
        await reader.read()

    async with tcp_server(converse) as port, dialling() as upstream:
        upstream.dial(
            DialRequest(f"ws://127.0.0.1:{port}/ws", TOKEN), Events(), lambda outcome: pytest.fail("a result")
        )
        await accepted.wait()
        await upstream.close()
