"""Estimator of the time for which a poll without commands may be held open (docs/reference/protocol.md#13-poll).

`bridge.long_polls` asks it how long a poll may be held, and records in it how the poll ended.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

START_S = 4.0  # below the shortest heartbeat interval, so that the first polls of a serial agent delay no heartbeat
STEP_S = 1.0
MARGIN_S = 1.0
PROBE_AFTER = 50
MAX_PROBE_AFTER = 3200
MIN_SAMPLES = 4
AT_ONCE_S = 0.1
STEADY = 0.15
TELLING = 0.02
CONTRAST = 3.0
MAX_SAMPLES = 8

Samples = tuple[float, ...]


class PollPacing(Enum):
    """Rules by which an agent times its polls."""

    UNKNOWN = "unknown"
    TICKER = "ticker"  # at a fixed rate: the next poll follows a late reply at once
    PAUSE = "pause"  # a fixed time after each reply


class HoldEstimator:
    """The learnt hold of one session. All times are in seconds, `now` is monotonic.

    The hold starts at 4 s and doubles with each poll that ended with our reply. If the agent hangs up first, the
    ceiling becomes 1 s less than the time at which it did, and the hold half of that. From then on the hold grows by 1
    s.

    The ceiling is either the timeout of the agent's client, or only the moment at which the agent died. So after many
    replies at the ceiling it is raised by 1 s, each time more rarely.

    An agent that sends heartbeats, but never during a held poll, is taken as serial. A serial agent makes one call
    after the other, so its heartbeats wait for our reply. Two parallel loops of the same rate look the same until a
    hold is longer than the interval. So one poll is held 1 s longer: a heartbeat during it proves that the loops are
    parallel.

    Each `poll_arrived` is followed by exactly one of `reply_sent`, `agent_disconnected` and `connection_lost`.
    """

    __slots__ = (
        "_answered_at",
        "_arrived_at",
        "_at_ceiling",
        "_base_interval_s",
        "_before_left_s",
        "_concurrent",
        "_gaps",
        "_open",
        "_pauses",
        "_probe_after",
        "_probes_serial",
        "_provisional_s",
        "_serial_for_sure",
        "_unjudged",
        "ceiling_s",
        "changed",
        "held_s",
        "pace",
    )

    def __init__(self, stored: dict[str, Any] | None = None) -> None:
        known = stored or {}
        self.held_s: float = _number(known.get("hold_s"), START_S)
        self.ceiling_s: float | None = _number(known.get("ceiling_s"), None)
        self.pace = next((pace for pace in PollPacing if pace.value == known.get("pace")), PollPacing.UNKNOWN)
        self._concurrent = known.get("concurrent") is True
        self._serial_for_sure = known.get("serial") is True
        self._base_interval_s: float | None = _number(known.get("interval_s"), None)
        self._provisional_s: float | None = None
        self._before_left_s: float | None = None
        self._at_ceiling = 0
        self._probes_serial = False  # a poll was held as long as a serial agent allows: the next is held longer
        self._probe_after = int(_number(known.get("probe_after"), PROBE_AFTER))
        self._open = 0
        self._unjudged = -1
        self._arrived_at: float | None = None
        self._answered_at: float | None = None
        self._gaps: Samples = ()
        self._pauses: Samples = ()
        self.changed = False

    def stored(self) -> dict[str, Any]:
        """Return the state that survives a restart as a JSON object, and clear `changed`."""
        self.changed = False
        return {
            "hold_s": self.held_s,
            "ceiling_s": self.ceiling_s,
            "concurrent": self._concurrent,
            "serial": self._serial_for_sure,
            "interval_s": self._base_interval_s,
            "probe_after": self._probe_after,
            "pace": self.pace.value,
        }

    @property
    def serial(self) -> bool:
        """True for an agent that sends heartbeats, but never did while one of its polls was held."""
        return self._base_interval_s is not None and not self._concurrent

    @property
    def interval_s(self) -> float | None:
        """Seconds between polls (TICKER), or the pause after each reply (PAUSE); `None` while the pacing is unknown."""
        if self.pace is PollPacing.UNKNOWN or not self._gaps:
            return None
        return middle_of(self._gaps if self.pace is PollPacing.TICKER else self._pauses or self._gaps)

    def limit_s(self, max_s: float) -> float:
        """Return the longest time in seconds for which the next poll may be held."""
        bound_s = min(self.held_s, max_s)
        if self.ceiling_s is not None:
            bound_s = min(bound_s, self.ceiling_s)
        interval_s = self._provisional_s if self._base_interval_s is None else self._base_interval_s
        if interval_s is not None and not self._concurrent:
            probing = self._probes_serial and not self._serial_for_sure
            bound_s = min(bound_s, interval_s + (MARGIN_S if probing else -MARGIN_S))
        return max(0.0, bound_s)

    def poll_arrived(self, now: float) -> bool:
        """Record the arrival of a poll. Returns True if the agent's pacing was newly recognised."""
        self._open += 1
        if self._arrived_at is not None:
            self._gaps = remember(self._gaps, now - self._arrived_at)
        if self._answered_at is not None:
            self._pauses = remember(self._pauses, now - self._answered_at)
        self._arrived_at, self._answered_at = now, None
        self._unjudged += 1
        if self._unjudged < MIN_SAMPLES:
            return False
        self._unjudged = 0
        pace = self._judge_pace()
        if pace in (PollPacing.UNKNOWN, self.pace):
            return False
        self.pace = pace
        self.changed = True
        return True

    def reply_sent(self, now: float, max_s: float) -> None:
        """Record a poll that ended with our reply, and lengthen the hold."""
        self._closed(now)
        self._learn_serial(now)
        self._before_left_s = None
        if self.ceiling_s is not None and self.held_s >= self.ceiling_s:
            self._at_ceiling += 1
            if self._at_ceiling >= self._probe_after and self.ceiling_s < max_s:
                self._at_ceiling = 0
                self.ceiling_s += STEP_S  # the hold below grows with it
        allowed = max_s if self.ceiling_s is None else min(max_s, self.ceiling_s)
        longer_s = self.held_s + (STEP_S if self.ceiling_s is not None else max(self.held_s, STEP_S))
        grown = min(longer_s, max(allowed, 0.0))
        if grown != self.held_s:
            self.held_s = grown
            self.changed = True

    def agent_disconnected(self, after_s: float) -> None:
        """Record that the agent hung up `after_s` seconds after its poll, before our reply; shorten the hold."""
        self.connection_lost()
        if self._before_left_s is None:
            self._before_left_s = self.held_s
        self.ceiling_s = max(0.0, after_s - MARGIN_S)
        self.held_s = self.ceiling_s / 2
        self._at_ceiling = 0
        self._probe_after = min(2 * self._probe_after, MAX_PROBE_AFTER)
        self.changed = True

    def connection_lost(self) -> None:
        """Record a poll that ended without showing how long the agent would have waited."""
        self._closed(None)

    def heartbeat(self, interval_s: float | None, provisional_s: float | None = None) -> None:
        """Record a heartbeat. `interval_s` is the measured interval, `None` while it is unknown.

        Until then `provisional_s`, the median of the first gaps, bounds the hold. The shortest interval of a serial
        agent counts, because the later ones include our holds.
        """
        self._provisional_s = provisional_s
        if self._open and not self._concurrent:
            self._concurrent = self.changed = True
        if interval_s is not None and (self._base_interval_s is None or interval_s < self._base_interval_s):
            self._base_interval_s = interval_s
            self.changed = True

    def new_process(self) -> None:
        """Reset what the agent's new process may do differently: its client's timeout and its loops.

        If the previous process hung up and did not call again, it hung up because it ended. Its hold is restored then.
        """
        if self._before_left_s is not None:
            self.held_s, self._before_left_s = max(self.held_s, self._before_left_s), None
        if self.ceiling_s is not None or self._serial_for_sure:
            self.ceiling_s = None
            self._probe_after = PROBE_AFTER
            self._serial_for_sure = False
            self._probes_serial = False
            self.changed = True

    # --- inside -------------------------------------------------------------------------------------------------------

    def _closed(self, answered_at: float | None) -> None:
        self._open = max(0, self._open - 1)
        if not self._open:  # otherwise the agent polled again before this reply, so there is no pause to measure
            self._answered_at = answered_at

    def _learn_serial(self, now: float) -> None:
        if self._base_interval_s is None or self._concurrent or self._serial_for_sure or self._arrived_at is None:
            return
        if now - self._arrived_at >= self._base_interval_s:
            self._serial_for_sure = self.changed = True
        elif self.held_s >= self._base_interval_s - MARGIN_S:
            self._probes_serial = True

    def _judge_pace(self) -> PollPacing:
        """Return the pacing that the last polls show.

        UNKNOWN is returned if they fit both rules, which is so if all polls are held equally long.
        """
        if len(self._pauses) < MIN_SAMPLES or len(self._gaps) < MIN_SAMPLES:
            return PollPacing.UNKNOWN
        if middle_of(self._pauses) < AT_ONCE_S and middle_of(self._gaps) > 2 * AT_ONCE_S:
            return PollPacing.TICKER  # its ticks come faster than our replies
        pause_spread, gap_spread = _spread(self._pauses), _spread(self._gaps)
        steadier, other = sorted((pause_spread, gap_spread))
        if steadier > STEADY or other < max(TELLING, CONTRAST * steadier):
            return PollPacing.UNKNOWN
        return PollPacing.PAUSE if pause_spread < gap_spread else PollPacing.TICKER


def middle_of(samples: Samples) -> float:
    """Return the median of at least one sample.

    The module `statistics` would import decimals and fractions, and is slower.
    """
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def remember(samples: Samples, value: float) -> Samples:
    """Return the samples with one more; the oldest of more than eight is dropped.

    Tuples are used because there are thousands of these, and most are empty.
    """
    return (*samples[1 - MAX_SAMPLES :], value)


def _spread(values: Samples) -> float:
    """Return the median deviation relative to the median."""
    middle = middle_of(values)
    return middle_of(tuple(abs(value - middle) for value in values)) / middle if middle else 0.0


def _number(value: Any, default: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 else default
