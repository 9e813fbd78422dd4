"""Standing of an agent with the controller: heartbeats without an acknowledgement, and refusals.

See docs/reference/protocol.md#14-adoption.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

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
        self.sent_on = self._sent = self._sent_since_registered = 0
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
        self._sent_since_registered = 0

    def sent(self, now: float, connection: int) -> None:
        """Record a heartbeat sent upstream."""
        if connection != self.sent_on or not self._sent:
            self.sent_on, self._sent, self._since = connection, 0, now
        self._sent += 1
        if self.trouble is None and self._sent_since_registered:
            self._registered_over = None  # the heartbeat before this one was not refused
        self._sent_since_registered += 1

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
