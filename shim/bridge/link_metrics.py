"""Metrics of a link: its attempts to come online, its losses and its returns (docs/reference/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable

from shim.bridge.context import BridgeContext
from shim.core.backoff import DialOutcome, failure_name, is_controller_unreachable
from shim.ports import DialFailure


class LinkMetrics:
    """Told what a link goes through. `heard_since(at)`: has another link heard its controller after that moment?"""

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
        """An attempt begins; the second way of `upstream.auth: auto` belongs to it."""
        if self._begun_at is None:
            self._begun_at = self._ctx.now

    def handshake_failed(self, failure: DialFailure) -> None:
        """A handshake failed."""
        self.reason = failure_name(failure.reason, failure.status)
        self._ctx.metrics.dials.labels(self.reason).inc()

    def dial_failed(self, failure: DialFailure) -> None:
        """The attempt is over: every way to present the token failed, the last as `failure` tells."""
        begun_at, now = self._begun_at, self._ctx.now
        self._begun_at = None
        if begun_at is None or failure.reason == "token":
            return  # nobody was dialled
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
        """The handshake succeeded."""
        self._ctx.metrics.dials.labels("ok").inc()
        self._opened_at = self._ctx.now

    def online(self) -> None:
        """All fresh sessions were told: the attempt succeeded."""
        metrics, now = self._ctx.metrics, self._ctx.now
        if self._begun_at is not None:
            metrics.attempts.labels(DialOutcome.OK.value).inc()
        self._begun_at = None
        if self._lost_at is not None:
            metrics.reconnect_seconds.observe(now - self._lost_at)
            if not self._refused:
                # It was away when the last attempt that met nobody began, and came back at some time after that.
                metrics.return_seconds.observe(now - max(self._lost_at, self._away_at or self._lost_at))
        self._lost_at = self._away_at = None
        self._refused = False

    def lost(self, reason: str) -> None:
        """The connection ended without our doing."""
        metrics, now = self._ctx.metrics, self._ctx.now
        self.reason = reason
        metrics.disconnects.labels(reason).inc()
        opened_at, self._opened_at = self._opened_at, None
        if opened_at is not None and now - opened_at < self._ctx.settings.upstream.reconnect.stable_after_s:
            metrics.early_disconnects.inc()
        if self._begun_at is not None:  # not even online yet, and answered by the controller
            metrics.attempts.labels(DialOutcome.FAILED.value).inc()
            self._refused = True
            self._begun_at = None
        else:
            self._lost_at = now
        self._worked_at = now

    def closed(self) -> None:
        """We closed the connection ourselves, or gave up wanting one: there is nothing to come back from."""
        self._begun_at = self._opened_at = self._lost_at = None
