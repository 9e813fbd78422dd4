"""The seams as Protocols: what the bridge needs of store and WebSockets, and what the frontend needs of the bridge."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from shim.core.agent_calls import AgentCall, Outcome
from shim.core.records import Operation, StoreContents
from shim.errors import StoreError
from shim.protocol.upstream_message import Message

StoreDone = Callable[[list[Any] | StoreError], None]


class Clock(Protocol):
    """Where the time comes from; the real one is `shim.clock.Clock`."""

    def monotonic_s(self) -> float:
        """Seconds that never step."""

    def wall_s(self) -> float:
        """Unix seconds; may step."""


class Timer(Protocol):
    """A pending call."""

    def cancel(self) -> None:
        """Do not call; harmless when it was called or cancelled already."""


class Timers(Protocol):
    """Calls later; an event loop is one."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call `callback` on the event loop after `delay` seconds."""


class CommandStore(Protocol):
    """A durable store. Submissions are carried out in order; each is atomic; many may share one commit."""

    def open(self) -> StoreContents:
        """Open or create the store and return what it holds; blocks. Raises `StoreVersionError`, `StoreError`."""

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """Queue operations as one atomic unit. Never blocks.

        When they are committed and synced, `done` is called on the event loop with one result per operation; when they
        could not be carried out, with a `StoreError` (then nothing of this submission was applied).
        """

    def close(self) -> None:
        """Carry out what was submitted, then close; blocks. Idempotent."""


class WebSocket(Protocol):
    """An open upstream WebSocket. All methods return at once; the outcome of a close is an event."""

    def send(self, message: Message) -> None:
        """Queue one envelope as a text frame. What cannot be written any more is dropped: the close is reported."""

    def ping(self, payload: bytes) -> None:
        """Queue a ping frame; its pong is reported as `on_pong(payload)`."""

    def close(self, code: int) -> None:
        """Close with a close frame of this code, or at once when the peer does not answer in time."""

    def abort(self) -> None:
        """Drop the connection without a close frame."""


class WebSocketListener(Protocol):
    """What a socket reports, always on the event loop, in the order of frames; `on_closed` is last and comes once."""

    def on_message(self, message: Message) -> None:
        """A well-formed envelope arrived."""

    def on_bad_frame(self, kind: str) -> None:
        """A data frame arrived that is no envelope (`MessageError.kind`)."""

    def on_frame(self) -> None:
        """Any inbound frame arrived, pings and pongs included (before what it carries is reported), or a part of one.

        A long message on a slow line is life, too.
        """

    def on_pong(self, payload: bytes) -> None:
        """A pong arrived."""

    def has_room(self) -> bool:
        """Return whether the next frame may be read: the socket waits for that, but not for long."""

    def on_closed(self, by_close_frame: bool, code: int, reason: str) -> None:
        """The connection is gone; `code` is the peer's close code, 0 if there was none, `reason` the text beside it.

        The text is the peer's own: it may hold anything, a token included.
        """


@dataclass(frozen=True, slots=True)
class DialRequest:
    """Where and how to dial. `url` is ws/wss without the token; `query` holds extra parameters, never the token."""

    url: str
    token: str = field(repr=False)
    in_header: bool = True
    in_query: bool = False
    query: tuple[tuple[str, str], ...] = ()


class DialFailure(msgspec.Struct, frozen=True):
    """Why a dial failed: the HTTP `status` of the handshake (0 if there was none), `retry_after_s` of its header in
    seconds as sent, and a short bounded `reason` for metrics and logs (`dns`, `tcp`, `tls`, `timeout`, `proxy`,
    `status`, `handshake`), never with the URL's query or a header.
    """

    reason: str
    status: int = 0
    retry_after_s: float | None = None
    detail: str = ""


class UpstreamPort(Protocol):
    """Opens WebSockets."""

    def dial(
        self, spec: DialRequest, events: WebSocketListener, done: Callable[[WebSocket | DialFailure], None]
    ) -> None:
        """Dial in the background, at most `upstream.connect_timeout_s`; `done` is called once, on the event loop.

        When `done` gets a socket, events flow from then on, never before.
        """


class Frame(NamedTuple):
    """One WebSocket frame, or a whole message that came in several. `data` of a close frame: its code and its text."""

    kind: Literal["text", "binary", "ping", "pong", "close"]
    data: bytes


class FrameSocket(Protocol):
    """An open WebSocket whose frames are passed on as they are."""

    async def receive_frame(self) -> Frame | None:
        """Wait for the next frame; `None` when the connection is gone or the peer broke the protocol."""

    async def write_frame(self, frame: Frame) -> None:
        """Write a frame, and wait while the peer does not read. Raises `ConnectionError`."""

    def abort(self) -> None:
        """Drop the connection. Idempotent."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """An agent's WebSocket handshake as it came; `target` as in `ProxyRequest`, `token` from its header or query."""

    target: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    token: str = field(repr=False)


