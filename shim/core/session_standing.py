"""Keep how an agent stands with the controller: what went wrong, and which heartbeats are not acknowledged."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

UNACKNOWLEDGED = 3
"""So many heartbeats in a row without an acknowledgement are no coincidence."""


class TroubleKind(Enum):
    """Reasons why the controller does not take an agent for connected."""

    NAME_UNKNOWN = "name_unknown"  # it does not know the agent, and no name is known to register it with
    UNKNOWN = "unknown"  # it does not know the agent, which is being registered again
    HEARTBEATS_REFUSED = "heartbeats_refused"


class Trouble(NamedTuple):
    """One reason, the controller's text if it gave one, and the monotonic time since when it holds."""

    kind: TroubleKind
    text: str
    since: float


class SessionStanding:
    """One agent's standing. All times are monotonic seconds; connections are told apart by their serial."""

    __slots__ = ("_connection", "_sent", "_since", "trouble")

    def __init__(self) -> None:
        self.trouble: Trouble | None = None
        self._connection = 0
        self._sent = 0
        self._since = 0.0

    def fail(self, kind: TroubleKind, text: str, now: float) -> bool:
        """Note a reason. Return True where it is a new one."""
        before = self.trouble
        if before is not None and before.kind is TroubleKind.NAME_UNKNOWN and kind is TroubleKind.UNKNOWN:
            kind = before.kind  # the more precise of the two
        new = before is None or before.kind is not kind
        since = now if before is None else before.since
        self.trouble = Trouble(kind, text or (before.text if before is not None else ""), since)
        return new

    def recover(self) -> None:
        """Note that the controller knows the agent: it accepted a registration or acknowledged a heartbeat."""
        self.trouble = None

    def sent(self, now: float, connection: int) -> None:
        """Note a heartbeat that was sent."""
        if connection != self._connection or not self._sent:
            self._connection, self._sent, self._since = connection, 0, now
        self._sent += 1

    def acknowledged(self) -> None:
        """Note an acknowledgement: the controller hears this agent."""
        self._sent = 0
        self.trouble = None

    def unacknowledged_since(self, now: float, window_s: float) -> float | None:
        """Return since when heartbeats are not acknowledged, `None` where that is not so.

        `window_s` is the time that an acknowledgement may take.
        """
        if self._sent < UNACKNOWLEDGED or now - self._since < window_s:
            return None
        return self._since
