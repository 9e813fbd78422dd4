"""Rejections of arriving commands: reported to the controller at once and not stored.

See docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import groupby

import msgspec

from shim.bridge.context import BridgeContext
from shim.bridge.outbox import Outbox
from shim.core.bounds import MAX_ID_BYTES, MAX_LOGGED_CHARS, cut
from shim.core.records import AddTrace, SessionKey
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.log import get

log = get(__name__)

MAX_UNTRACED = 256
LOGGED_PER_MINUTE = 100
REASONS = {
    "expired": "it had expired before it arrived",
    "queue_full": "the queue for this cluster is full",
    "store_unavailable": "the queue cannot be written",
}
DRAINED = "the shim is being drained and takes no new commands"


class Rejection(msgspec.Struct, frozen=True):
    """One rejected command.

    `code` and `error` are sent to the controller; the trace is stored under `key`.
    """

    key: SessionKey
    command_id: str
    request_id: str
    code: str
    error: str
    session: Session | None = None


class Rejections:
    """Reporter of rejected commands, bounded so that a flood of them delays no accepted command.

    A controller can send commands faster than the disk can store traces. Every rejection is reported. While the disk is
    busy with earlier traces, only the newest `MAX_UNTRACED` are kept: an operator looks for a recent command. Log lines
    are limited to `LOGGED_PER_MINUTE`; the remaining ones are counted.
    """

    def __init__(self, ctx: BridgeContext, outbox: Outbox) -> None:
        self._ctx = ctx
        self._outbox = outbox
        self._untraced: deque[tuple[Rejection, float]] = deque(maxlen=MAX_UNTRACED)
        self._tracing = False
        self._minute = -1
        self._logged = 0

    def reject(self, rejection: Rejection, *, report: bool = True) -> None:
        """Count, log and trace a rejection and report it to the controller.

        With `report=False` nothing is reported: a command that came by HTTP has no way back.
        """
        code, wall = rejection.code, self._ctx.clock.wall_s()
        self._ctx.metrics.commands.labels("expired" if code == "expired" else f"rejected_{code}").inc()
        self._log(rejection)
        if report:
            payload = self._outbox.failure_payload(
                rejection.session, rejection.command_id, wall, code=code, error=rejection.error
            )
            self._outbox.send_unpersisted(rejection.key, rejection.request_id, payload)
        self._untraced.append((rejection, wall))
        self._trace()

    def _log(self, rejection: Rejection) -> None:
        minute = int(self._ctx.now // 60)
        if minute != self._minute:
            self._minute, self._logged = minute, 0
        self._logged += 1
        log.warning(
            "command_rejected",
            dedupe_key=None if self._logged <= LOGGED_PER_MINUTE else rejection.code,
            command=cut(rejection.command_id, MAX_LOGGED_CHARS),
            session=rejection.key.ident,
            code=rejection.code,
        )

    def _trace(self) -> None:
        """Submit all waiting traces in one transaction, unless the previous transaction is still pending."""
        if self._tracing or not self._untraced:
            return
        self._tracing = True
        traces = list(self._traces())
        self._untraced.clear()
        self._ctx.store.submit(*traces, done=self._traced)

    def _traced(self, _outcome: StoreError | None) -> None:
        self._tracing = False
        self._trace()

    def _traces(self) -> Iterator[AddTrace]:
        """Yield one operation for each run of rejections that share session, time and code."""
        for (key, wall, code), group in groupby(self._untraced, lambda each: (each[0].key, each[1], each[0].code)):
            ids = tuple(cut(rejection.command_id, MAX_ID_BYTES) for rejection, _ in group)
            yield self._ctx.step(key, ids, wall, "reported", code)
