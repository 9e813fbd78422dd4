"""An open upstream socket: frames in, frames out, and every way it can end."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest
from aiohttp import WSMessage, WSMsgType
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from shim.config.settings import Upstream
from shim.core.bounds import LONG_TEXT_BYTES
from shim.ports import DialRequest
from shim.protocol.upstream_message import Message, decode
from shim.upstream import AiohttpUpstream
from shim.upstream.websocket import RawWebSocket, WebSocketPump
from tests.support.sockets import DEADLINE_S, Events, Tasks, accept_websocket, connect, tcp_server

HELLO = b'{"type":"hello","payload":{"n":1}}'


class Peer:
    """The controller's end of the first connection."""

    def __init__(self) -> None:
        self.connection: asyncio.Future[ServerConnection] = asyncio.get_running_loop().create_future()
        self.frames: asyncio.Queue[str | bytes] = asyncio.Queue()
        self.close_code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    async def serve(self, connection: ServerConnection) -> None:
        self.connection.set_result(connection)
        try:
            async for frame in connection:
                self.frames.put_nowait(frame)
        except ConnectionClosed:
            pass
        self.close_code.set_result(connection.close_code)

    async def next_frame(self) -> str | bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.frames.get()

    async def closed(self) -> int | None:
        async with asyncio.timeout(DEADLINE_S):
            return await self.close_code


