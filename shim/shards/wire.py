"""What replicas say to each other over core NATS: JSON, decoded strictly, in pieces where it is larger than a message.

Tokens travel here and are stored nowhere. All messages of one replica to another come in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from shim.core import calls
from shim.errors import ShimError

MAX_PIECES = 64
MAX_UNFINISHED = 16
HEAD_BYTES = 1024


class WireError(ShimError):
    """A message that cannot be said, or was not understood."""


class Leftovers(msgspec.Struct, frozen=True):
    """A poll of an agent that goes by HTTP now: is there anything of before? Nothing is held, no link is dialled."""

    dialect: str
    target: calls.Target


class Vouch(msgspec.Struct, frozen=True):
    """Another replica heard this heartbeat so long ago, when somebody else had the link."""

    heartbeat: calls.HeartbeatCall
    age_s: float


AnyCall = calls.AgentCall | Leftovers | Vouch
_CALLS: dict[str, type[Any]] = {
    "register": calls.RegisterCall,
    "heartbeat": calls.HeartbeatCall,
    "status": calls.StatusCall,
    "poll": calls.PollCall,
    "result": calls.ResultCall,
    "tunnel_poll": calls.TunnelPollCall,
    "tunnel_info": calls.TunnelInfoCall,
    "leftovers": Leftovers,
    "vouch": Vouch,
}
_OUTCOMES: dict[str, type[Any]] = {
    "registered": calls.Registered,
    "accepted": calls.Accepted,
    "commands": calls.Commands,
    "tunnel_state": calls.TunnelState,
    "tunnel_info": calls.TunnelInfo,
    "failed": calls.Failed,
}
_NAMES = {kind: name for name, kind in (*_CALLS.items(), *_OUTCOMES.items())}
KINDS = tuple(_CALLS)


class Said(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages."""


class Ask(Said, frozen=True):
    """An agent's call. `number` is the asker's own; `arrived` in the owner's clock, `None` where it is not known."""

    number: int
    shard: int
    token: bytes
    connection: int
    arrived: float | None
    kind: str
    body: msgspec.Raw

    def __repr__(self) -> str:
        return f"Ask({self.number}, shard={self.shard}, kind={self.kind!r})"


class Answered(Said, frozen=True):
    """What became of an `Ask`. `lease` is not 0 where commands are offered; the asker then says what became of them.

    `kind` is empty where the replica does not own the shard: nothing has happened.
    """

    number: int
    clock: float
    kind: str = ""
    body: msgspec.Raw = msgspec.Raw(b"null")
    lease: int = 0

    def __repr__(self) -> str:
        return f"Answered({self.number}, kind={self.kind!r}, lease={self.lease})"


class Left(Said, frozen=True):
    """The agent hung up before its `Ask` was answered."""

    number: int


class Written(Said, frozen=True):
    """The reply with this lease was handed to the kernel of the asker's machine."""

    lease: int


class Unwritten(Said, frozen=True):
    """It was not, and will not be."""

    lease: int


class NextRequest(Said, frozen=True):
    """Another request came on a connection that carried a lease."""

    connection: int


class Closed(Said, frozen=True):
    """A connection that carried a lease is gone."""

    connection: int
    clean: bool


class Look(Said, frozen=True):
    """A question for what a replica's stores know of a command."""

    number: int
    command: str


class Found(Said, frozen=True):
    """The answer: descriptions as the admin port shows them."""

    number: int
    commands: list[dict[str, Any]]


class Present(Said, frozen=True):
    """To all: who is there, and what it has written to the bucket of leases, as (shard, revision)."""

    name: str
    clock: float
    leaving: bool
    revision: int
    held: tuple[tuple[int, int], ...] = ()
    given: tuple[tuple[int, int], ...] = ()


class Piece(Said, frozen=True):
    """A part of a message that is larger than NATS takes."""

    message: int
    index: int
    of: int
    body: bytes


AnyMessage = Ask | Answered | Left | Written | Unwritten | NextRequest | Closed | Look | Found | Present | Piece


class Envelope(msgspec.Struct, frozen=True):
    """What goes over the wire: who says it, and what."""

    sender: str
    said: AnyMessage


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Envelope).decode


def kind_of(call: AnyCall) -> str:
    """One of `KINDS`."""
    return _NAMES[type(call)]


def pack(value: Any) -> tuple[str, msgspec.Raw]:
    """A call or an outcome by its name and its JSON. Raises `WireError`."""
    try:
        return _NAMES[type(value)], msgspec.Raw(_encode(value))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"it cannot be passed on: {type(error).__name__}") from None


def unpack_call(kind: str, body: msgspec.Raw) -> AnyCall:
    """Inverse of `pack` for calls. Raises `WireError`."""
    return _unpack(_CALLS, kind, body)  # type: ignore[no-any-return]


def unpack_outcome(kind: str, body: msgspec.Raw) -> calls.Outcome:
    """Inverse of `pack` for outcomes. Raises `WireError`."""
    return _unpack(_OUTCOMES, kind, body)  # type: ignore[no-any-return]


def _unpack(kinds: dict[str, type[Any]], kind: str, body: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(body, type=kinds[kind])
    except (KeyError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"a message cannot be read: {type(error).__name__}") from None


def encode(sender: str, said: AnyMessage, number: int, max_bytes: int) -> list[bytes]:
    """The NATS messages that say it; `number` is unique for the sender. Raises `WireError`."""
    try:
        whole = _encode(Envelope(sender, said))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"it cannot be passed on: {type(error).__name__}") from None
    if len(whole) <= max_bytes:
        return [whole]
    # JSON writes bytes in Base64.
    room = (max_bytes - HEAD_BYTES) * 3 // 4
    parts = [whole[start : start + room] for start in range(0, len(whole), room)] if room > 0 else []
    if not 0 < len(parts) <= MAX_PIECES:
        raise WireError("it is larger than the NATS servers' max_payload allows to pass on")
    return [_encode(Envelope(sender, Piece(number, n, len(parts), part))) for n, part in enumerate(parts)]


@dataclass(slots=True)
class _Unfinished:
    of: int
    parts: list[bytes] = field(default_factory=list)


class Assembler:
    """Puts pieces together. Those of one message come in order; a message that is not finished gives way to others."""

    def __init__(self) -> None:
        self._unfinished: dict[tuple[str, int], _Unfinished] = {}

    def take(self, data: bytes) -> Envelope | None:
        """A whole message, or `None` while pieces are missing. Raises `WireError`."""
        envelope = _read(data)
        said = envelope.said
        if not isinstance(said, Piece):
            return envelope
        key = (envelope.sender, said.message)
        begun = self._unfinished.pop(key, None) or _Unfinished(said.of)
        if said.index != len(begun.parts) or said.of != begun.of or said.of > MAX_PIECES:
            raise WireError("pieces of a message do not fit")
        begun.parts.append(said.body)
        if len(begun.parts) == begun.of:
            return _read(b"".join(begun.parts))
        while len(self._unfinished) >= MAX_UNFINISHED:
            del self._unfinished[next(iter(self._unfinished))]
        self._unfinished[key] = begun
        return None


def _read(data: bytes) -> Envelope:
    try:
        return _decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"a message cannot be read: {type(error).__name__}") from None


def token_bytes(token: str) -> bytes:
    """A token as it travels: headers may hold what is no UTF-8."""
    return token.encode("utf-8", "surrogatepass")


def token_text(token: bytes) -> str:
    """Inverse of `token_bytes`. Raises `WireError`."""
    try:
        return token.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise WireError("a token cannot be read") from None
