"""An HTTP server connection that parses one request at a time, with bounds on the bytes that a peer can occupy.

aiohttp's own protocol parses everything that has arrived. Here bytes behind an unanswered request are kept unparsed,
are bounded, and pause reading (docs/concepts/threat-model.md#bounds). The time of a request's first byte is exact.

Check the private parts of aiohttp's `RequestHandler` when it is updated: `_parser`, `_messages`, `_waiter`, `_close`,
`_request_count`, `_upgraded`, `_payload_parser`, `_force_close`, `_reading_paused` and `_next_keepalive_close_time`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from aiohttp.web_server import Server

from shim.core.bounds import FREE_BYTES, MAX_EMPTY_LINES, MAX_HEAD_BYTES, MAX_WAITING_BYTES, Budget
from shim.errors import NoRoom
from shim.http_heads import EmptyLine, KnownHead, KnownHeads, remember

LINGER_S = 2.0
CHUNKED = -1
_RESET = struct.pack("ii", 1, 0)  # linger for no time

logger = logging.getLogger(__name__)


def _spread(delay_s: float) -> float:
    """Return a delay that is up to a fifth longer.

    The time limits of a thousand connections that a flood opened at once would otherwise end in one turn of the event
    loop, and closing them all takes longer than others may wait.
    """
    return delay_s * random.uniform(1.0, 1.2)  # noqa: S311 - nothing secret depends on it


def _forget_cancellation(task: asyncio.Task[None]) -> None:
    """Free the exception of a cancelled task: it keeps a frame of aiohttp's that keeps the task."""
    if task.cancelled():
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()


