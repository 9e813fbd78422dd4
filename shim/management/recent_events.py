"""Recent events of the log for the status page, without the steps of single commands and calls."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

from shim.log import RepeatFilter
from shim.management.status import Row
from shim.ports import Clock
from shim.redaction import Redaction

KEPT = 40
SHIM_LOGGER = "shim"
FREQUENT = ("command_", "result_", "poll_pacing_detected", "call_refused", "agent_first_call")
"""Beginnings of events that happen with each command or call; the status shows these elsewhere."""
MAX_DETAIL_CHARS = 200
MAX_EVENT_CHARS = 64


class RecentEvents(logging.Handler):
    """Log handler that keeps the last `KEPT` events of the shim from level info on, between `start` and `stop`."""

    def __init__(self, clock: Clock, redaction: Redaction) -> None:
        super().__init__(logging.INFO)
        self._clock = clock
        self._redaction = redaction
        self._events: deque[Row] = deque(maxlen=KEPT)
        self.addFilter(lambda record: not record.getMessage().startswith(FREQUENT))
        self.addFilter(RepeatFilter())

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the events, the newest first."""
        return iter(list(reversed(self._events)))

    def start(self) -> None:
        """Begin to record."""
        logging.getLogger(SHIM_LOGGER).addHandler(self)

    def stop(self) -> None:
        """Stop recording."""
        logging.getLogger(SHIM_LOGGER).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one event, formatted now: its fields may change later. One that cannot be formatted is dropped."""
        try:
            self._events.append(self._format(record))
        except Exception:  # noqa: BLE001 - logging must not end the caller
            return

    def _format(self, record: logging.LogRecord) -> Row:
        """Return a line of the log. `detail` has the fields except the hint as `name value`, with secrets masked."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        masked = {name: self._redaction.value(value, name) for name, value in fields.items()}
        detail = ", ".join(
            f"{name} {value}" for name, value in masked.items() if value not in (None, "") and name != "hint"
        )
        return {
            "at": self._clock.wall_s(),
            "level": record.levelname.lower(),
            "event": self._encodable(record.getMessage(), MAX_EVENT_CHARS),
            "detail": self._encodable(detail, MAX_DETAIL_CHARS),
        }

    def _encodable(self, text: str, max_chars: int) -> str:
        """Return a masked text that JSON can carry: a lone surrogate is shown as its escape."""
        return self._redaction.text(text, max_chars).encode("utf-8", "backslashreplace").decode()
