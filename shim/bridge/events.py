"""The events that links, gateways and registrations report to the rest of the bridge, and their queue.

`bridge.event_handlers` has one function for each of them, which lists everything that follows from the event. `now` is
the monotonic time of an event in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from shim.log import get
from shim.metrics import Metrics
from shim.ports import Timers

if TYPE_CHECKING:
    from shim.bridge.gateway_redirect import GatewayConnection
    from shim.bridge.links import UpstreamLink
    from shim.bridge.upstream_connection import UpstreamConnection
    from shim.core.sessions import Session

log = get(__name__)


class LinkOpened(NamedTuple):
    """The handshake of a link succeeded."""

    link: UpstreamLink
    now: float


class ReplayFinished(NamedTuple):
    """All fresh sessions of a link are registered on its connection, or were not answered in time."""

    link: UpstreamLink
    now: float


class LinkOnline(NamedTuple):
    """A link may carry heartbeats and results."""

    link: UpstreamLink
    now: float


class ResultsSent(NamedTuple):
    """The stored results of a link are sent that came online at `now`."""

    link: UpstreamLink
    now: float


class LinkLost(NamedTuple):
    """The connection of a link ended, whoever closed it."""

    link: UpstreamLink
    connection: UpstreamConnection


class RetryDue(NamedTuple):
    """The delay before the next dial of a link is over."""

    link: UpstreamLink
    now: float


class TokenRefused(NamedTuple):
    """The controller refused the token of a link in every way of presenting it."""

    link: UpstreamLink


class TokenAccepted(NamedTuple):
    """The controller accepted an agent's own token for the first time."""

    link: UpstreamLink


class LinkRemoved(NamedTuple):
    """A link was deleted together with its token."""

    link: UpstreamLink


class SessionAnnounced(NamedTuple):
    """The controller knows a session on this connection, or did not answer its registration in time."""

    session: Session
    connection: UpstreamConnection


class SessionUnknown(NamedTuple):
    """The controller answered that it does not know a session; `source` carried the answer."""

    session: Session
    source: UpstreamLink | GatewayConnection


class ResultsConfirmed(NamedTuple):
    """The controller has received these entries of the outbox."""

    seqs: tuple[int, ...]


class GatewayNamed(NamedTuple):
    """The reply to a session's registration named a gateway for its traffic."""

    session: Session
    link: UpstreamLink
    url: str


class GatewayOpened(NamedTuple):
    """The handshake of a gateway succeeded: it carries the traffic of its session from now on."""

    gateway: GatewayConnection


class GatewayClosed(NamedTuple):
    """The connection of a gateway ended, whoever closed it."""

    connection: UpstreamConnection


class GatewayLost(NamedTuple):
    """A gateway no longer serves its session."""

    gateway: GatewayConnection
    now: float


class EventQueue:
    """Events, handled in order after the callback that caused them has returned.

    Without the queue an event would be handled on the stack of its cause: the message that completes a registration
    would bring the link online, read the outbox and send heartbeats before its own handler has returned. `handlers` has
    one handler for each type of event; it is set before the first event.
    """

    def __init__(self, timers: Timers, metrics: Metrics) -> None:
        self._timers = timers
        self._metrics = metrics
        self._events: deque[object] = deque()
        self._scheduled = False
        self.handlers: Mapping[type, Callable[[Any], None]] = {}

    def put(self, event: object) -> None:
        """Handle an event in the next iteration of the event loop, after the events that are queued already."""
        self._events.append(event)
        if not self._scheduled:
            self._scheduled = True
            self._timers.call_later(0, self._handle_all)

    def _handle_all(self) -> None:
        self._scheduled = False
        while self._events:
            event = self._events.popleft()
            try:
                self.handlers[type(event)](event)
            except Exception:
                self._metrics.internal_errors.labels("bridge").inc()
                log.exception("event_failed", kind=type(event).__name__)
