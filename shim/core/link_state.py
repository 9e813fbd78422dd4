"""State machine of an upstream link: a total table of states and events; and the recent phases of a link."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Literal

import msgspec

from shim.core.backoff import Backoff, CloseMeaning, FailureKind, classify, close_meaning
from shim.errors import IllegalTransition

# --- events -----------------------------------------------------------------------------------------------------------


class AgentCalled(msgspec.Struct, frozen=True):
    """An agent called: the link is needed."""


class RetryNow(msgspec.Struct, frozen=True):
    """A registration waits for the link: cut the backoff short, at most every 5 s.

    A delay that was imposed stays: by `Retry-After`, on an agent's own token that was never accepted, or on a contended
    identity.
    """


class Opened(msgspec.Struct, frozen=True):
    """The dial succeeded."""


class DialFailed(msgspec.Struct, frozen=True):
    """The dial failed. `status` is as in `ports.DialFailure`."""

    status: int = 0
    retry_after_s: float | None = None


class Replayed(msgspec.Struct, frozen=True):
    """Every fresh session was registered again on this connection."""


class Registered(msgspec.Struct, frozen=True):
    """The controller accepted a registration on this connection."""


class Acknowledged(msgspec.Struct, frozen=True):
    """The controller acknowledged a heartbeat or sent a command on this connection."""


class StableTimerFired(msgspec.Struct, frozen=True):
    """The connection has been open for `stable_after_s`."""


class Lost(msgspec.Struct, frozen=True):
    """The socket is closed. `code` is that of the close frame, 0 without a frame or without a code in it."""

    by_close_frame: bool = False
    code: int = 0


class WatchdogFailed(msgspec.Struct, frozen=True):
    """The watchdog found the connection half-open or the application behind it stalled."""


class RetryDue(msgspec.Struct, frozen=True):
    """The backoff delay is over."""


class TokenChanged(msgspec.Struct, frozen=True):
    """The token was replaced."""


class IdleTimeout(msgspec.Struct, frozen=True):
    """No fresh session has used the link for `idle_close_s`, or gateways serve all of them."""


class Stop(msgspec.Struct, frozen=True):
    """The shim is stopping."""


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
    """Cancel the dial in progress. If its socket opens nevertheless, it is closed."""


class StartReplay(msgspec.Struct, frozen=True):
    """Register every fresh session again."""


class Online(msgspec.Struct, frozen=True):
    """Send the messages that were held back."""


class Offline(msgspec.Struct, frozen=True):
    """Give up replies that are awaited on the connection: it is closed."""


class StartRetryTimer(msgspec.Struct, frozen=True):
    """Report `RetryDue` after `delay_s` seconds."""

    delay_s: float


class CancelRetryTimer(msgspec.Struct, frozen=True):
    """Cancel the retry timer."""


class AuthRejected(msgspec.Struct, frozen=True):
    """Report that the controller rejected the token in every way of presenting it."""


class TokenAccepted(msgspec.Struct, frozen=True):
    """Report that the controller accepted an agent's own token for the first time."""


LinkEffect = (
    Dial
    | CloseSocket
    | CancelDial
    | StartReplay
    | Online
    | Offline
    | StartRetryTimer
    | CancelRetryTimer
    | AuthRejected
    | TokenAccepted
)


CONTENDED_AFTER = 3
CONTENDED_WITHIN_S = 30.0
HURRY_INTERVAL_S = 5.0


class LinkState(Enum):
    """States of a link."""

    IDLE = "idle"  # not needed by any agent
    OPENING = "opening"  # a dial is under way
    REPLAYING = "replaying"  # the socket is open, registrations are being replayed
    ONLINE = "online"
    WAITING = "waiting"  # backing off before the next dial
    STOPPED = "stopped"


Auth = Literal["auto", "query", "header", "both"]
_Step = tuple[LinkState, list[LinkEffect]]


