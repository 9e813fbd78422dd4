"""Compute heartbeat coverage: the agent heartbeats that the controller acknowledged (docs/reference/metrics.md)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

ACK_GRACE_S = 2.5  # with the default of 27.5 s the window is the vendor's own interval, 30 s
MERGED_S = 1.0
MAX_WRITES = 16


class HeartbeatOutcome(Enum):
    """What became of an agent's heartbeat."""

    ACKED = "acked"  # the controller acknowledged a heartbeat of this agent in time
    WRITTEN = "written"  # this controller never acknowledges; one was written to a connection that lived on, unrefused
    MISSED = "missed"


class HeartbeatChannel(Protocol):
    """A connection, open or gone: when the last frame came in on it, in monotonic seconds."""

    @property
    def heard_at(self) -> float: ...


@dataclass(slots=True)
class _Waiting:
    """Heartbeats of the agent, `count` of them within `MERGED_S` of `at`, that nothing covers yet."""

    at: float
    count: int


class HeartbeatCoverage:
    """The heartbeats of one agent; all times are monotonic seconds.

    One is covered by a heartbeat that went up at most a window before it, on the connection that is still the agent's,
    or that goes up later, if that one is acknowledged at most a window after it. Each is counted once: when it is
    covered, or when its window is over.
    """

    __slots__ = ("_acked_at", "_acked_on", "_waiting", "_writes")

    def __init__(self) -> None:
        self._acked_at = float("-inf")
        self._acked_on: HeartbeatChannel | None = None
        self._writes: tuple[tuple[float, HeartbeatChannel], ...] = ()
        self._waiting: list[_Waiting] = []

    @property
    def waiting(self) -> bool:
        """Whether heartbeats wait to be covered."""
        return bool(self._waiting)

    def beat(self, now: float, line: HeartbeatChannel | None, window_s: float) -> bool:
        """The agent's heartbeat came while its traffic goes over `line`. True: it is covered already."""
        if line is not None and line is self._acked_on and now - self._acked_at <= window_s:
            return True
        if self._waiting and now - self._waiting[-1].at < MERGED_S:
            self._waiting[-1].count += 1
        else:
            self._waiting.append(_Waiting(now, 1))
        return False

    def written(self, now: float, line: HeartbeatChannel) -> None:
        """A heartbeat of this agent was written upstream."""
        self._writes = (*self._writes[1 - MAX_WRITES :], (now, line))

    def refused(self, sent_at: float | None = None) -> None:
        """The heartbeat that was written at `sent_at` is answered with an error; `None`: nobody can tell which one."""
        self._writes = tuple(write for write in self._writes if sent_at is not None and write[0] != sent_at)

    def acked(self, sent_at: float, line: HeartbeatChannel, now: float, window_s: float) -> int:
        """The heartbeat that was written at `sent_at` is acknowledged. Returns how many of the agent's that covers."""
        if sent_at > self._acked_at:
            self._acked_at, self._acked_on = sent_at, line
        covered = 0
        for waiting in list(self._waiting):
            if sent_at >= waiting.at - window_s and now <= waiting.at + window_s:
                covered += waiting.count
                self._waiting.remove(waiting)
        return covered

    def settle(self, now: float, window_s: float, *, acks: bool) -> Counter[HeartbeatOutcome]:
        """Judge those whose window is over. `acks`: this controller is known to acknowledge heartbeats."""
        judged: Counter[HeartbeatOutcome] = Counter()
        while self._waiting and now > self._waiting[0].at + window_s:
            waiting = self._waiting.pop(0)
            written = not acks and any(
                abs(sent_at - waiting.at) <= window_s and line.heard_at > sent_at for sent_at, line in self._writes
            )
            judged[HeartbeatOutcome.WRITTEN if written else HeartbeatOutcome.MISSED] += waiting.count
        return judged
