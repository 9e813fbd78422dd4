"""Is the peer of an open connection alive, and is its application (protocol.md §2.1)?"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

import msgspec

MAX_TRACKED_HEARTBEATS = 4096
FIRST_ACK_S = 10.0


class LivenessState(Enum):
    """What a check found."""

    ALIVE = "alive"
    PING = "ping"  # nothing came in for a while: ask
    HALF_OPEN = "half_open"  # no frame at all for read_timeout_s
    STALLED = "stalled"  # frames come, but acknowledgements stopped


class LivenessCheck(msgspec.Struct, frozen=True):
    """A verdict, and the seconds until the next check is due."""

    verdict: LivenessState
    next_s: float


class Liveness:
    """Watches one connection. Times are monotonic seconds.

    `used_to_ack`: whether the peer acknowledged heartbeats on earlier connections, `None` if that is not known.
    """

    def __init__(
        self,
        now: float,
        ping_interval_s: float,
        read_timeout_s: float,
        ack_timeout_s: float,
        used_to_ack: bool | None = None,
    ) -> None:
        self._ping_interval_s = ping_interval_s
        self._read_timeout_s = read_timeout_s
        self._ack_timeout_s = ack_timeout_s
        self._last_frame = now
        self._pinged_at: float | None = None
        self._unacked: OrderedDict[str, float] = OrderedDict()
        self._used_to_ack = used_to_ack
        self._disproved: bool | None = None
        self.acks_seen = False

    @property
    def heard_at(self) -> float:
        """When the last frame came in; before the first, when the connection was dialled."""
        return self._last_frame

    def frame(self, now: float) -> None:
        """Any inbound frame is life."""
        self._last_frame = now
        self._pinged_at = None

    def heartbeat_sent(self, request_id: str, now: float) -> None:
        """A heartbeat went out and its acknowledgement is awaited."""
        self._unacked[request_id] = now
        if len(self._unacked) > MAX_TRACKED_HEARTBEATS:
            self._unacked.popitem(last=False)

    def acked(self, request_id: str) -> None:
        """A `heartbeat_ack` came; without a `request_id` it answers the oldest.

        An application that answers is not stalled: what was sent before the answered one is no longer waited for, and
        nothing that was sent so far if it cannot be told which one was.
        """
        self.acks_seen = True
        if request_id and request_id not in self._unacked:
            self._unacked.clear()
        while self._unacked:
            oldest, _ = self._unacked.popitem(last=False)
            if not request_id or oldest == request_id:
                return

    def answered(self, request_id: str) -> None:
        """The application answered a heartbeat with something else than an acknowledgement."""
        self._unacked.pop(request_id, None)

    @property
    def learnt(self) -> bool | None:
        """Whether the peer acknowledges heartbeats, as this connection has shown; `None`: no news."""
        return True if self.acks_seen else self._disproved

    def may_ack(self, now: float) -> bool:
        """Whether acknowledgements come, or a first one may still come: then only they tell what has arrived."""
        if self.acks_seen or not self._unacked:
            return self.acks_seen
        if self._used_to_ack is None and now - next(iter(self._unacked.values())) >= FIRST_ACK_S:
            self._disproved = False
        return self._used_to_ack is not False and self._disproved is not False

    def excuse(self, now: float) -> None:
        """Count no silence against the peer that fell into a pause of our own: it was not pinged meanwhile.

        It is pinged at the next check, and has the usual time to answer; acknowledgements have all their time anew.
        """
        self._last_frame = max(self._last_frame, now - self._ping_interval_s)
        self._pinged_at = None
        self._unacked = OrderedDict.fromkeys(self._unacked, now)

    def check(self, now: float) -> LivenessCheck:
        """Judge the connection; call it again after `next_s`."""
        silent_s = now - self._last_frame
        if silent_s >= self._read_timeout_s:
            return LivenessCheck(LivenessState.HALF_OPEN, 0)
        if (self.acks_seen or self._used_to_ack) and self._unacked:
            waited_s = now - next(iter(self._unacked.values()))
            if waited_s >= self._ack_timeout_s:
                self._disproved = False
                return LivenessCheck(LivenessState.STALLED, 0)
            ack_s = self._ack_timeout_s - waited_s
        else:
            ack_s = self._ack_timeout_s
        left_s = min(self._read_timeout_s - silent_s, ack_s)
        if silent_s < self._ping_interval_s:
            return LivenessCheck(LivenessState.ALIVE, min(left_s, self._ping_interval_s - silent_s))
        if self._pinged_at is None:
            self._pinged_at = now
            return LivenessCheck(LivenessState.PING, left_s)
        return LivenessCheck(LivenessState.ALIVE, left_s)
