"""Standing of an agent with the controller: errors, and heartbeats without an acknowledgement."""

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

    __slots__ = ("_sent", "_since", "sent_on", "trouble")

    def __init__(self) -> None:
        self.trouble: Trouble | None = None
        self.sent_on = 0
        self._sent = 0
        self._since = 0.0

    def fail(self, kind: TroubleKind, text: str, now: float) -> bool:
        """Record a reason. Returns True if it is a new one."""
        before = self.trouble
        if before is not None and before.kind is TroubleKind.NAME_UNKNOWN and kind is TroubleKind.UNKNOWN:
            kind = before.kind  # NAME_UNKNOWN is the more precise of the two
        new = before is None or before.kind is not kind
        since = now if before is None else before.since
        self.trouble = Trouble(kind, text or (before.text if before is not None else ""), since)
        return new

    def recover(self) -> None:
        """Record that the controller knows the agent: it accepted a registration or acknowledged a heartbeat."""
        self.trouble = None

    def sent(self, now: float, connection: int) -> None:
        """Record a heartbeat sent upstream."""
        if connection != self.sent_on or not self._sent:
            self.sent_on, self._sent, self._since = connection, 0, now
        self._sent += 1

    def acknowledged(self) -> None:
        """Record an acknowledgement."""
        self._sent = 0
        self.trouble = None

    def unacknowledged_since(self, now: float, window_s: float) -> float | None:
        """Return the time since which heartbeats have no acknowledgement, `None` if they have.

        `window_s` is the time that an acknowledgement may take.
        """
        if self._sent < UNACKNOWLEDGED or now - self._since < window_s:
            return None
        return self._since