class CarriedSocket(Protocol):
    """The controller's side of an agent's WebSocket."""

    @property
    def subprotocol(self) -> str:
        """The subprotocol that the controller chose, or an empty text."""

    async def run(self, agent: FrameSocket) -> None:
        """Carry frames both ways until either side is gone."""

    def abort(self) -> None:
        """Drop it: the agent is gone already. Idempotent."""


class AgentWebSockets(Protocol):
    """Passes agents that speak WebSocket on to the controller.

    Rules: docs/reference/protocol.md#5-an-agent-that-has-migrated-already.
    """

    def serves(self, target: str) -> bool:
        """Return whether a handshake for this request target is passed on."""

    async def open(self, handshake: Handshake) -> CarriedSocket:
        """Open the controller's side. Raises `AgentError` where that is not possible."""

    async def close(self) -> None:
        """Close all of them with 1001."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: the Bearer token (`""` if none) and the number of the TCP connection, unique in the process."""

    token: str = field(repr=False)
    connection: int


class DeliveryReceipt(Protocol):
    """The commands that a reply offers, as the switchboard knows them; opaque to the frontend."""


class CallResult(msgspec.Struct, frozen=True):
    """A call's outcome; `lease` is set when it offers commands."""

    outcome: Outcome
    lease: DeliveryReceipt | None = None


class AgentService(Protocol):
    """The bridge as the frontend sees it. `written` or `unwritten` follows each lease exactly once, then evidence."""

    async def call(self, client: Caller, call: AgentCall, arrived_s: float) -> CallResult:
        """Carry out a call. `arrived_s` is the loop time of the request's first byte, as well as it can be known.

        Never raises `AgentError` (a failure is an outcome). Cancelled when the agent hangs up: what was about to be
        offered is then the switchboard's own business, also when the cancellation meets an answer that is just ready.
        """

    def try_call_sync(self, client: Caller, call: AgentCall, arrived_s: float) -> CallResult | None:
        """Carry out a call that need not wait, as `call` does. `None` where it must, and then nothing has happened."""

    def written(self, lease: DeliveryReceipt) -> None:
        """The whole reply was handed to the kernel."""

    def unwritten(self, lease: DeliveryReceipt) -> None:
        """It was not: the agent had hung up before the first byte of the body, or writing failed."""

    def next_request(self, connection: int) -> None:
        """Another request arrived on a connection with a written lease, sent after that reply was written."""

    def connection_closed(self, connection: int, clean: bool) -> None:
        """A connection that had a written lease is gone.

        `clean`: it was closed by FIN, and all that was written had been acknowledged by the peer's kernel.
        """


@dataclass(frozen=True, slots=True)
class ProxyRequest:
    """An agent's request as it came. `target` is the path under the configured base path, with its query.

    `body` is the whole body, or its chunks where it is larger than a call's body may be; `call` is what the dialect
    made of it, `None` where it was not or could not be read; `arrived_s` as in `Switchboard.call`.
    """

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: bytes | AsyncIterator[bytes] = field(repr=False)
    client: Caller
    call: AgentCall | None
    arrived_s: float


@dataclass(frozen=True, slots=True)
class ProxyResponse:
    """What the vendor's HTTP API answered, without hop-by-hop headers. `body` is whole or comes in chunks.

    `lease` as in `CallResult`. `complete`: another replica made the reply, nothing is to be added to its headers.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes | AsyncGenerator[bytes, None] = field(repr=False)
    lease: DeliveryReceipt | None = None
    complete: bool = False


class Pending(Protocol):
    """A request that another replica is answering."""

    def forget(self) -> None:
        """Want no answer any more."""


class Forwarder(Protocol):
    """Sends agents' requests to the replica that owns the caller's shard."""

    def elsewhere(self, token: str) -> bool:
        """Return whether calls with this token cannot be carried out here now."""

    def try_call_sync(self, token: str, request: bytes, done: Callable[[bytes | None], None]) -> Pending | None:
        """Send a whole request on if nothing needs to be waited for; `None` if something does.

        `done` gets the bytes of the whole reply, or `None` where there is none.
        """

    async def forward(self, request: ProxyRequest, operation: str) -> ProxyResponse | None:
        """Send a request on; `None` where it is to be served here, also because nobody owns the caller's shard.

        `operation` is the route's, empty where none matched. Cancelled when the agent hangs up. Raises `AgentError`.
        """

    def without_owner(self, call: AgentCall) -> Outcome:
        """Return what an agent is answered while nobody owns its shard."""


class Fallback(Protocol):
    """Serves calls by the vendor's HTTP API (docs/reference/protocol.md#4-modes)."""

    def handles_all(self) -> bool:
        """True while every call goes that way, whatever it is: nothing of it need be understood."""

    def handles_some(self) -> bool:
        """True while some calls may go that way."""

    def handles(self, client: Caller, call: AgentCall) -> bool:
        """Whether this call goes that way."""

    async def serve(self, request: ProxyRequest) -> ProxyResponse | CallResult | None:
        """Serve it. An `CallResult` where the switchboard had to do with it; `None`: it goes over the WebSocket."""
