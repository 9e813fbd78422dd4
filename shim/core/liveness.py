"""Liveness of an open connection and of the application behind it (docs/reference/protocol.md#21-link-life)."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

import msgspec

MAX_TRACKED_HEARTBEATS = 4096
FIRST_ACK_S = 10.0


class LivenessState(Enum):
    """Results of a check."""

    ALIVE = "alive"
    PING = "ping"  # no frame came in for ping_interval_s: send a ping
    HALF_OPEN = "half_open"  # no frame at all for read_timeout_s
    STALLED = "stalled"  # frames still come in, but acknowledgements stopped


class LivenessCheck(msgspec.Struct, frozen=True):
    """The result of a check, and the seconds until the next check is due."""

    verdict: LivenessState
    next_s: float


class Liveness:
    """Liveness of one connection. Times are monotonic seconds.

    `heard_at` is the time of the last inbound frame, before the first one that of the dial.
    `used_to_ack` is true if the peer acknowledged heartbeats on earlier connections, `None` if that is unknown.
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
        self.heard_at = now
        self._pinged_at: float | None = None
        self._unacked: OrderedDict[str, float] = OrderedDict()
        self._used_to_ack = used_to_ack
        self._disproved: bool | None = None
        self.acks_seen = False

    def frame(self, now: float) -> None:
        """Record an inbound frame. Every frame proves that the peer is alive."""
        self.heard_at = now
        self._pinged_at = None

    def heartbeat_sent(self, request_id: str, now: float) -> None:
        """Record a heartbeat whose acknowledgement is awaited."""
        self._unacked[request_id] = now
        if len(self._unacked) > MAX_TRACKED_HEARTBEATS:
            self._unacked.popitem(last=False)

    def acked(self, request_id: str) -> None:
        """Record a `heartbeat_ack`. Without a `request_id` it acknowledges the oldest heartbeat.

        An application that answers is not stalled, so earlier heartbeats are not awaited either. An unknown
        `request_id` clears all of them, because it does not show which one was answered.
        """
        self.acks_seen = True
        if request_id and request_id not in self._unacked:
            self._unacked.clear()
        while self._unacked:
            oldest, _ = self._unacked.popitem(last=False)
            if not request_id or oldest == request_id:
                return

    def answered(self, request_id: str) -> None:
        """Record a reply to a heartbeat that is no acknowledgement."""
        self._unacked.pop(request_id, None)

    @property
    def learnt(self) -> bool | None:
        """True or False if this connection showed whether the peer acknowledges heartbeats, else `None`."""
        return True if self.acks_seen else self._disproved

    def may_ack(self, now: float) -> bool:
        """Return True if acknowledgements come, or if a first one may still come.

        While that is so, only they prove which results have been received.
        """
        if self.acks_seen or not self._unacked:
            return self.acks_seen
        if self._used_to_ack is None and now - next(iter(self._unacked.values())) >= FIRST_ACK_S:
            self._disproved = False
        return self._used_to_ack is not False and self._disproved is not False

    def excuse(self, now: float) -> None:
        """Ignore the silence during a pause of our own process, in which the peer was not pinged.

        The peer is pinged at the next check and has the usual time to answer. The time for acknowledgements starts
        again.
        """
        self.heard_at = max(self.heard_at, now - self._ping_interval_s)
        self._pinged_at = None
        self._unacked = OrderedDict.fromkeys(self._unacked, now)

    def check(self, now: float) -> LivenessCheck:
        """Return the state of the connection. Call again after `next_s` seconds."""
        silent_s = now - self.heard_at
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
