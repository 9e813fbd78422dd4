"""Recent phases of a link, as the status page draws them. Times are monotonic seconds."""

from __future__ import annotations

from collections import deque
from enum import Enum

import msgspec

from shim.core.link_state import LinkState, LinkStateMachine

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
    """The last `MAX_SEGMENTS` phases of one link."""

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
