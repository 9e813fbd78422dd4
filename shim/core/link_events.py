"""What can happen to an upstream link, and what it wants done (protocol.md §2.1)."""

from __future__ import annotations

from dataclasses import dataclass

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """An agent called: the link is needed."""


@dataclass(frozen=True, slots=True)
class Hurry:
    """A registration waits for the link: cut a backoff short, at most every 5 s, and never one that was imposed:

    by Retry-After, on an own token that was never accepted, on a contended identity.
    """


@dataclass(frozen=True, slots=True)
class Opened:
    """The dial succeeded."""


@dataclass(frozen=True, slots=True)
class DialFailed:
    """The dial failed; `status` as in `ports.DialFailure`."""

    status: int = 0
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """Every fresh session was told to the controller again."""


@dataclass(frozen=True, slots=True)
class Registered:
    """The controller accepted a registration on this connection."""


@dataclass(frozen=True, slots=True)
class Stable:
    """The connection has been open for `stable_after_s`."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The socket is gone."""

    by_close_frame: bool = False


@dataclass(frozen=True, slots=True)
class Broken:
    """The watchdog found the connection half-open or its application stalled."""


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The backoff is over."""


@dataclass(frozen=True, slots=True)
class TokenChanged:
    """The token is another one now."""


@dataclass(frozen=True, slots=True)
class Unneeded:
    """No fresh session has used the link for `idle_close_s`, or gateways carry them all."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The shim stops."""


LinkEvent = (
    Wanted
    | Hurry
    | Opened
    | DialFailed
    | Replayed
    | Registered
    | Stable
    | Lost
    | Broken
    | RetryDue
    | TokenChanged
    | Unneeded
    | Stop
)
EVENT_TYPES: tuple[type, ...] = LinkEvent.__args__


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial now with the token in the header, the query or both."""

    in_header: bool
    in_query: bool


@dataclass(frozen=True, slots=True)
class CloseSocket:
    """Close the socket with this code; 0 drops it without a close frame."""

    code: int


@dataclass(frozen=True, slots=True)
class CancelDial:
    """Forget the dial under way; its socket, should it open, is closed."""


@dataclass(frozen=True, slots=True)
class StartReplay:
    """Tell the controller every fresh session."""


@dataclass(frozen=True, slots=True)
class WentOnline:
    """Send what was held back."""


@dataclass(frozen=True, slots=True)
class WentOffline:
    """The connection is no more; answers that were awaited on it will not come."""


@dataclass(frozen=True, slots=True)
class SetRetry:
    """Report `RetryDue` after this many seconds."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class CancelRetry:
    """Forget the retry timer."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The token was refused by every way there is."""


LinkEffect = Dial | CloseSocket | CancelDial | StartReplay | WentOnline | WentOffline | SetRetry | CancelRetry | Refusal
