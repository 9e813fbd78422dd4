"""The queue of events between the parts of the bridge.

An event is a tuple whose type names what happened. It is defined beside the part that reports it. Its times are
monotonic seconds. `bridge.event_handlers` has one function for each type, which lists everything that follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from shim.log import get
from shim.metrics import Metrics
from shim.ports import Timers

log = get(__name__)


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
            self._timers.call_later(0, self.handle_all)

    def handle_all(self) -> None:
        """Handle all queued events now."""
        self._scheduled = False
        while self._events:
            event = self._events.popleft()
            try:
                self.handlers[type(event)](event)
            except Exception:
                self._metrics.internal_errors.labels("bridge").inc()
                log.exception("event_failed", kind=type(event).__name__)
