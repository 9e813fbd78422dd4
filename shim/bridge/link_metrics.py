"""Metrics of a link: attempts to come online, losses and returns (docs/reference/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable

from shim.bridge.context import BridgeContext
from shim.core.backoff import DialOutcome, failure_name, is_controller_unreachable
from shim.ports import DialFailure


class LinkMetrics:
    """Recorder of one link's metrics.

    `heard_since(at)` returns True if any link received a frame after the monotonic time `at`.
    """

    def __init__(self, ctx: BridgeContext, heard_since: Callable[[float], bool]) -> None:
        self._ctx = ctx
        self._heard_since = heard_since
        self._begun_at: float | None = None  # while an attempt is under way
        self._opened_at: float | None = None
        self._lost_at: float | None = None  # while a link that was online is to come back
        self._worked_at: float | None = None
        self._away_at: float | None = None
        self._refused = False
        self.reason = "other"

    def dial_started(self) -> None:
        """Record the start of an attempt; the second dial of `upstream.auth: auto` belongs to the same attempt."""
        if self._begun_at is None:
            self._begun_at = self._ctx.now

    def handshake_failed(self, failure: DialFailure) -> None:
        """Count a failed handshake."""
        self.reason = failure_name(failure.reason, failure.status)
        self._ctx.metrics.dials.labels(self.reason).inc()

    def dial_failed(self, failure: DialFailure) -> None:
        """Record the end of an attempt in which every way to present the token failed; `failure` is the last one."""
        begun_at, now = self._begun_at, self._ctx.now
        self._begun_at = None
        if begun_at is None or failure.reason == "token":
            return  # the token could not be read, so the controller was not dialled
        since_working_s = None if self._worked_at is None else now - self._worked_at
        away = is_controller_unreachable(failure.reason, failure.status, since_working_s) and not self._heard_since(
            begun_at
        )
        if away:
            self._away_at = begun_at
        else:
            self._refused = True
        self._ctx.metrics.attempts.labels((DialOutcome.AWAY if away else DialOutcome.FAILED).value).inc()

    def handshake_succeeded(self) -> None:
        """Count a successful handshake."""
        self._ctx.metrics.dials.labels("ok").inc()
        self._opened_at = self._ctx.now

    def online(self) -> None:
        """Record that the attempt succeeded: all fresh sessions are registered."""
        metrics, now = self._ctx.metrics, self._ctx.now
        if self._begun_at is not None:
            metrics.attempts.labels(DialOutcome.OK.value).inc()
        self._begun_at = None
        if self._lost_at is not None:
            metrics.reconnect_seconds.observe(now - self._lost_at)
            if not self._refused:
                # The controller was unreachable when the last unsuccessful attempt began, and returned some time later.
                # A refusal in between shows that it returned before: the time of its return is unknown then.
                metrics.return_seconds.observe(now - max(self._lost_at, self._away_at or self._lost_at))
        self._lost_at = self._away_at = None
        self._refused = False

    def lost(self, reason: str) -> None:
        """Record that the connection ended and the shim did not close it."""
        metrics, now = self._ctx.metrics, self._ctx.now
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

    def closed(self) -> None:
        """Record that the shim closed the connection itself or stopped dialling: no return is to be measured."""
        self._begun_at = self._opened_at = self._lost_at = None
