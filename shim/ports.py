"""Protocols between the layers: store and WebSockets for the bridge, and the bridge for the agents' server.

A Protocol stands here only where the caller may not import the implementation: it is in a layer above or beside.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from shim.core.agent_calls import AgentCall, Outcome
from shim.core.command_queue import OpenUntil
from shim.core.records import Operation, StoreContents, StoreOperation
from shim.errors import StoreError
from shim.protocol.upstream_message import Message

_Result = TypeVar("_Result")

StoreDone = Callable[[_Result | StoreError], None]
"""Receiver of the result of an operation, or of the error because of which it was not carried out."""


class Clock(Protocol):
    """Source of the time; the real one is `shim.clock.Clock`."""

    def monotonic_s(self) -> float:
        """Return seconds of a clock that never steps."""

    def wall_s(self) -> float:
        """Return Unix seconds; the clock may step."""

    def until_tick_s(self, every_s: float) -> float:
        """Return the seconds after which work that is done every `every_s` seconds is due, in step with all of it."""


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Cancel the call. Harmless after the call, or if it was cancelled before."""


class Timers(Protocol):
    """Scheduler of calls; asyncio's event loop is one."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call `callback` on the event loop after `delay` seconds."""


class CommandStore(Protocol):
    """A durable store. Submissions are executed in order, each atomically; many may share one commit."""

    def open(self) -> StoreContents:
        """Open or create the store and return its contents. Blocks. Raises `StoreVersionError`, `StoreError`."""

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        """Queue an operation and those that belong to it as one atomic unit. Never blocks.

        When they are committed and synced, `done` is called on the event loop with the result of `operation`. If they
        could not be applied, it is called with a `StoreError`, and none of them was applied.
        A `MoveSession` that cannot be stored at present is repeated; changes that follow it are refused meanwhile.
        """

    def close(self) -> None:
        """Execute the submitted operations, then close. Blocks. Idempotent."""


class WebSocket(Protocol):
    """An open upstream WebSocket. No method waits; the end of a close is reported as an event."""

    def send(self, message: Message) -> None:
        """Queue one envelope as a text frame. It is dropped if the connection is closing, and the close is reported."""

    def ping(self, payload: bytes) -> None:
        """Queue a ping frame. Its pong is reported as `on_pong(payload)`."""

    def close(self, code: int) -> None:
        """Close with a close frame of this code; abort if the peer does not answer in time."""

    def abort(self) -> None:
        """Close the connection at once without a close frame."""


class WebSocketListener(Protocol):
    """Receiver of a socket's events, on the event loop and in the order of frames.

    `on_closed` is the last, exactly once.
    """

    def on_message(self, message: Message) -> None:
        """Handle a well-formed envelope."""

    def on_bad_frame(self, kind: str) -> None:
        """Handle a data frame that is no envelope. `kind` is `MessageError.kind`."""

    def on_frame(self) -> None:
        """Handle the arrival of any frame or a part of one, before its content is reported.

        Pings, pongs and the parts of a long message on a slow line count, because all of them prove that the peer is
        alive.
        """

    def on_pong(self, payload: bytes) -> None:
        """Handle a pong."""

    def has_room(self) -> bool:
        """Return True if the next frame may be read. The socket waits for that, but only for a short time."""

    def on_closed(self, by_close_frame: bool, code: int, reason: str) -> None:
        """Handle the end of the connection. `code` is the peer's close code (0: none), `reason` the text beside it.

        The text is the peer's own: it may contain anything, a token included.
        """


class DialRequest(msgspec.Struct, frozen=True):
    """Target and token of a dial. `url` is ws/wss; the token is neither in it nor in `query`."""

    url: str
    token: str
    in_header: bool = True
    in_query: bool = False
    query: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"DialRequest({self.url!r})"


class DialFailure(msgspec.Struct, frozen=True):
    """The reason why a dial failed.

    `status` is the HTTP status of the handshake (0: none), `retry_after_s` its header in seconds as sent. `reason` is a
    short label for metrics and logs (`dns`, `tcp`, `tls`, `timeout`, `proxy`, `status`, `handshake`). No text contains
    the URL's query or a header.
    """

    reason: str
    status: int = 0
    retry_after_s: float | None = None
    detail: str = ""


class UpstreamPort(Protocol):
    """Dialler of WebSockets."""

    def dial(
        self, spec: DialRequest, events: WebSocketListener, done: Callable[[WebSocket | DialFailure], None]
    ) -> None:
        """Dial in the background for at most `upstream.connect_timeout_s`; `done` is called once, on the event loop.

        If `done` gets a socket, events are reported from then on, never before.
        """


class Frame(NamedTuple):
    """One WebSocket frame, or a message joined from several. `data` of a close frame has its code and text."""

    kind: Literal["text", "binary", "ping", "pong", "close"]
    data: bytes


class FrameSocket(Protocol):
    """An open WebSocket whose frames are forwarded unchanged."""

    async def receive_frame(self) -> Frame | None:
        """Wait for the next frame. Returns `None` if the connection ended or the peer violated the protocol."""

    async def write_frame(self, frame: Frame) -> None:
        """Write a frame, waiting while the peer does not read. Raises `ConnectionError`."""

    def abort(self) -> None:
        """Close the connection at once. Idempotent."""


