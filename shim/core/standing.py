"""Standing of an agent with the controller: which of its heartbeats were acknowledged, and refusals.

`HeartbeatCoverage` is the share of agent heartbeats that the controller acknowledged (docs/reference/metrics.md).
`SessionStanding` has the reasons why it does not regard an agent as connected (docs/reference/protocol.md#14-adoption).
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import NamedTuple, Protocol

import msgspec

ACK_GRACE_S = 2.5  # with the default of 27.5 s the window is the vendor's own interval, 30 s
MERGED_S = 1.0
MAX_WRITES = 16


class HeartbeatOutcome(Enum):
    """Outcomes of an agent's heartbeat."""

    ACKED = "acked"  # the controller acknowledged a heartbeat of this agent in time
    # The controller never acknowledges. A heartbeat was written without an error reply, and a later frame came in.
    WRITTEN = "written"
    MISSED = "missed"


class HeartbeatChannel(Protocol):
    """A connection, open or closed. `heard_at` is the monotonic time of its last inbound frame."""

    @property
    def heard_at(self) -> float:
        """Monotonic time of the last frame that arrived on the connection."""


class _Waiting(msgspec.Struct):
    """Agent heartbeats that are not covered yet: `count` of them within `MERGED_S` after `at`."""

    at: float
    count: int


class HeartbeatCoverage:
    """Coverage of one agent's heartbeats. All times are monotonic seconds.

    An upstream heartbeat covers an agent's heartbeat in two cases. It was sent at most one window before, on the
    connection that the agent still uses. Or it is sent later, and acknowledged at most one window after. Each of the
    agent's heartbeats is counted once: when it is covered, or when its window is over.
    """

    __slots__ = ("_acked_at", "_acked_on", "_waiting", "_writes")

    def __init__(self) -> None:
        self._acked_at = float("-inf")
        self._acked_on: HeartbeatChannel | None = None
        self._writes: tuple[tuple[float, HeartbeatChannel], ...] = ()
        self._waiting: tuple[_Waiting, ...] = ()  # thousands of agents have none

    @property
    def waiting(self) -> bool:
        """True if heartbeats wait to be covered."""
        return bool(self._waiting)

    def record_heartbeat(self, now: float, line: HeartbeatChannel | None, window_s: float) -> bool:
        """Record an agent's heartbeat.

        `line` is the connection of its session. Returns True if it is covered already.
        """
        if line is not None and line is self._acked_on and now - self._acked_at <= window_s:
            return True
        if self._waiting and now - self._waiting[-1].at < MERGED_S:
            self._waiting[-1].count += 1
        else:
            self._waiting = (*self._waiting, _Waiting(now, 1))
        return False

    def written(self, now: float, line: HeartbeatChannel) -> None:
        """Record a heartbeat of this agent that was written upstream."""
        self._writes = (*self._writes[1 - MAX_WRITES :], (now, line))

    def refused(self, sent_at: float | None = None) -> None:
        """Discard the upstream heartbeat sent at `sent_at`: the controller answered with an error.

        `None` discards all of them, because the error does not identify the heartbeat.
        """
        self._writes = tuple(write for write in self._writes if sent_at is not None and write[0] != sent_at)

    def acked(self, sent_at: float, line: HeartbeatChannel, now: float, window_s: float) -> int:
        """Record the acknowledgement of the heartbeat sent at `sent_at`.

        Returns the number of agent heartbeats it covers.
        """
        if sent_at > self._acked_at:
            self._acked_at, self._acked_on = sent_at, line
        before = self._waiting
        self._waiting = tuple(each for each in before if sent_at < each.at - window_s or now > each.at + window_s)
        return sum(each.count for each in before) - sum(each.count for each in self._waiting)

    def settle(self, now: float, window_s: float, *, acks: bool) -> Counter[HeartbeatOutcome]:
        """Decide the heartbeats whose window is over. `acks` is true if this controller is known to acknowledge.

        Returns the number of heartbeats per outcome.
        """
        judged: Counter[HeartbeatOutcome] = Counter()
        while self._waiting and now > self._waiting[0].at + window_s:
            waiting, self._waiting = self._waiting[0], self._waiting[1:]
            written = not acks and any(
                abs(sent_at - waiting.at) <= window_s and line.heard_at > sent_at for sent_at, line in self._writes
            )
            judged[HeartbeatOutcome.WRITTEN if written else HeartbeatOutcome.MISSED] += waiting.count
        return judged


UNACKNOWLEDGED = 3
"""Heartbeats in a row without an acknowledgement from which on it is no coincidence."""


class TroubleKind(Enum):
    """Reasons why the controller does not regard an agent as connected."""

    NAME_UNKNOWN = "name_unknown"  # the agent is not registered, and the shim has no name to register it with
    UNKNOWN = "unknown"  # the agent is not registered, and is being registered again
    HEARTBEATS_REFUSED = "heartbeats_refused"


class Trouble(NamedTuple):
    """One reason, the controller's text if it sent one, and the monotonic time of its begin."""

    kind: TroubleKind
    text: str
    since: float


class SessionStanding:
    """Standing of one agent. All times are monotonic seconds; connections are identified by their serial number.

    `sent_on` is the connection that carried the last heartbeat, 0 if none did.
    """

    __slots__ = ("_registered_over", "_sent", "_sent_since_registered", "_since", "sent_on", "trouble")

    def __init__(self) -> None:
        self.trouble: Trouble | None = None
        # The trouble that a registration has ended, until a heartbeat shows that it is over.
        self._registered_over: Trouble | None = None
        self.sent_on = self._sent = 0
        self._sent_since_registered = False
        self._since = 0.0

    def fail(self, kind: TroubleKind, text: str, now: float) -> bool:
        """Record a reason. Returns True if it is a new one."""
        before = self.trouble or self._registered_over
        if self.trouble is not None and self.trouble.kind is TroubleKind.NAME_UNKNOWN and kind is TroubleKind.UNKNOWN:
            kind = self.trouble.kind  # NAME_UNKNOWN is the more precise of the two
        new, since = before is None or before.kind is not kind, now if before is None else before.since
        self.trouble = Trouble(kind, text or (before.text if before is not None else ""), since)
        return new

    def registered(self) -> None:
        """Record that the controller accepted a registration.

        If it refuses the next heartbeat all the same, the trouble goes on since its first begin.
        """
        self._registered_over, self.trouble = self.trouble or self._registered_over, None
        self._sent_since_registered = False

    def sent(self, now: float, connection: int) -> None:
        """Record a heartbeat sent upstream."""
        if connection != self.sent_on or not self._sent:
            self.sent_on, self._sent, self._since = connection, 0, now
        self._sent += 1
        if self.trouble is None and self._sent_since_registered:
            self._registered_over = None  # the heartbeat before this one was not refused
        self._sent_since_registered = True

    def acknowledged(self) -> None:
        """Record an acknowledgement."""
        self._sent = 0
        self.trouble = self._registered_over = None

    def unacknowledged_since(self, now: float, window_s: float) -> float | None:
        """Return the time since which heartbeats have no acknowledgement, `None` if they have.

        `window_s` is the time that an acknowledgement may take.
        """
        if self._sent < UNACKNOWLEDGED or now - self._since < window_s:
            return None
        return self._since