class Stage:
    """A connected socket with both of its ends."""

    def __init__(self, peer: Peer, url: str) -> None:
        self.peer, self.url = peer, url
        self.tasks, self.events = Tasks(), Events()
        self.upstream = AiohttpUpstream(Upstream(max_message_bytes=100_000), self.tasks.spawn, {})

    async def connect(self) -> None:
        self.socket = await connect(self.upstream, DialRequest(self.url, "secret"), self.events)
        self.controller = await self.peer.connection


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    peer = Peer()
    async with serve(peer.serve, "127.0.0.1", 0, compression=None, max_size=None) as server:
        made = Stage(peer, f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws")
        await made.connect()
        try:
            yield made
        finally:
            await made.upstream.close()
            await made.tasks.finish()


async def test_envelopes_arrive_in_order_from_text_binary_and_fragments(stage: Stage) -> None:
    await stage.controller.send(HELLO.decode())
    await stage.controller.send(HELLO)
    await stage.controller.send([b'{"type":"frag', b"", b'mented"}'])
    await stage.events.until("message", 3)
    assert [m.type for m in stage.events.messages] == ["hello", "hello", "fragmented"]
    assert stage.events.log[0] == ("frame",), "every frame is told before what it carries"


async def test_bad_frames_never_cost_the_connection(stage: Stage) -> None:
    await stage.controller.send(b"\x00\xff\x00garbage")
    await stage.controller.send(b'{"type":"\xff\xfe"}', text=True)  # a text frame that is not UTF-8
    await stage.controller.send("[1]")
    await stage.controller.send('{"payload":{}}')
    await stage.controller.send('{"type":"x","payload":7}')
    await stage.controller.send("[" * 90_000)
    await stage.controller.send(HELLO)
    await stage.events.until("message", 2)
    kinds = [entry[0] for entry in stage.events.of("bad")]
    assert kinds == ["not_json", "not_object", "no_type", "bad_payload", "not_json"]
    assert [message.type for message in stage.events.messages] == ["\ufffd\ufffd", "hello"]


async def test_messages_go_out_as_text_in_order_and_pings_work_as_fences(stage: Stage) -> None:
    for n in range(300):
        stage.socket.send(Message("heartbeat", {"n": n}, timestamp="2026-01-01T00:00:00Z"))
    stage.socket.ping(b"fence")
    await stage.events.until("pong")
    assert stage.events.of("pong") == [(b"fence",)]
    frames = [stage.peer.frames.get_nowait() for _ in range(300)]  # all of them arrived before the pong came back
    assert all(isinstance(frame, str) for frame in frames)
    assert [decode(frame).payload["n"] for frame in frames] == list(range(300))


async def test_pings_are_answered_and_told(stage: Stage) -> None:
    before = len(stage.events.of("frame"))
    pong = await stage.controller.ping(b"are you there")
    async with asyncio.timeout(DEADLINE_S):
        await pong
    assert len(stage.events.of("frame")) > before
    assert stage.events.of("message") == []


@pytest.mark.parametrize("fragments", [1, 7])
async def test_the_largest_message_passes(stage: Stage, fragments: int) -> None:
    frame = b'{"type":"' + b"x" * (100_000 - 11) + b'"}'
    assert len(frame) == 100_000
    step = -(-len(frame) // fragments)
    await stage.controller.send([frame[i : i + step] for i in range(0, len(frame), step)] if fragments > 1 else frame)
    await stage.controller.send(HELLO)
    await stage.events.until("message", 2)
    assert len(stage.events.messages[0].type) == 100_000 - 11


async def test_a_message_too_big_ends_the_connection_with_1009(stage: Stage) -> None:
    await stage.controller.send(HELLO)
    await stage.controller.send(b"x" * 100_001)
    await stage.events.until("closed")
    assert await stage.peer.closed() == 1009
    assert stage.events.of("bad") == [("too_big",)]
    assert stage.events.log[-1] == ("closed", False, 0)


async def test_the_close_frame_reaches_a_peer_that_is_still_sending(stage: Stage) -> None:
    """Closing at once with unread data would send a reset, and the peer would never learn why."""
    await stage.controller.send(b"x" * 8_000_000)
    assert await stage.peer.closed() == 1009


@pytest.mark.parametrize("code", [1000, 1012, 4321])
async def test_a_close_frame_is_answered_and_told_last(stage: Stage, code: int) -> None:
    await stage.controller.send(HELLO)
    await stage.controller.close(code)
    await stage.events.until("closed")
    assert await stage.peer.closed() == code
    assert stage.events.log[-1] == ("closed", True, code)
    assert stage.events.log.index(("message", stage.events.messages[0])) < len(stage.events.log) - 1


async def test_a_lost_connection_is_told_once(stage: Stage) -> None:
    stage.controller.transport.abort()
    await stage.events.until("closed")
    stage.socket.send(Message("late"))
    stage.socket.ping(b"late")
    stage.socket.close(1000)
    stage.socket.abort()
    await stage.upstream.close()
    assert stage.events.of("closed") == [(False, 0)]


async def test_close_sends_what_is_queued_then_the_close_frame(stage: Stage) -> None:
    stage.socket.send(Message("last words"))
    stage.socket.close(1001)
    stage.socket.send(Message("too late"))
    await stage.events.until("closed")
    assert await stage.peer.closed() == 1001
    assert stage.events.of("closed") == [(True, 1001)]
    assert [decode(stage.peer.frames.get_nowait()).type for _ in range(stage.peer.frames.qsize())] == ["last words"]


async def test_abort_drops_the_connection_at_once(stage: Stage) -> None:
    stage.socket.abort()
    await stage.events.until("closed")
    assert stage.events.of("closed") == [(False, 0)]
    assert await stage.peer.closed() == 1006


async def test_shutdown_closes_with_1000_and_leaves_no_task(stage: Stage) -> None:
    await stage.upstream.close()
    assert await stage.peer.closed() == 1000
    await stage.tasks.finish()
    stage.upstream.dial(DialRequest(stage.url, "secret"), Events(), lambda outcome: pytest.fail("dialled after close"))
    await stage.upstream.close()
    assert stage.tasks.names == ["upstream", "upstream-writer", "upstream-reader"]


async def test_a_failing_handler_costs_nothing(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.events.failing = True
    with caplog.at_level(logging.ERROR):
        await stage.controller.send(HELLO)
        await stage.events.until("message")
    stage.events.failing = False
    await stage.controller.send(HELLO)
    await stage.events.until("message", 2)
    assert "handler of messages failed" in caplog.text
    assert "a defect of a handler" in caplog.text


async def test_the_loop_gets_its_turn_under_a_flood_of_frames(stage: Stage) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while len(stage.events.of("message")) < 2000:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    for _ in range(2000):
        await stage.controller.send(HELLO)
    await stage.events.until("message", 2000)
    await counting
    assert turns > 20


async def test_between_long_frames_as_much_time_is_left_as_they_took(stage: Stage) -> None:
    """Decoding and handling each of them holds the event loop: a new connection of an agent needs several turns."""
    clock = asyncio.get_running_loop().time
    spans: list[tuple[float, float]] = []

    def hold() -> None:
        began_s = clock()
        while clock() < began_s + 0.03:
            pass
        spans.append((began_s, clock()))

    stage.events.handle = hold
    text = b'{"type":"hello","payload":{"x":"' + b"x" * LONG_TEXT_BYTES + b'"}}'
    for _ in range(3):
        await stage.controller.send(text)
    await stage.events.until("message", 3)
    for (began_s, ended_s), (next_s, _) in itertools.pairwise(spans):
        assert next_s - ended_s >= 0.9 * (ended_s - began_s)


# --- peers that misbehave on the level of bytes -------------------------------------------------------------------


async def test_frames_are_not_read_while_there_is_no_room(stage: Stage) -> None:
    stage.events.room = False
    peer = await stage.peer.connection
    for _ in range(3):
        await peer.send(HELLO)
    await stage.events.until("message")
    await peer.ping()
    assert len(stage.events.messages) == 1
    stage.events.room = True
    await stage.events.until("message", 3)


async def test_a_receiver_that_never_has_room_does_not_keep_pings_unanswered(stage: Stage) -> None:
    stage.events.room = False
    peer = await stage.peer.connection
    for _ in range(100):
        await peer.send(HELLO)
    async with asyncio.timeout(DEADLINE_S):
        await (await peer.ping())
    assert len(stage.events.messages) == 100


async def test_a_long_message_on_a_slow_line_is_life() -> None:
    go_on = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        writer.write(b"\x81\x7e\x00\xc8" + b'{"type":"')  # 200 bytes are promised
        await go_on.wait()
        writer.write(b"x" * (200 - 11) + b'"}')
        await reader.read(1)

    async with tcp_server(converse) as port:
        tasks, events = Tasks(), Events()
        upstream = AiohttpUpstream(Upstream(), tasks.spawn, environ={})
        await connect(upstream, DialRequest(f"ws://127.0.0.1:{port}", "t"), events)
        go_on.set()
        await events.until("message")
        assert len(events.of("frame")) >= 2, "the parts of the frame and the frame itself"
        await upstream.close()
        await tasks.finish()


async def test_closing_is_prompt_when_the_peer_neither_reads_nor_answers() -> None:
    gone = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await gone.wait()

    async with tcp_server(converse) as port:
        tasks, events = Tasks(), Events()
        upstream = AiohttpUpstream(Upstream(), tasks.spawn, environ={})
        socket = await connect(upstream, DialRequest(f"ws://127.0.0.1:{port}", "t"), events)
        for _ in range(20):
            socket.send(Message("filler", {"x": "y" * 1_000_000}))
        started = asyncio.get_running_loop().time()
        socket.close(1000)
        await events.until("closed")
        assert asyncio.get_running_loop().time() - started < 9, "aiohttp's own limit is 10 s"
        assert events.of("closed") == [(False, 0)]
        gone.set()
        await upstream.close()
        await tasks.finish()


async def test_a_peer_that_stops_reading_is_dropped_before_memory_fills(caplog: pytest.LogCaptureFixture) -> None:
    gone = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await gone.wait()

    async with tcp_server(converse) as port:
        tasks, events = Tasks(), Events()
        upstream = AiohttpUpstream(Upstream(), tasks.spawn, environ={})
        socket = await connect(upstream, DialRequest(f"ws://127.0.0.1:{port}", "t"), events)
        for _ in range(70):
            socket.send(Message("filler", {"x": "y" * 1_000_000}))
        await events.until("closed")
        assert "does not read" in caplog.text
        gone.set()
        await upstream.close()
        await tasks.finish()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xc1\x00",  # a reserved bit
        b"\x83\x00",  # an unknown opcode
        b"\x80\x00",  # a continuation of nothing
        b"\x09\x00",  # a fragmented ping
        b"\x88\x01\x00",  # a close frame of one byte
    ],
)
async def test_a_broken_protocol_ends_the_connection_with_1002(garbage: bytes) -> None:
    received = asyncio.get_running_loop().create_future()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        writer.write(b"\x81\x0f" + b'{"type":"last"}' + garbage)
        received.set_result(await reader.readexactly(8))
        writer.close()

    async with tcp_server(converse) as port:
        tasks, events = Tasks(), Events()
        upstream = AiohttpUpstream(Upstream(), tasks.spawn, environ={})
        await connect(upstream, DialRequest(f"ws://127.0.0.1:{port}", "t"), events)
        await events.until("closed")
        frame = await received
        code = bytes(a ^ b for a, b in zip(frame[6:8], frame[2:4], strict=True))
        assert (frame[0], int.from_bytes(code, "big")) == (0x88, 1002)
        assert [entry for entry in events.log if entry[0] != "frame"] == [
            ("message", Message("last")),
            ("bad", "protocol_error"),
            ("closed", False, 0),
        ]
        await upstream.close()
        await tasks.finish()


CUT = ("ü" * 61).encode()[:121]  # a text that its sender cut in the middle of a character


@pytest.mark.parametrize(
    "code, text, told, reply",
    [
        (1000, b"", "", 1000),
        (1001, b"going away", "going away", 1001),
        (4401, b"invalid token", "invalid token", 4401),
        (4401, CUT, "ü" * 60 + "\ufffd", 4401),
        (1008, b"\xff\xfe", "\ufffd\ufffd", 1008),
        (3000, b"x" * 123, "x" * 123, 3000),
        *((code, b"", "", code) for code in (1002, 1003, 1007, 1009, 1010, 1011, 1012, 1013, 1014, 4999)),
        *((code, b"why", "why", 1002) for code in (1, 999, 1004, 1005, 1006, 1015, 2999)),
        (5000, b"", "", 1002),
    ],
)
async def test_every_close_frame_is_taken_with_its_code_and_its_text(
    code: int, text: bytes, told: str, reply: int
) -> None:
    received = asyncio.get_running_loop().create_future()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        payload = code.to_bytes(2, "big") + text
        writer.write(b"\x81\x0f" + b'{"type":"last"}' + b"\x88" + bytes([len(payload)]) + payload)
        received.set_result(await reader.readexactly(8))
        writer.close()

    async with tcp_server(converse) as port:
        tasks, events = Tasks(), Events()
        upstream = AiohttpUpstream(Upstream(), tasks.spawn, environ={})
        await connect(upstream, DialRequest(f"ws://127.0.0.1:{port}", "t"), events)
        await events.until("closed")
        frame = await received
        sent = bytes(a ^ b for a, b in zip(frame[6:8], frame[2:4], strict=True))
        assert (frame[0], int.from_bytes(sent, "big")) == (0x88, reply)
        assert [entry for entry in events.log if entry[0] != "frame"] == [
            ("message", Message("last")),
            ("closed", True, code),
        ]
        assert events.close_reason == told
        await upstream.close()
        await tasks.finish()


async def test_a_close_frame_without_a_code_is_answered() -> None:
    received = asyncio.get_running_loop().create_future()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        writer.write(b"\x88\x00")
        received.set_result(await reader.readexactly(8))

    async with tcp_server(converse) as port:
        tasks, events = Tasks(), Events()
        upstream = AiohttpUpstream(Upstream(), tasks.spawn, environ={})
        await connect(upstream, DialRequest(f"ws://127.0.0.1:{port}", "t"), events)
        await events.until("closed")
        assert events.of("closed") == [(True, 0)]
        assert (await received)[0] == 0x88
        await upstream.close()
        await tasks.finish()


class SocketWithADefect:
    """A WebSocket whose writing fails as nothing expects. Reading ends when it is aborted."""

    def __init__(self) -> None:
        self.aborted = asyncio.Event()

    def watch(self, on_bytes: Callable[[], None]) -> None:
        pass

    async def send_frame(self, data: bytes, kind: WSMsgType) -> None:
        raise RuntimeError("a defect")

    async def receive(self) -> WSMessage:
        await self.aborted.wait()
        return WSMessage(WSMsgType.CLOSED, None, None)

    def abort(self) -> None:
        self.aborted.set()


async def test_a_defect_of_the_writer_ends_its_connection_as_a_loss() -> None:
    events = Events()
    pump = WebSocketPump(cast("RawWebSocket", SocketWithADefect()), events)
    pump.ping(b"fence")
    async with asyncio.timeout(DEADLINE_S):
        wrote, read = await asyncio.gather(pump.write(), pump.read(), return_exceptions=True)
    assert isinstance(wrote, RuntimeError)
    assert read is None
    assert events.of("closed") == [(False, 0)]
