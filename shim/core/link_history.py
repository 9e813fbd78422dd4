"""What a link has done lately, as segments: what the status page draws. Pure; times are monotonic seconds."""

from __future__ import annotations

from collections import deque
from enum import Enum

import msgspec

from shim.core.link_state import LinkState, LinkStateMachine

MAX_SEGMENTS = 256


class PhaseKind(Enum):
    """What a link's state means to a person."""

    UP = "up"
    DOWN = "down"  # wanted, and not there
    REFUSED = "refused"  # the controller does not accept the token
    IDLE = "idle"  # nobody needs it


def phase_of(link: LinkStateMachine) -> PhaseKind:
    """The phase that a link is in."""
    if link.state in (LinkState.IDLE, LinkState.STOPPED):
        return PhaseKind.IDLE
    if link.refused:
        return PhaseKind.REFUSED
    return PhaseKind.UP if link.state is LinkState.ONLINE else PhaseKind.DOWN


class LinkPhase(msgspec.Struct, frozen=True):
    """A phase from `since_s` on, until the next segment; `reason` says why it began, where that is known."""

    phase: PhaseKind
    since_s: float
    reason: str = ""


class LinkHistory:
    """The last phases of one link. A link that flaps for long forgets the oldest ones."""

    __slots__ = ("_segments",)

    def __init__(self, now: float) -> None:
        self._segments: deque[LinkPhase] = deque([LinkPhase(PhaseKind.IDLE, now)], MAX_SEGMENTS)

    @property
    def current(self) -> LinkPhase:
        """The segment that lasts until now."""
        return self._segments[-1]

    def enter(self, phase: PhaseKind, now: float, reason: str) -> None:
        """The link is in this phase now; nothing happens if it was before."""
        if phase is not self._segments[-1].phase:
            self._segments.append(LinkPhase(phase, now, reason))

    def last(self, now: float, span_s: float) -> tuple[LinkPhase, ...]:
        """The segments that reach into the last `span_s` seconds; the first may have begun earlier."""
        segments = list(self._segments)
        begins = [index for index, segment in enumerate(segments) if segment.since_s <= now - span_s]
        return tuple(segments[begins[-1] if begins else 0 :])
