"""What is looked after at regular intervals, each duty by itself: a defect in one does not keep others from theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shim.bridge.context import BridgeContext
from shim.bridge.queues import CommandQueues
from shim.core.records import SessionKey
from shim.logs import get

log = get(__name__)

TICK_S = 1.0
UNPOLLED_WARNING_S = 600.0

PeriodicTask = tuple[float, Callable[[], None]]


class PeriodicTasks:
    """Calls duties, each every so many seconds, until the timers end."""

    def __init__(self, ctx: BridgeContext, duties: Sequence[PeriodicTask]) -> None:
        self._ctx = ctx
        self._periodic_tasks = duties
        self._done_at = [ctx.now] * len(duties)

    def start(self) -> None:
        """Begin; the first turn comes a second later."""
        self._ctx.timers.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ctx.timers.call_later(TICK_S, self._tick)
        now = self._ctx.now
        for number, (every_s, duty) in enumerate(self._periodic_tasks):
            if now - self._done_at[number] < every_s:
                continue
            self._done_at[number] = now
            try:
                duty()
            except Exception:
                self._ctx.metrics.internal_errors.labels("bridge").inc()
                log.exception("upkeep_failed", duty=getattr(duty, "__qualname__", "?"))


class UnpolledCommandsWarning:
    """Commands wait and their agent has not polled for 10 minutes: said once (protocol.md §1)."""

    def __init__(self, ctx: BridgeContext, queues: CommandQueues) -> None:
        self._ctx = ctx
        self._queues = queues
        self.sessions: set[SessionKey] = set()

    def check(self) -> None:
        """Say what is new."""
        overdue = set()
        for key, queue in self._queues.items():
            session, since = self._ctx.sessions.get(key), queue.waiting_since
            if session is None or since is None or session.held:
                continue
            if self._ctx.now - max(since, session.poll_at or 0.0) < UNPOLLED_WARNING_S:
                continue
            overdue.add(key)
            if key not in self.sessions:
                log.warning(
                    "commands_not_polled",
                    session=key.ident,
                    commands=len(queue),
                    hint="this agent has not polled for 10 minutes; stock agents never fetch commands",
                )
        self.sessions = overdue