class LinkStateMachine:
    """One upstream link. Only `handle` changes it.

    `own_token` is true for an agent's token, which the controller may never have accepted.
    """

    def __init__(self, auth: Auth, backoff: Backoff, *, own_token: bool) -> None:
        self._auth = auth
        self._own_token = own_token
        self._backoff = backoff
        self.state = LinkState.IDLE
        self.refused = False
        self.contended = False
        self.accepted_at: float | None = None
        self.closed_as_refused = False
        self._working_until: float | None = None
        self._query_first = False
        self._other_way_tried = False
        self._registered_at: float | None = None
        self._short_lives = 0
        self._hurried_at: float | None = None
        self._not_before: float | None = None

    @property
    def connected(self) -> bool:
        """True while a socket is open."""
        return self.state in (LinkState.REPLAYING, LinkState.ONLINE)

    @property
    def failures(self) -> int:
        """Failed dials and short connections since the link was last stable."""
        return self._backoff.failures

    def handle(self, event: LinkEvent, now: float) -> list[LinkEffect]:
        """Apply one event at `now` (monotonic seconds) and return the effects to perform.

        Raises `IllegalTransition` and changes nothing if the table has no cell for the event.
        """
        step = TRANSITIONS.get((self.state, type(event)))
        if step is None:
            raise IllegalTransition(f"{type(event).__name__} in {self.state.name}")
        self.state, effects = step(self, event, now)
        return effects

    # Each step is a cell of the table and returns the next state and the effects.

    def _stay(self, event: LinkEvent, now: float) -> _Step:
        return self.state, []

    def _dial(self, event: LinkEvent, now: float) -> _Step:
        self._other_way_tried = False
        self._not_before = None
        return LinkState.OPENING, [self._way(self._query_first)]

    def _dial_if_due(self, event: LinkEvent, now: float) -> _Step:
        wait_s = 0.0 if self._not_before is None else self._not_before - now
        return (LinkState.WAITING, [StartRetryTimer(wait_s)]) if wait_s > 0 else self._dial(event, now)

    def _redial(self, event: LinkEvent, now: float) -> _Step:
        state, effects = self._dial(event, now)
        return state, [CancelRetryTimer(), *effects]

    def _hurry(self, event: LinkEvent, now: float) -> _Step:
        if self._not_before is not None and now < self._not_before:
            return self.state, []
        if self._hurried_at is not None and now - self._hurried_at < HURRY_INTERVAL_S:
            return self.state, []
        self._hurried_at = now
        return self._redial(event, now)

    def _way(self, query: bool) -> Dial:
        match self._auth:
            case "auto":
                return Dial(in_header=not query, in_query=query)
            case "both":
                return Dial(in_header=True, in_query=True)
            case place:
                return Dial(in_header=place == "header", in_query=place == "query")

    def _opened(self, event: LinkEvent, now: float) -> _Step:
        if self._other_way_tried:
            self._query_first = not self._query_first
        # If an earlier connection was closed as refused, this controller checks the token only after the handshake: an
        # open socket is no acceptance then.
        if not self.closed_as_refused:
            self.refused = False
        if not self._own_token:
            self.accepted_at = now
        self._registered_at = None
        return LinkState.REPLAYING, [StartReplay()]

    def _dial_failed(self, event: LinkEvent, now: float) -> _Step:
        assert isinstance(event, DialFailed)
        unauthorised = event.status in (401, 403)
        if unauthorised and self._auth == "auto" and not self._other_way_tried:
            self._other_way_tried = True
            return LinkState.OPENING, [self._way(not self._query_first)]
        effects: list[LinkEffect] = []
        if unauthorised:
            self.refused = True
            effects.append(AuthRejected())
        since_working_s = None if self._working_until is None else now - self._working_until
        kind = classify(event.status, event.retry_after_s, since_working_s)
        if self.contended or (unauthorised and self._own_token and self.accepted_at is None):
            delay_s = self._backoff.fixed_delay_s(event.retry_after_s)
            self._not_before = now + delay_s
        else:
            delay_s = self._backoff.next_delay_s(kind, event.retry_after_s)
            self._not_before = now + delay_s if event.retry_after_s is not None else None
        return LinkState.WAITING, [*effects, StartRetryTimer(delay_s)]

    def _online(self, event: LinkEvent, now: float) -> _Step:
        return LinkState.ONLINE, [Online()]

    def _registered(self, event: LinkEvent, now: float) -> _Step:
        self._registered_at = now
        return self.state, self._accepted(now)

    def _acknowledged(self, event: LinkEvent, now: float) -> _Step:
        return self.state, self._accepted(now)

    def _stable(self, event: LinkEvent, now: float) -> _Step:
        self._backoff.reset()
        self._short_lives = 0
        self.contended = False
        return self.state, self._accepted(now)

    def _accepted(self, now: float) -> list[LinkEffect]:
        """Record that the controller accepts the token.

        It accepted a registration or heartbeat, sent a command, or kept the link open. The handshake alone does not
        prove it for an agent's own token: some controllers check the token only afterwards.
        """
        self.refused = self.closed_as_refused = False
        if self.accepted_at is not None:
            return []
        self.accepted_at = now
        return [TokenAccepted()]

    def _lost(self, event: LinkEvent, now: float) -> _Step:
        assert isinstance(event, Lost)
        self._working_until = now
        meaning = close_meaning(event.code) if event.by_close_frame else CloseMeaning.COME_AGAIN
        short = self._registered_at is not None and now - self._registered_at < CONTENDED_WITHIN_S
        self._short_lives = self._short_lives + 1 if meaning is CloseMeaning.OTHER and short else 0
        if self._short_lives >= CONTENDED_AFTER:
            self.contended = True
        effects: list[LinkEffect] = [Offline()]
        if meaning is CloseMeaning.REFUSED:
            self._refused_by_close()
            effects.append(AuthRejected())
        unproven = self.refused and self._own_token and self.accepted_at is None
        if self.contended or unproven:
            delay_s = self._backoff.fixed_delay_s()
            self._not_before = now + delay_s
        else:
            soon = meaning in (CloseMeaning.COME_AGAIN, CloseMeaning.OTHER)
            delay_s = self._backoff.next_delay_s(FailureKind.LOSS if soon else FailureKind.REFUSED)
        return LinkState.WAITING, [*effects, StartRetryTimer(delay_s)]

    def _refused_by_close(self) -> None:
        """Record that the controller rejected the token after it had accepted the handshake."""
        self.refused = self.closed_as_refused = True
        if self._registered_at is None and self._auth == "auto":
            # The controller may read the token only from the other place (header or query): use that in the next dial.
            self._query_first = not self._query_first

    def _broken(self, event: LinkEvent, now: float) -> _Step:
        state, effects = self._lost(Lost(), now)
        return state, [CloseSocket(0), *effects]

    def _new_token(self, event: LinkEvent, now: float) -> _Step:
        """Forget the rejection, because a new token may be accepted where the old one was not, and dial again."""
        self.refused = self.closed_as_refused = False
        self._not_before = None
        if self.state is LinkState.IDLE:
            return self.state, []
        state, effects = self._dial(event, now)
        match self.state:
            case LinkState.OPENING:
                return state, [CancelDial(), *effects]
            case LinkState.WAITING:
                return state, [CancelRetryTimer(), *effects]
            case _:
                self._working_until = now
                return state, [CloseSocket(1000), Offline(), *effects]

    def _idle(self, event: LinkEvent, now: float) -> _Step:
        self._working_until = now
        return LinkState.IDLE, [CloseSocket(1000), Offline()]

    def _idle_undialled(self, event: LinkEvent, now: float) -> _Step:
        self.refused = self.closed_as_refused = False  # the dial at the next call will show if the token is accepted
        return LinkState.IDLE, [CancelDial() if self.state is LinkState.OPENING else CancelRetryTimer()]

    def _stop(self, event: LinkEvent, now: float) -> _Step:
        match self.state:
            case LinkState.REPLAYING | LinkState.ONLINE:
                return LinkState.STOPPED, [CloseSocket(1000), Offline()]
            case LinkState.OPENING:
                return LinkState.STOPPED, [CancelDial()]
            case LinkState.WAITING:
                return LinkState.STOPPED, [CancelRetryTimer()]
            case _:
                return LinkState.STOPPED, []