class Caller(msgspec.Struct, frozen=True):
    """The caller of a request: its Bearer token (`""` if none) and the process-wide number of its TCP connection."""

    token: str
    connection: int

    def __repr__(self) -> str:
        return f"Caller({self.connection})"


DeliveryReceipt = Any
"""Opaque reference to the commands that a reply offers."""


class CallResult(msgspec.Struct, frozen=True):
    """The outcome of a call. `receipt` is set if it offers commands."""

    outcome: Outcome
    receipt: DeliveryReceipt | None = None


class AgentService(Protocol):
    """The bridge as used by the agents' server: one method for all calls."""

    def call(
        self, caller: Caller, call: AgentCall, arrived_s: float, now_s: float
    ) -> CallResult | Coroutine[Any, Any, CallResult]:
        """Serve a call, and return its result, or the rest of the call as a coroutine if it has to wait.

        `arrived_s` is the loop time of the request's first byte, as precisely as it is known, and `now_s` the time at
        which the request was complete. Never raises `AgentError`: a failure is an outcome. The coroutine may be closed
        before it starts. It is cancelled if the agent hangs up. Commands that were about to be offered are then queued
        again by the bridge, even if the cancellation meets a result that is just ready.
        """


class DeliveryEvidence(Protocol):
    """Receiver of the evidence that agents got the commands in their replies.

    Each receipt is followed by exactly one call of `written` or `unwritten`, and after `written` by evidence.
    """

    def written(self, receipt: DeliveryReceipt, open_until: OpenUntil) -> None:
        """Record that the whole reply was handed to the kernel. `open_until` is called at later polls."""

    def unwritten(self, receipt: DeliveryReceipt) -> None:
        """Record that the reply was not written.

        The agent had hung up before the first byte of its body, or writing failed.
        """

    def next_request(self, connection: int) -> None:
        """Record another request on a connection, sent after a reply with commands was written on it."""

    def connection_open(self, connection: int, until_s: float) -> bool:
        """Record that the agent's side of a connection was certainly open at `until_s` (monotonic seconds).

        Called again and again while such a report may be evidence. Returns False if none can be any longer.
        """

    def connection_closed(self, connection: int, clean: bool | None) -> None:
        """Record the end of a connection on which a reply with commands was written.

        `clean` is true if it was closed by FIN, and the peer's kernel had acknowledged everything that was written. It
        is `None` if nothing is known, because the replica that served the connection is gone.
        """


class ProxyRequest(msgspec.Struct, frozen=True):
    """An agent's request as received. `target` is the path under the configured base path, with its query.

    `body` is the whole body, or its chunks if it is larger than the body of a call may be. `call` is the parsed call,
    `None` if it was not or could not be parsed. `arrived_s` is as in `AgentService.call`.
    """

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | AsyncIterator[bytes]
    caller: Caller
    call: AgentCall | None
    arrived_s: float

    def __repr__(self) -> str:
        return f"ProxyRequest({self.method!r}, {self.call!r})"


class ProxyResponse(msgspec.Struct, frozen=True):
    """A response of the vendor's HTTP API without hop-by-hop headers. `body` is whole or in chunks.

    `receipt` is as in `CallResult`. `complete` is true if another replica made the reply: no header may be added then.
    `closes` is true if the connection must close with the reply.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes | AsyncGenerator[bytes, None]
    receipt: DeliveryReceipt | None = None
    complete: bool = False
    closes: bool = False

    def __repr__(self) -> str:
        return f"ProxyResponse({self.status})"


class Forwarder(Protocol):
    """Client that sends agents' requests to the replica that owns the caller's shard."""

    def elsewhere(self, token: str) -> bool:
        """Return True if calls with this token cannot be served by this replica now."""

    def forward_now(self, token: str, request: bytes, done: Callable[[bytes | None], None]) -> bool:
        """Forward a whole request if that is possible without waiting, else return False.

        `done` is called later with the bytes of the whole reply, or with `None` if `forward` must try it.
        """

    async def forward(self, request: ProxyRequest, operation: str) -> ProxyResponse | None:
        """Forward a request.

        Returns `None` if this replica must serve it, also because the caller's shard has no owner.

        `operation` is the route's, empty if none matched. Cancelled if the agent hangs up. Raises `AgentError`.
        """


class FallbackScope(Enum):
    """Share of the calls that the vendor's HTTP API may serve."""

    NONE = "none"
    SOME = "some"
    ALL = "all"


class Fallback(Protocol):
    """Server of calls by the vendor's HTTP API (docs/reference/protocol.md#4-modes)."""

    @property
    def in_use(self) -> bool:
        """False while the configuration sends no call to the HTTP API: `scope` is `NONE` then. Every request asks."""

    def scope(self) -> FallbackScope:
        """Return the share of the calls that may be sent to the HTTP API now.

        With `ALL` every request is sent there, so requests need not be parsed.
        """

    def handles(self, caller: Caller, call: AgentCall) -> bool:
        """Return True if this call is sent to the HTTP API; asked only if `scope` is `SOME`."""

    def active(self) -> bool:
        """Return True if calls are sent to the HTTP API because of the mode, or of a link that is down."""

    async def close(self) -> None:
        """Close the connections to the vendor's API."""

    async def serve(self, request: ProxyRequest) -> ProxyResponse | CallResult | None:
        """Serve a request by the HTTP API. Returns a `CallResult` if the bridge took part.

        Returns `None` if the request must be served over the WebSocket.
        """