class HttpConnection(RequestHandler):
    """aiohttp's protocol for one connection, with bounds.

    Subclasses provide the responses to rejected requests and count them.
    """

    head_limit_bytes = MAX_HEAD_BYTES
    remembers_heads = False  # a subclass that does provides `_begin_known_request`

    __slots__ = (
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
        "_known_heads",
        "_open",
        "_pending",
        "_pipelined",
        "_raw",
        "_received_s",
        "_turned_away",
        "_unread_bytes",
        "_unread_since_s",
        "_wire",
        "now_s",
    )

    def __init__(self, server: Server, budget: Budget, head_timeout_s: float, options: dict[str, Any]) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.now_s = self._loop.time  # the loop's own function: every request calls it
        self._budget = budget
        self._head_timeout_s = head_timeout_s
        self._http: Any = self._parser
        self._known_heads: KnownHeads = ()
        self._wire: asyncio.Transport | None = None  # aiohttp clears its `transport` before the connection has ended
        self._turned_away = False
        self._open = False  # True while a complete head has no response yet
        self._received_s = 0.0  # the time of the newest bytes, read once and used for everything that they cause
        self._head_since_s: float | None = None
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._empty_line = EmptyLine()
        self._empty_lines = 0
        self._body: StreamReader = EMPTY_PAYLOAD
        self._body_left = 0  # bytes that are still to come, or `CHUNKED`
        self._backlog = b""
        self._backlog_since_s = 0.0
        self._unread_since_s: float | None = None  # time at which unread bytes were seen in the kernel
        self._unread_bytes = 0  # bytes of a body that no handler has begun to read
        self._charged_bytes = 0
        self._pipelined = False
        self._pending: Any = None  # a request that another replica answers
        self._raw = b""  # the bytes of the request that `_begin_request` gets, empty if they arrived in pieces

    # --- for subclasses ---

    def _refusal(self, status: int, text: str, more: str = "") -> bytes:
        """Return the whole response to a request that is rejected before a handler sees it."""
        raise NotImplementedError

    def _count_refused(self, reason: str) -> None:
        """Count a rejected request by reason: `head`, `http` or `memory`."""

    def _begin_request(self, message: RawRequestMessage, body: StreamReader, arrived_s: float) -> bool:
        """Begin a request whose head is complete; return True if no handler task is needed for it.

        `arrived_s` is the loop time of the request's first byte.
        """
        return False

    def _begin_known_request(self, known: KnownHead, body: bytes) -> bool:
        """Begin a request that arrived whole, with a head of `_known_heads`; return False if it has to be parsed."""
        return False

    def _watch_for_first_request(self, timeout_s: float) -> None:
        """Close the connection if no byte arrives within `timeout_s`."""
        self._head_timer = self._loop.call_later(timeout_s, self.force_close)

    def _drop_what_is_held(self) -> None:
        """Release all unparsed bytes, because the connection ends."""
        self._stop_head_timer()
        self._backlog = b""
        self._head_bytes = self._unread_bytes = 0
        self._charge()

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the connection as aiohttp does, and leave no reference cycle behind."""
        if self._task_handler is not None:
            self._task_handler.add_done_callback(_forget_cancellation)
        super().connection_lost(exc)
        # The parser and the reader refer to this connection, and such a cycle stays in memory until the garbage
        # collector searches for it, which is rare (`process.GarbageSearch`).
        self._http, self._body, self._known_heads = None, EMPTY_PAYLOAD, ()

    # --- requests ---

    @property
    def closing(self) -> bool:
        """True if the connection closes after the next reply."""
        return self._close or self._force_close

    def data_received(self, data: bytes) -> None:
        """Parse the bytes that arrived, or keep them while a request is unanswered."""
        if self._close or self._force_close or self._turned_away:
            return
        if self._payload_parser is not None:
            super().data_received(data)  # the connection is a WebSocket now
        elif not data:
            if not self._body.is_eof():
                self._feed_body(b"")  # the body's buffer has room again for the bytes that the parser kept
            self._read_on()
        else:
            self._received_s = now = self._loop.time()
            if self._backlog:
                self._keep(data, now)
            elif not (self._known_heads and self._read_known(data)):
                self._read(data, now, waited=False)

    def _read_known(self, data: bytes) -> bool:
        """Begin the request that `data` is, if its head is known; return False if it has to be parsed."""
        if self._open or self._body_left or self._head_since_s is not None or self._unread_since_s is not None:
            return False
        for known in self._known_heads:
            if len(data) == known.size_bytes and data.startswith(known.head) and not self._reading_paused:
                if self._head_timer is not None:
                    self._stop_head_timer()
                self._raw = data
                begun = self._begin_known_request(known, data[len(known.head) :])
                self._raw = b""
                return begun
        return False

    def set_parser(self, parser: Any, data_received_cb: Callable[[], None] | None = None) -> None:
        """Switch to WebSocket frames; the bytes behind the handshake are the first of them."""
        super().set_parser(parser, data_received_cb)
        data, self._backlog = self._backlog, b""
        self._charge()
        if data:
            super().data_received(data)
        if self._buffer_paused:
            self._resume_reading_for_buffer()

    def _resume_reading_if_drained(self) -> None:
        """Do nothing: aiohttp would resume reading when a handler starts, but `_request_over` does it later."""

    def _read(self, data: bytes, since_s: float, *, waited: bool) -> None:
        """Parse up to the end of the current request and keep the rest.

        `since_s` is the arrival of `data`; `waited` is True if the bytes were kept before.
        """
        while data and not (self._close or self._force_close or self._turned_away):
            # A complete request is unanswered, or its body's buffer is full: no more bytes may be parsed.
            if self._reading_paused or (self._open and not self._body_left) or self._wire is None:
                self._keep(data, since_s)
                return
            if not self._body_left:
                data = self._read_head(data, since_s, waited=waited)
            elif self._body.exception() is None:
                data = self._take_body(data)
            else:
                return  # the rest of a failed body is dropped, and the connection closes with its reply
        if self._charged_bytes or self._head_bytes > FREE_BYTES:
            self._charge()

    def _keep(self, data: bytes, since_s: float) -> None:
        """Keep bytes until the request before them is answered; pause reading beyond `MAX_WAITING_BYTES`."""
        if not self._backlog:
            self._backlog_since_s = since_s
            if self._open and self._head_timer is None:
                self._head_timer = self._loop.call_later(self._head_timeout_s, self._head_too_slow)
        self._backlog += data
        if len(self._backlog) >= MAX_WAITING_BYTES and not self._buffer_paused:
            self._pause_reading_for_buffer()
        self._charge()

    def _read_on(self) -> None:
        """Parse the bytes that were kept."""
        data, self._backlog = self._backlog, b""
        if data:
            self._received_s = self._loop.time()
            self._read(data, self._backlog_since_s, waited=True)
        self._charge()
        if self._buffer_paused and len(self._backlog) < MAX_WAITING_BYTES:
            self._resume_reading_for_buffer()

    def _charge(self) -> None:
        if not self._adjust_charge():
            self._out_of_memory()

    def _adjust_charge(self) -> bool:
        """Charge the bytes held beyond `FREE_BYTES` to the common budget; return False if it is exhausted."""
        held_bytes = max(0, len(self._backlog) + self._head_bytes + self._unread_bytes - FREE_BYTES)
        if held_bytes < self._charged_bytes:
            self._budget.release(self._charged_bytes - held_bytes)
        elif held_bytes > self._charged_bytes and not self._budget.reserve(held_bytes - self._charged_bytes):
            return False
        self._charged_bytes = held_bytes
        return True

    def _out_of_memory(self) -> None:
        if not self._open:
            self._turn_away(503, "too many large requests at a time", "memory", "Retry-After: 1\r\n")
            return
        self._count_refused("memory")
        self._backlog = b""
        self.close()  # the request in progress is answered, but not the requests behind it
        self._charge()

    # --- heads ---

    def _read_head(self, data: bytes, since_s: float, *, waited: bool) -> bytes:
        """Parse a head, or a piece of one; return the bytes behind its request."""
        is_start = self._head_since_s is None
        if is_start:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2: ignore empty lines before a request
            if not data:
                return b""
            self._head_since_s = since_s if self._unread_since_s is None else min(since_s, self._unread_since_s)
            self._unread_since_s = None
            # A request that began before the previous one was answered does not show that its sender read the answer.
            self._pipelined = self._pipelined or waited
        end = self._empty_line.find(data)
        self._raw = data if is_start and end else b""
        piece, rest = (data[:end], data[end:]) if end else (data, b"")
        self._head_bytes += len(piece)
        excess = max(0, self._head_bytes - self.head_limit_bytes)
        try:
            # A head that is malformed before its limit is answered with 400, however its bytes arrive.
            messages, upgraded, _ = self._http.feed_data(piece[: len(piece) - excess])
        except HttpProcessingError as fault:
            self._malformed(fault)
            return b""
        if excess:
            self._turn_away(431, "the head of the request is too large", "head")
            return b""
        if not messages:
            if is_start:
                self._await_rest_of_head()
            return rest
        if len(messages) > 1:  # the parser found two heads before one empty line: request smuggling, reject all
            self._turn_away(400, "malformed request", "http")
            return b""
        return self._begin_body(*messages[0], upgraded=upgraded, rest=rest)

    def _await_rest_of_head(self) -> None:
        """Bound the time for the rest of a head that has begun."""
        # The connection is no longer idle: the timeout for heads applies, not the one for keep-alive.
        self._next_keepalive_close_time = self._received_s + self._head_timeout_s + self._keepalive_timeout
        self._stop_head_timer()
        self._head_timer = self._loop.call_later(_spread(self._head_timeout_s), self._head_too_slow)

    def _begin_body(self, message: RawRequestMessage, body: StreamReader, *, upgraded: bool, rest: bytes) -> bytes:
        """Start a request whose head is complete, with the body bytes that are here; return the bytes behind it."""
        arrived_s = self._received_s if self._head_since_s is None else self._head_since_s
        self._head_since_s, self._head_bytes = None, 0
        if self._head_timer is not None:
            self._stop_head_timer()
        self._body, self._empty_lines = body, 0
        self._body_left = CHUNKED if message.chunked else int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
        if message.method == hdrs.METH_CONNECT:
            self._body_left = 0
        self._upgraded = upgraded
        self._open = True
        if 0 < self._body_left <= min(len(rest), FREE_BYTES):  # a small body that is complete, as of a heartbeat
            size, self._body_left = self._body_left, 0
            self._unread_bytes = size
            self._feed_body(rest[:size])
            rest = rest[size:]
        elif rest and self._body_left:
            rest = self._take_body(rest)
        self._raw = b"" if self._body_left else self._raw[: len(self._raw) - len(rest)]
        if self._raw and self.remembers_heads:
            self._known_heads = remember(self._known_heads, self._raw, message)
        answered = self._begin_request(message, body, arrived_s)
        self._raw = b""
        if answered:
            self._open = self._pending is not None
            self._unread_bytes = 0
        else:
            self._pass_to_task(message, body)
        return rest

    def _pass_to_task(self, message: RawRequestMessage, body: StreamReader) -> None:
        """Have aiohttp's handler task finish a request."""
        self._request_count += 1
        self._messages.append((message, body))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if not self._open:
            self._turn_away(408, "the request did not arrive in time", "head")
        elif b"\r\n\r\n" not in self._backlog:
            self._count_refused("head")
            self.close()  # the request in progress is answered before the connection closes

    def _malformed(self, fault: HttpProcessingError) -> None:
        """Reject a request that the parser rejected; its own error texts echo the input, also in the log."""
        logger.debug("a malformed request: %s", type(fault).__name__)
        too_long = isinstance(fault, LineTooLong)
        text = "a line of the request is too long" if too_long else "malformed request"
        self._turn_away(431 if too_long else 400, text, "http")

    def _turn_away(self, status: int, text: str, reason: str, more: str = "") -> None:
        """Reject a request before it becomes a call, and close the connection."""
        self._count_refused(reason)
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(self._refusal(status, text, more))
        self.end_after_reply()

    def end_after_reply(self) -> None:
        """Close after a last reply, but discard input for a moment.

        Closing a socket with unread input sends a reset, which can destroy the reply before the peer has read it.
        """
        self._turned_away = True
        self._parser = self._http = None  # frees the incomplete head in the parser, which may be large
        self._drop_what_is_held()
        if not self._body.is_eof():
            self._body.feed_eof()  # otherwise aiohttp would try to read the rest
        self._forget_body()
        self._reading_paused = self._buffer_paused = False
        self._resume_transport_reading()  # a peer that is blocked in writing would not read the reply
        if (wire := self._wire) is not None and not wire.is_closing():
            if wire.can_write_eof():
                wire.write_eof()
            self._head_timer = self._loop.call_later(_spread(LINGER_S), self.force_close)

    # --- bodies ---

    def _take_body(self, data: bytes) -> bytes:
        """Pass bytes of the current body to its reader; return the bytes behind them, which the parser may not get yet.

        The body fails if the common budget is exhausted.
        """
        if self._body_left == CHUNKED:
            self._empty_lines += 1
            size = self._empty_line.find(data) or len(data)
        else:
            size = min(len(data), self._body_left)
            self._body_left -= size
        self._unread_bytes += size
        if self._unread_bytes <= FREE_BYTES or self._adjust_charge():
            if self._charged_bytes:
                # Runs directly before a waiting reader wakes up: from then on the reader charges the bytes itself.
                self._loop.call_soon(self._release_body)
            self._feed_body(data[:size])
        else:
            self._unread_bytes = 0
            self._forget_body()
            self._fail_body(NoRoom())
        return data[size:]

    def _forget_body(self) -> None:
        """Free the unread bytes of a body; aiohttp keeps its reader until the next request."""
        if self._body is not EMPTY_PAYLOAD:
            self._body._buffer.clear()  # noqa: SLF001 - public reads would make aiohttp resume reading
            self._body._size = self._body._buffer_offset = 0  # noqa: SLF001 - must match the buffer
            fault = self._body.exception()
            if isinstance(fault, BaseException):
                fault.__traceback__ = None  # it keeps the frames of its reader, and thereby the bytes that were read

    def _release_body(self) -> None:
        if self._unread_bytes and not self._messages:
            self._unread_bytes = 0
            self._adjust_charge()

    def _feed_body(self, data: bytes) -> None:
        messages: Any = ()
        fault: Any = None
        try:
            messages, self._upgraded, _ = self._http.feed_data(data)
        except HttpProcessingError as error:
            fault = error
        body = self._body
        if self._empty_lines > MAX_EMPTY_LINES or (fault is None and messages):
            fault = RequestPayloadError("the body cannot be read")
        if body.exception() is not None or fault is not None:
            if self._open:
                self._fail_body(body.exception() or fault)
            else:
                self.force_close()  # the reply is written, and no handler reads the rest
        elif self._body_left == CHUNKED and body.is_eof():
            self._body_left = 0

    def _fail_body(self, fault: Any) -> None:
        self._body_left = CHUNKED
        self._body.set_exception(fault)
        # The end of a chunk in the same bytes may have woken the reader, which then waits again without a look at this.
        self._loop.call_soon(self._body.set_exception, fault)

    # --- the end of a request ---

    async def finish_response(
        self, request: BaseRequest, resp: StreamResponse, start_time: float | None
    ) -> tuple[StreamResponse, bool]:
        """Finish a response as aiohttp does, then go on with the bytes behind its request."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            if not resp.keep_alive:
                self.close()  # RFC 9112 section 9.6: bytes behind the last request are ignored, not rejected
            self._request_over()

    def _request_over(self) -> None:
        """Go on with the bytes behind an answered request."""
        self._open, self._unread_bytes = False, 0
        if self._upgraded and self._payload_parser is None and self._http is not None:
            self._upgraded = False  # the upgrade was declined
            self._http.set_upgraded(False)
        if self._parser is not None and not (self._close or self._force_close):
            self._stop_head_timer()
            self._read_on()

    def abort(self) -> None:
        """Close the connection at once, with everything unsent.

        A peer that does not read gets a reset. After a usual close the kernel would keep for minutes what waits for it.
        """
        if (wire := self._wire) is None:
            return
        if self.writing_paused:
            wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        wire.abort()

    def log_exception(self, *args: Any, **details: Any) -> None:
        """Log an error of aiohttp, unless it concerns discarded input behind an answered request."""
        if self._open:
            super().log_exception(*args, **details)