_S = LinkState
_Cell = Callable[[LinkStateMachine, LinkEvent, float], _Step]

TRANSITIONS: dict[tuple[LinkState, type], _Cell] = {
    (_S.IDLE, AgentCalled): LinkStateMachine._dial_if_due,
    (_S.IDLE, RetryNow): LinkStateMachine._dial_if_due,
    (_S.IDLE, TokenChanged): LinkStateMachine._new_token,
    (_S.IDLE, IdleTimeout): LinkStateMachine._stay,
    (_S.IDLE, Stop): LinkStateMachine._stop,
    (_S.OPENING, AgentCalled): LinkStateMachine._stay,
    (_S.OPENING, RetryNow): LinkStateMachine._stay,
    (_S.OPENING, Opened): LinkStateMachine._opened,
    (_S.OPENING, DialFailed): LinkStateMachine._dial_failed,
    (_S.OPENING, TokenChanged): LinkStateMachine._new_token,
    (_S.OPENING, IdleTimeout): LinkStateMachine._idle_undialled,
    (_S.OPENING, Stop): LinkStateMachine._stop,
    (_S.REPLAYING, AgentCalled): LinkStateMachine._stay,
    (_S.REPLAYING, RetryNow): LinkStateMachine._stay,
    (_S.REPLAYING, Replayed): LinkStateMachine._online,
    (_S.REPLAYING, Registered): LinkStateMachine._registered,
    (_S.REPLAYING, Acknowledged): LinkStateMachine._acknowledged,
    (_S.REPLAYING, StableTimerFired): LinkStateMachine._stable,
    (_S.REPLAYING, Lost): LinkStateMachine._lost,
    (_S.REPLAYING, WatchdogFailed): LinkStateMachine._broken,
    (_S.REPLAYING, TokenChanged): LinkStateMachine._new_token,
    (_S.REPLAYING, IdleTimeout): LinkStateMachine._idle,
    (_S.REPLAYING, Stop): LinkStateMachine._stop,
    (_S.ONLINE, AgentCalled): LinkStateMachine._stay,
    (_S.ONLINE, RetryNow): LinkStateMachine._stay,
    (_S.ONLINE, Registered): LinkStateMachine._registered,
    (_S.ONLINE, Acknowledged): LinkStateMachine._acknowledged,
    (_S.ONLINE, StableTimerFired): LinkStateMachine._stable,
    (_S.ONLINE, Lost): LinkStateMachine._lost,
    (_S.ONLINE, WatchdogFailed): LinkStateMachine._broken,
    (_S.ONLINE, TokenChanged): LinkStateMachine._new_token,
    (_S.ONLINE, IdleTimeout): LinkStateMachine._idle,
    (_S.ONLINE, Stop): LinkStateMachine._stop,
    (_S.WAITING, AgentCalled): LinkStateMachine._stay,
    (_S.WAITING, RetryNow): LinkStateMachine._hurry,
    (_S.WAITING, RetryDue): LinkStateMachine._dial,
    (_S.WAITING, TokenChanged): LinkStateMachine._new_token,
    (_S.WAITING, IdleTimeout): LinkStateMachine._idle_undialled,
    (_S.WAITING, Stop): LinkStateMachine._stop,
    (_S.STOPPED, AgentCalled): LinkStateMachine._stay,
    (_S.STOPPED, RetryNow): LinkStateMachine._stay,
    (_S.STOPPED, TokenChanged): LinkStateMachine._stay,
    (_S.STOPPED, IdleTimeout): LinkStateMachine._stay,
    (_S.STOPPED, Stop): LinkStateMachine._stay,
}


