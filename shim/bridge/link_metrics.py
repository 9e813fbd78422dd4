"""Metrics of a link: attempts to come online, losses and returns (docs/reference/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable

from shim.bridge.context import BridgeContext
from shim.core.backoff import DialOutcome, failure_name, is_controller_unreachable
from shim.ports import DialFailure


class LinkMetrics:
    """Recorder of one link's metrics.

    `received_since(at)` returns True if any link received a frame after the monotonic time `at`.
    """

    def __init__(self, ctx: BridgeContext, received_since: Callable[[float], bool]) -> None:
        self._ctx = ctx
        self._received_since = received_since
        self._begun_at: float | None = None  # while an attempt is under way
        self._opened_at: float | None = None
        self._lost_at: float | None = None  # while a link that was online is to come back
        self._worked_at: float | None = None
        self._unreachable_since: float | None = None
        self._refused = False
        self.reason = "other"

    def dial_started(self, now: float) -> None:
        """Record the start of an attempt; the second dial of `upstream.auth: auto` belongs to the same attempt."""
        if self._begun_at is None:
            self._begun_at = now

    def handshake_failed(self, failure: DialFailure) -> None:
        """Count a failed handshake."""
        self.reason = failure_name(failure.reason, failure.status)
        self._ctx.metrics.dials.labels(self.reason).inc()

    def dial_failed(self, failure: DialFailure, now: float) -> None:
        """Record the end of an attempt in which every way to present the token failed; `failure` is the last one."""
        begun_at, self._begun_at = self._begun_at, None
        if begun_at is None or failure.reason == "token":
            return  # the token could not be read, so the controller was not dialled
        since_working_s = None if self._worked_at is None else now - self._worked_at
        unreachable = is_controller_unreachable(failure.reason, failure.status, since_working_s)
        outcome = DialOutcome.UNREACHABLE if unreachable and not self._received_since(begun_at) else DialOutcome.FAILED
        if outcome is DialOutcome.UNREACHABLE:
            self._unreachable_since = begun_at
        else:
            self._refused = True
        self._ctx.metrics.attempts.labels(outcome.value).inc()

    def handshake_succeeded(self, now: float) -> None:
        """Count a successful handshake."""
        self._ctx.metrics.dials.labels("ok").inc()
        self._opened_at = now

    def came_online(self, now: float) -> None:
        """Record that the attempt succeeded: all fresh sessions are registered."""
        metrics = self._ctx.metrics
        if self._begun_at is not None:
            metrics.attempts.labels(DialOutcome.OK.value).inc()
        self._begun_at = None
        if self._lost_at is not None:
            metrics.reconnect_seconds.observe(now - self._lost_at)
            if not self._refused:
                # The controller was unreachable when the last unsuccessful attempt began, and returned some time later.
                # A refusal in between shows that it returned before: the time of its return is unknown then.
                metrics.return_seconds.observe(now - max(self._lost_at, self._unreachable_since or self._lost_at))
        self._lost_at = self._unreachable_since = None
        self._refused = False

    def connection_lost(self, reason: str, now: float) -> None:
        """Record that the connection ended and the shim did not close it."""
        metrics = self._ctx.metrics
        self.reason = reason
        metrics.disconnects.labels(reason).inc()
        opened_at, self._opened_at = self._opened_at, None
        if opened_at is not None and now - opened_at < self._ctx.settings.upstream.reconnect.stable_after_s:
            metrics.early_disconnects.inc()
        if self._begun_at is not None:  # the handshake succeeded, but the link did not come online
            metrics.attempts.labels(DialOutcome.FAILED.value).inc()
            self._refused = True
            self._begun_at = None
        else:
            self._lost_at = now
        self._worked_at = now

    def closed_by_shim(self) -> None:
        """Record that the shim closed the connection itself or stopped dialling: no return is to be measured."""
        self._begun_at = self._opened_at = self._lost_at = None
