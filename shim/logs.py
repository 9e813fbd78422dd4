"""Logging: an event's name and its fields, as one JSON object a line or readable for a console; secrets are masked.

`get(__name__)` may be called anywhere, `setup` once by whoever owns the process. Other libraries' records come out in
the same form, from warnings upwards.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

MASK = "***"
_MIN_SECRET_CHARS = 4  # masking a shorter one would garble every line and tell what it is
_OWN = ("time", "level", "logger", "event", "exception")
REPEAT_S = 60.0
_MAX_REPEATS = 1024
_CARRIERS = re.compile(r"((?:token|secret|password)=|\bBearer\s+)[^\s&\"'<>,;]+", re.IGNORECASE)
_SECRET_FIELD = re.compile(r"token$|secret|password|authorization", re.IGNORECASE)
_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f]+")
_COLOURS = {"debug": "2", "info": "36", "warning": "33", "error": "31", "critical": "31"}

Level = Literal["debug", "info", "warning", "error"]


class Logger:
    """A logger whose messages are event names (`link_state`), with everything variable in the fields.

    With `about` an event is one that may come again and again: of those that are about the same, one a minute is
    written, with the number of those left out before it in the field `repeats`.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, /, *, about: str | None = None, **fields: Any) -> None:
        self._log(logging.DEBUG, event, about, fields)

    def info(self, event: str, /, *, about: str | None = None, **fields: Any) -> None:
        self._log(logging.INFO, event, about, fields)

    def warning(self, event: str, /, *, about: str | None = None, **fields: Any) -> None:
        self._log(logging.WARNING, event, about, fields)

    def error(self, event: str, /, *, about: str | None = None, **fields: Any) -> None:
        self._log(logging.ERROR, event, about, fields)

    def exception(self, event: str, /, *, about: str | None = None, **fields: Any) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, about, fields, exc_info=True)

    def _log(
        self, level: int, event: str, about: str | None, fields: dict[str, Any], *, exc_info: bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"fields": fields, "about": about}
            self._logger.log(level, "%s", event, exc_info=exc_info, extra=extra)


def get(name: str) -> Logger:
    """The logger of a module, by its `__name__`."""
    return Logger(logging.getLogger(name))


class Redaction:
    """Masks known secrets, what follows `token=` or `Bearer `, and fields whose names say that they are secret."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: set[str] = set()
        self._known: re.Pattern[str] | None = None
        for secret in secrets:
            self.add(secret)

    def add(self, secret: str) -> None:
        """Mask this text from now on; texts of fewer than four characters are left alone."""
        if len(secret) >= _MIN_SECRET_CHARS and secret not in self._secrets:
            self._secrets.add(secret)
            self._compile()

    def discard(self, secret: str) -> None:
        """Mask it no longer: it is not valid any more, or its owner has gone."""
        if secret in self._secrets:
            self._secrets.remove(secret)
            self._compile()

    def _compile(self) -> None:
        longest_first = sorted(self._secrets, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """The text without secrets."""
        if self._known is not None:
            text = self._known.sub(MASK, text)
        return _CARRIERS.sub(rf"\1{MASK}", text)

    def value(self, value: Any, name: str = "") -> Any:
        """The value of the field `name` as JSON can hold it, without secrets in it or in anything below it."""
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if _SECRET_FIELD.search(name):
            return MASK
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(below, str(key)) for key, below in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.value(below) for below in value]
        return self.text(str(value))


@dataclass(slots=True)
class _Repeated:
    """When an event was last written, in Unix seconds, and how many were left out since."""

    written_at: float
    left_out: int = 0


class _Repeats(logging.Filter):
    """Leaves out repeats of events that are about something; of very many things the oldest are forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str, str], _Repeated] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        about: str | None = getattr(record, "about", None)
        if about is None:
            return True
        key = (record.name, record.getMessage(), about)
        seen = self._seen.get(key)
        if seen is not None and 0 <= record.created - seen.written_at < REPEAT_S:
            seen.left_out += 1
            return False
        if seen is None and len(self._seen) >= _MAX_REPEATS:
            del self._seen[next(iter(self._seen))]
        elif seen is not None and seen.left_out:
            record.fields = {**getattr(record, "fields", {}), "repeats": seen.left_out}
        self._seen[key] = _Repeated(record.created)
        return True


class _Formatter(logging.Formatter):
    """What both formats share: a record as a dict of redacted values, our own keys first."""

    def __init__(self, redaction: Redaction) -> None:
        super().__init__()
        self._redaction = redaction

    def _entry(self, record: logging.LogRecord) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": self._redaction.text(record.getMessage()),
        }
        fields: dict[str, Any] = getattr(record, "fields", {})
        for name, value in fields.items():
            entry[f"{name}_" if name in _OWN else name] = self._redaction.value(value, name)
        if record.exc_info:
            entry["exception"] = self._redaction.text(self.formatException(record.exc_info))
        return entry


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self._entry(record), ensure_ascii=False)


class ConsoleFormatter(_Formatter):
    """`21:56:41.123 INFO    link_state link=default state=online`; a traceback follows on lines of its own."""

    def __init__(self, redaction: Redaction, *, colour: bool) -> None:
        super().__init__(redaction)
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        entry = self._entry(record)
        time, level, _, event = (entry.pop(name) for name in ("time", "level", "logger", "event"))
        exception = entry.pop("exception", "")
        shown = f"{level.upper():<7}"
        if self._colour:
            shown = f"\x1b[{_COLOURS.get(level, '0')}m{shown}\x1b[0m"
        words = [time[11:-1], shown, _line(event), *(f"{name}={_quoted(value)}" for name, value in entry.items())]
        return " ".join(words) + "".join(f"\n    {_line(line)}" for line in exception.splitlines())


def _quoted(value: Any) -> str:
    """A bare word as it is, anything else as JSON: no value can forge a line or steer the terminal."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=True)


def _line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]


class _Handler(logging.StreamHandler[TextIO]):
    """A line that cannot be written is dropped: the library would print its arguments, unmasked, to stderr."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        pass


class Logs:
    """The logging of this process as `setup` has made it."""

    def __init__(self, handler: logging.Handler, redaction: Redaction) -> None:
        self._handler = handler
        self.redaction = redaction

    def set_level(self, level: Level) -> None:
        """Change what the shim's own modules say, at run time."""
        logging.getLogger("shim").setLevel(level.upper())

    def close(self) -> None:
        """Stop writing. Idempotent."""
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()


def setup(level: Level, form: Literal["json", "console"], *, stream: TextIO | None = None) -> Logs:
    """Write all records of this process to `stream` (default stderr), until the result is closed."""
    target = sys.stderr if stream is None else stream
    redaction = Redaction()
    handler = _Handler(target)
    json_lines = form == "json"
    handler.setFormatter(
        JsonFormatter(redaction) if json_lines else ConsoleFormatter(redaction, colour=target.isatty())
    )
    handler.addFilter(_Repeats())
    logging.getLogger().addHandler(handler)
    logs = Logs(handler, redaction)
    logs.set_level(level)
    return logs