# --- history ----------------------------------------------------------------------------------------------------------

MAX_SEGMENTS = 256


class PhaseKind(Enum):
    """Phases of a link as shown to operators."""

    UP = "up"
    DOWN = "down"  # needed but not connected
    REFUSED = "refused"  # the controller rejects the token
    IDLE = "idle"  # not needed by any agent


def phase_of(link: LinkStateMachine) -> PhaseKind:
    """Return the present phase of a link."""
    if link.state in (LinkState.IDLE, LinkState.STOPPED):
        return PhaseKind.IDLE
    if link.refused:
        return PhaseKind.REFUSED
    return PhaseKind.UP if link.state is LinkState.ONLINE else PhaseKind.DOWN


class LinkPhase(msgspec.Struct, frozen=True):
    """A phase that began at `since_s` and lasts until the next one. `reason` is why it began, `""` if unknown."""

    phase: PhaseKind
    since_s: float
    reason: str = ""


class LinkHistory:
    """The last `MAX_SEGMENTS` phases of one link, as the status page draws them. Times are monotonic seconds."""

    __slots__ = ("_segments",)

    def __init__(self, now: float) -> None:
        self._segments: deque[LinkPhase] = deque([LinkPhase(PhaseKind.IDLE, now)], MAX_SEGMENTS)

    @property
    def current(self) -> LinkPhase:
        """The present phase."""
        return self._segments[-1]

    def enter(self, phase: PhaseKind, now: float, reason: str) -> None:
        """Begin a phase, unless the link is in it already."""
        if phase is not self._segments[-1].phase:
            self._segments.append(LinkPhase(phase, now, reason))

    def last(self, now: float, span_s: float) -> tuple[LinkPhase, ...]:
        """Return the phases of the last `span_s` seconds; the first may have begun earlier."""
        segments = list(self._segments)
        begins = [index for index, segment in enumerate(segments) if segment.since_s <= now - span_s]
        return tuple(segments[begins[-1] if begins else 0 :])
