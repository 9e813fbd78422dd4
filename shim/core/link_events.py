"""What can happen to an upstream link, and what it wants done (protocol.md §2.1)."""

from __future__ import annotations

import msgspec

# --- events -----------------------------------------------------------------------------------------------------------


class AgentCalled(msgspec.Struct, frozen=True):
    """An agent called: the link is needed."""


class RetryNow(msgspec.Struct, frozen=True):
    """A registration waits for the link: cut a backoff short, at most every 5 s, and never one that was imposed:

    by Retry-After, on an own token that was never accepted, on a contended identity.
    """


class Opened(msgspec.Struct, frozen=True):
    """The dial succeeded."""


class DialFailed(msgspec.Struct, frozen=True):
    """The dial failed; `status` as in `ports.DialFailure`."""

    status: int = 0
    retry_after_s: float | None = None


class Replayed(msgspec.Struct, frozen=True):
    """Every fresh session was told to the controller again."""


class Registered(msgspec.Struct, frozen=True):
    """The controller accepted a registration on this connection."""


class Acknowledged(msgspec.Struct, frozen=True):
    """The controller acknowledged a heartbeat on this connection."""


class StableTimerFired(msgspec.Struct, frozen=True):
    """The connection has been open for `stable_after_s`."""


class Lost(msgspec.Struct, frozen=True):
    """The socket is gone. `code`: of the close frame that ended it, 0 if there was no frame or none in it."""

    by_close_frame: bool = False
    code: int = 0


class WatchdogFailed(msgspec.Struct, frozen=True):
    """The watchdog found the connection half-open or its application stalled."""


class RetryDue(msgspec.Struct, frozen=True):
    """The backoff is over."""


class TokenChanged(msgspec.Struct, frozen=True):
    """The token is another one now."""


class IdleTimeout(msgspec.Struct, frozen=True):
    """No fresh session has used the link for `idle_close_s`, or gateways carry them all."""


class Stop(msgspec.Struct, frozen=True):
    """The shim stops."""


LinkEvent = (
    AgentCalled
    | RetryNow
    | Opened
    | DialFailed
    | Replayed
    | Registered
    | Acknowledged
    | StableTimerFired
    | Lost
    | WatchdogFailed
    | RetryDue
    | TokenChanged
    | IdleTimeout
    | Stop
)
EVENT_TYPES: tuple[type, ...] = LinkEvent.__args__


# --- effects ----------------------------------------------------------------------------------------------------------


class Dial(msgspec.Struct, frozen=True):
    """Dial now with the token in the header, the query or both."""

    in_header: bool
    in_query: bool


class CloseSocket(msgspec.Struct, frozen=True):
    """Close the socket with this code; 0 drops it without a close frame."""

    code: int


class CancelDial(msgspec.Struct, frozen=True):
    """Forget the dial under way; its socket, should it open, is closed."""


class StartReplay(msgspec.Struct, frozen=True):
    """Tell the controller every fresh session."""


class Online(msgspec.Struct, frozen=True):
    """Send what was held back."""


class Offline(msgspec.Struct, frozen=True):
    """The connection is no more; answers that were awaited on it will not come."""


class StartRetryTimer(msgspec.Struct, frozen=True):
    """Report `RetryDue` after this many seconds."""

    delay_s: float


class CancelRetryTimer(msgspec.Struct, frozen=True):
    """Forget the retry timer."""


class AuthRejected(msgspec.Struct, frozen=True):
    """The token was refused by every way there is."""


LinkEffect = Dial | CloseSocket | CancelDial | StartReplay | Online | Offline | StartRetryTimer | CancelRetryTimer | AuthRejected
