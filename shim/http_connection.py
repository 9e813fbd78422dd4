"""An HTTP connection that parses one request at a time and bounds what a peer can make it hold.

aiohttp's own protocol parses whatever has arrived. Here the parser gets one request at a time: what a peer sends behind
an unanswered request stays as bytes, is bounded, and stops the reading (docs/concepts/threat-model.md#bounds). It also
gives the exact time of a request's first byte.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from shim.core.bounds import FREE_BYTES, MAX_EMPTY_LINES, MAX_HEAD_BYTES, MAX_WAITING_BYTES

LINGER_S = 2.0
CHUNKED = -1

logger = logging.getLogger(__name__)


class NoRoom(Exception):
    """A body is given up because all connections together hold too much."""


class EmptyLine:
    """Finds the next empty line in bytes that come in pieces: no head and no chunked body ends anywhere else."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def find(self, data: bytes) -> int:
        """Return how many bytes of `data` go up to the end of the next empty line, 0 if there is none yet."""
        seen = self._tail + data
        at = seen.find(b"\r\n\r\n")
        if at < 0:
            self._tail = seen[-3:]
            return 0
        end = at + 4 - len(self._tail)
        self._tail = b""
        return end


class Budget:
    """Bytes that all connections together may have in memory: bodies being read, unfinished heads, what waits.

    Each may be large, but not all at a time. What each connection may hold anyway (`FREE_BYTES`) is not counted.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.used_bytes = 0

    def take(self, size_bytes: int) -> bool:
        """Reserve so many more; false if there is no room, and nothing is reserved."""
        if self.used_bytes + size_bytes > self._limit_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """They are free again."""
        self.used_bytes -= size_bytes


class HttpConnection(RequestHandler):
    """aiohttp's protocol for one connection, with bounds; subclasses say how refusals look and are counted."""

    __slots__ = (
        "_arrived_s",
        "_backlog",
        "_backlog_since_s",
        "_body",
        "_body_left",
        "_budget",
        "_charged_bytes",
        "_empty_line",
        "_empty_lines",
        "_head_bytes",
        "_head_since_s",
        "_head_timeout_s",
        "_head_timer",
        "_http",
        "_open",
        "_pending",
        "_pipelined",
        "_raw",
        "_turned_away",
        "_unread_bytes",
        "_unread_since_s",
        "_wire",
    )

    def __init__(self, server: web.Server, budget: Budget, head_timeout_s: float, options: dict[str, Any]) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._budget = budget
        self._head_timeout_s = head_timeout_s
        self._http: Any = self._parser
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its `transport` before the end
        self._turned_away = False
        self._open = False  # a request is with the handler, which has not answered it yet
        self._arrived_s = 0.0
        self._head_since_s: float | None = None
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._empty_line = EmptyLine()
        self._empty_lines = 0
        self._body: StreamReader = EMPTY_PAYLOAD
        self._body_left = 0  # bytes that are still to come, or `CHUNKED`
        self._backlog = b""
        self._backlog_since_s = 0.0
        self._unread_since_s: float | None = None  # when bytes were seen in the kernel that were not read yet
        self._unread_bytes = 0  # what came of a body with its head, and no handler has begun to read
        self._charged_bytes = 0
        self._pipelined = False
        self._pending: Any = None  # the answer that `_answered_at_once` has asked for elsewhere
        self._raw = b""  # the request that is being answered at once

    # --- for subclasses ---

    def _refusal(self, status: int, text: str, more: str = "") -> bytes:
        """Return the whole response to what is refused before it becomes a request for a handler."""
        raise NotImplementedError

    def _count_refused(self, reason: str) -> None:
        """Count what is refused: `head`, `http` or `memory`."""

    def _answered_at_once(self, message: RawRequestMessage, body: StreamReader, arrived_s: float) -> bool:
        """Answer a request without a handler, if that is possible."""
        return False

    def _watch_for_first_request(self, timeout_s: float) -> None:
        """Close the connection if it says nothing for so long."""
        self._head_timer = self._loop.call_later(timeout_s, self._never_spoke)

    def _drop_what_is_held(self) -> None:
        """Forget what has not been parsed, because the connection ends."""
        self._stop_head_timer()
        self._backlog = b""
        self._head_bytes = self._unread_bytes = 0
        self._charge()

    # --- requests ---

    def now_s(self) -> float:
        """The event loop's time."""
        return self._loop.time()

    @property
    def closing(self) -> bool:
        """True when the next reply is the last."""
        return self._close or self._force_close

    @property
    def _must_wait(self) -> bool:
        """True while nothing more may be parsed: a request is whole and unanswered, or its body's reader is full."""
        return self._reading_paused or (self._open and not self._body_left) or self._wire is None

    def data_received(self, data: bytes) -> None:
        if self._close or self._force_close or self._turned_away:
            return
        if self._payload_parser is not None:
            super().data_received(data)  # the connection has become a WebSocket
        elif not data:
            if not self._body.is_eof():
                self._feed_body(b"")  # the body's reader has room for what the parser held back
            self._read_on()
        elif self._backlog or self._must_wait:
            self._keep(data, self._loop.time())
        else:
            self._read(data, self._loop.time(), waited=False)

    def set_parser(self, parser: Any, data_received_cb: Callable[[], None] | None = None) -> None:
        """Become a WebSocket: what waited behind the handshake are its first frames."""
        super().set_parser(parser, data_received_cb)
        data, self._backlog = self._backlog, b""
        self._charge()
        if data:
            super().data_received(data)
        if self._buffer_paused:
            self._resume_reading_for_buffer()

    def _resume_reading_if_drained(self) -> None:
        """Leave the reading to `_request_over`: aiohttp would go on as soon as a handler has begun."""

    def _read(self, data: bytes, since_s: float, *, waited: bool) -> None:
        """Parse up to the end of the current request and keep the rest; `waited`: it was kept before."""
        while data and not (self._close or self._force_close or self._turned_away):
            if self._must_wait:
                self._keep(data, since_s)
                return
            if self._body_left and self._body.exception() is not None:
                return  # nobody reads the rest of a body that failed, and the connection ends with its reply
            if self._body_left:
                size = self._size_in_body(data)
                self._take_body(data[:size])
                data = data[size:]
            else:
                data = self._read_head(data, since_s, waited=waited)
        self._charge()

    def _keep(self, data: bytes, since_s: float) -> None:
        """Hold bytes back until the request before them is answered; beyond a bound no more are read."""
        if not self._backlog:
            self._backlog_since_s = since_s
            if self._open and self._head_timer is None:
                self._head_timer = self._loop.call_later(self._head_timeout_s, self._head_too_slow)
        self._backlog += data
        if len(self._backlog) >= MAX_WAITING_BYTES and not self._buffer_paused:
            self._pause_reading_for_buffer()
        self._charge()

    def _read_on(self) -> None:
        """Go on with what was kept."""
        data, self._backlog = self._backlog, b""
        if data:
            self._read(data, self._backlog_since_s, waited=True)
        self._charge()
        if self._buffer_paused and len(self._backlog) < MAX_WAITING_BYTES:
            self._resume_reading_for_buffer()

    def _charge(self) -> None:
        if not self._adjust_charge():
            self._out_of_memory()

    def _adjust_charge(self) -> bool:
        """Take what is held beyond a small allowance from the budget of all connections; false if there is no room."""
        held_bytes = max(0, len(self._backlog) + self._head_bytes + self._unread_bytes - FREE_BYTES)
        if held_bytes <= self._charged_bytes:
            self._budget.give_back(self._charged_bytes - held_bytes)
        elif not self._budget.take(held_bytes - self._charged_bytes):
            return False
        self._charged_bytes = held_bytes
        return True

    def _out_of_memory(self) -> None:
        if not self._open:
            self._turn_away(503, "too many large requests at a time", "memory", "Retry-After: 1\r\n")
            return
        self._count_refused("memory")
        self._backlog = b""
        self.close()  # the request under way gets its answer, what was sent behind it gets none
        self._charge()

    # --- heads ---

    def _read_head(self, data: bytes, since_s: float, *, waited: bool) -> bytes:
        """Parse a head, or a piece of one; returns what comes behind its request."""
        is_start = self._head_since_s is None
        if is_start:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2: an empty line before a request is not its beginning
            if not data:
                return b""
            self._begin_head(since_s, waited=waited)
        end = self._empty_line.find(data)
        self._raw = data if is_start and end else b""
        piece, rest = (data[:end], data[end:]) if end else (data, b"")
        self._head_bytes += len(piece)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._turn_away(431, "the head of the request is too large", "head")
            return b""
        try:
            messages, upgraded, _ = self._http.feed_data(piece)
        except HttpProcessingError as fault:
            self._malformed(fault)
            return b""
        if not messages:
            return rest
        if len(messages) > 1:  # the parser sees requests where no head ends: nothing of it can be trusted
            self._turn_away(400, "malformed request", "http")
            return b""
        return self._begin_body(*messages[0], upgraded=upgraded, rest=rest)

    def _begin_head(self, since_s: float, *, waited: bool) -> None:
        self._head_since_s = since_s if self._unread_since_s is None else min(since_s, self._unread_since_s)
        self._unread_since_s = None
        # A request that began before the last one was answered is no sign that its sender has read anything.
        self._pipelined = self._pipelined or waited
        # the connection is not idle any more: from here on the head's own time counts
        self._next_keepalive_close_time = self._loop.time() + self._head_timeout_s + self._keepalive_timeout
        self._stop_head_timer()
        self._head_timer = self._loop.call_later(self._head_timeout_s, self._head_too_slow)

    def _begin_body(self, message: RawRequestMessage, body: StreamReader, *, upgraded: bool, rest: bytes) -> bytes:
        """Take a request whose head is whole, with as much of its body as is here; returns what comes behind it."""
        arrived_s = self._loop.time() if self._head_since_s is None else self._head_since_s
        self._head_since_s = None
        self._head_bytes = 0
        self._stop_head_timer()
        self._body, self._empty_lines = body, 0
        if message.method == hdrs.METH_CONNECT:
            self._body_left = 0
        else:
            self._body_left = CHUNKED if message.chunked else int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
        self._upgraded = upgraded
        self._open = True
        if rest and self._body_left:
            size = self._size_in_body(rest)
            self._take_body(rest[:size])
            rest = rest[size:]
        self._raw = b"" if self._body_left else self._raw[: len(self._raw) - len(rest)]
        answered = self._answered_at_once(message, body, arrived_s)
        self._raw = b""
        if answered:
            self._open = self._pending is not None
            self._unread_bytes = 0
        else:
            self._arrived_s = arrived_s
            self._request_count += 1
            self._messages.append((message, body))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        return rest

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _never_spoke(self) -> None:
        self._head_timer = None
        self.force_close()

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self._open:
            if b"\r\n\r\n" not in self._backlog:
                self._count_refused("head")
                self.close()  # an earlier request is being served and gets its answer
            return
        self._turn_away(408, "the request did not arrive in time", "head")

    def _malformed(self, fault: HttpProcessingError) -> None:
        """Answer what the parser refused in our own words: its own echo the input, also to the log."""
        logger.debug("a malformed request: %s", type(fault).__name__)
        if isinstance(fault, LineTooLong):
            self._turn_away(431, "a line of the request is too long", "http")
        else:
            self._turn_away(400, "malformed request", "http")

    def _turn_away(self, status: int, text: str, reason: str, more: str = "") -> None:
        """Answer what never becomes a call, and close."""
        self._count_refused(reason)
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(self._refusal(status, text, more))
        self.end_after_reply()

    def end_after_reply(self) -> None:
        """Close after a last reply, but throw away for a moment what still comes: a reset would destroy the reply."""
        self._turned_away = True
        self._parser = self._http = None  # what it has of an unfinished head is large
        self._drop_what_is_held()
        if not self._body.is_eof():
            self._body.feed_eof()  # else aiohttp would read on
        self._forget_body()
        self._reading_paused = self._buffer_paused = False
        self._resume_transport_reading()  # a peer that cannot write on does not read the reply
        wire = self._wire
        if wire is not None and not wire.is_closing():
            if wire.can_write_eof():
                wire.write_eof()
            self._head_timer = self._loop.call_later(LINGER_S, self.force_close)

    # --- bodies ---

    def _size_in_body(self, data: bytes) -> int:
        """Return how many bytes of `data` the parser may have now; all of them belong to the current body."""
        if self._body_left != CHUNKED:
            size = min(len(data), self._body_left)
            self._body_left -= size
            return size
        self._empty_lines += 1
        return self._empty_line.find(data) or len(data)

    def _take_body(self, data: bytes) -> None:
        """Hand a piece of a body to its reader, or fail the body where all connections together hold too much."""
        self._unread_bytes += len(data)
        if self._adjust_charge():
            self._loop.call_soon(self._release_body)  # directly before a reader that waits wakes up and takes it over
            self._feed_body(data)
        else:
            self._unread_bytes = 0
            self._body_left = CHUNKED
            self._forget_body()
            self._body.set_exception(NoRoom())

    def _forget_body(self) -> None:
        """Free what nobody is going to read of a body: aiohttp keeps its reader until the next request."""
        if self._body is not EMPTY_PAYLOAD:
            self._body._buffer.clear()  # noqa: SLF001 - reading it would make aiohttp parse on
            self._body._size = self._body._buffer_offset = 0  # noqa: SLF001 - they belong to the buffer

    def _release_body(self) -> None:
        if self._unread_bytes and not self._messages:
            self._unread_bytes = 0
            self._adjust_charge()

    def _feed_body(self, data: bytes) -> None:
        fault: Exception | None = None
        messages: Any = ()
        try:
            messages, self._upgraded, _ = self._http.feed_data(data)
        except HttpProcessingError as error:
            fault = error
        body = self._body
        if self._empty_lines > MAX_EMPTY_LINES or (fault is None and messages):
            fault = RequestPayloadError("the body cannot be read")
        if body.exception() is not None or fault is not None:
            self._body_left = CHUNKED
            if not self._open:
                self.force_close()  # its reply has been written, and nobody reads the rest
            elif fault is not None and body.exception() is None:
                body.set_exception(fault)
        elif self._body_left == CHUNKED and body.is_eof():
            self._body_left = 0

    # --- the end of a request ---

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._request_over()

    def _request_over(self) -> None:
        """Go on with what waits behind a request that is answered."""
        self._open = False
        self._unread_bytes = 0
        if self._upgraded and self._payload_parser is None and self._http is not None:
            self._upgraded = False  # the upgrade was declined
            self._http.set_upgraded(False)
        if self._parser is not None and not (self._close or self._force_close):
            self._stop_head_timer()
            self._read_on()

    def log_exception(self, *args: Any, **details: Any) -> None:
        """Log what aiohttp could not cope with, except for what came behind an answer and is thrown away anyway."""
        if self._open:
            super().log_exception(*args, **details)
