"""Structured logging: an event name and fields, as one JSON object per line or as text for a console.

Secrets are masked. Call `get(__name__)` anywhere, and `setup` once per process. Records of other libraries are written
in the same format, from warnings upwards. The calling thread formats a line, a `LineWriter` writes it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TextIO

from shim.redaction import MAX_TEXT_CHARS, Redaction

_OWN = ("time", "level", "logger", "event", "exception")
FLUSH_S = 0.8
REPEAT_S = 60.0
_MAX_REPEATS = 1024
_EXCEPTION_CHARS = 16_384  # of a long traceback the end is kept, which has the exception
_PLAIN = re.compile(r"[^\s\"'=\\]+")
_COLOURS = {"debug": "2", "info": "36", "warning": "33", "error": "31", "critical": "31"}

Level = Literal["debug", "info", "warning", "error"]


class Logger:
    """Logger whose messages are event names (`link_state`); all variable data are fields.

    `dedupe_key` limits repeated events: of the same event with the same key, one per minute is written. Its field
    `repeats` counts the events that were left out before it.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, /, *, dedupe_key: str | None = None, **fields: Any) -> None:
        """Log an event for developers."""
        self._log(logging.DEBUG, event, dedupe_key, fields)

    def info(self, event: str, /, *, dedupe_key: str | None = None, **fields: Any) -> None:
        """Log an event of normal operation."""
        self._log(logging.INFO, event, dedupe_key, fields)

    def warning(self, event: str, /, *, dedupe_key: str | None = None, **fields: Any) -> None:
        """Log an event that an operator should look at."""
        self._log(logging.WARNING, event, dedupe_key, fields)

    def error(self, event: str, /, *, dedupe_key: str | None = None, **fields: Any) -> None:
        """Log a failure."""
        self._log(logging.ERROR, event, dedupe_key, fields)

    def exception(self, event: str, /, *, dedupe_key: str | None = None, **fields: Any) -> None:
        """Log an error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, dedupe_key, fields, exc_info=True)

    def _log(
        self, level: int, event: str, dedupe_key: str | None, fields: dict[str, Any], *, exc_info: bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"fields": fields, "dedupe_key": dedupe_key}
            self._logger.log(level, "%s", event, exc_info=exc_info, extra=extra)


def get(name: str) -> Logger:
    """Return the logger of a module, given its `__name__`."""
    return Logger(logging.getLogger(name))


class RepeatFilter(logging.Filter):
    """Filter for repeated events with a `dedupe_key`. At most `_MAX_REPEATS` keys are remembered."""

    def __init__(self) -> None:
        super().__init__()
        # The Unix time at which each event was last written, and the number of repeats left out since.
        self._seen: dict[tuple[str, str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a repetition; the next record that passes has the number of those left out."""
        dedupe_key: str | None = getattr(record, "dedupe_key", None)
        if dedupe_key is None:
            return True
        key = (record.name, record.getMessage(), dedupe_key)
        written_at, left_out = self._seen.get(key, (float("-inf"), 0))
        if 0 <= record.created - written_at < REPEAT_S:
            self._seen[key] = (written_at, left_out + 1)
            return False
        if key not in self._seen and len(self._seen) >= _MAX_REPEATS:
            del self._seen[next(iter(self._seen))]
        if left_out:
            record.fields = {**getattr(record, "fields", {}), "repeats": left_out}
        self._seen[key] = (record.created, 0)
        return True


class Formatter(logging.Formatter):
    """Formatter of masked records. `write` turns an entry into text: `as_json` or `as_text`."""

    def __init__(self, redaction: Redaction, write: Callable[[dict[str, Any]], str]) -> None:
        super().__init__()
        self._redaction = redaction
        self._write = write

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line; a traceback may take further ones."""
        return self._write(self._entry(record))

    def _entry(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return a record as masked values, with the shim's own keys first."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": self._redaction.text(record.getMessage(), MAX_TEXT_CHARS),
        }
        fields: dict[str, Any] = getattr(record, "fields", {})
        for name, value in fields.items():
            entry[f"{name}_" if name in _OWN else name] = self._redaction.value(value, name)
        if record.exc_info:
            entry["exception"] = self._redaction.text(self.formatException(record.exc_info))[-_EXCEPTION_CHARS:]
        return entry


def as_json(entry: dict[str, Any]) -> str:
    """Return an entry as one line of JSON."""
    return _escaped(json.dumps(entry, ensure_ascii=False))


def as_text(entry: dict[str, Any], *, colour: bool) -> str:
    """Return an entry as a line for people, and its traceback on the lines below.

    Example: `21:56:41.123 INFO link_state link=default state=online`.
    """
    time, level, _, event = (entry.pop(name) for name in ("time", "level", "logger", "event"))
    exception = entry.pop("exception", "")
    shown = f"{level.upper():<7}"
    if colour:
        shown = f"\x1b[{_COLOURS.get(level, '0')}m{shown}\x1b[0m"
    words = [time[11:-1], shown, _line(event), *(f"{name}={_quoted(value)}" for name, value in entry.items())]
    return " ".join(words) + "".join(f"\n    {_line(line)}" for line in exception.splitlines())


def _quoted(value: Any) -> str:
    """Return a simple word unchanged and anything else as JSON.

    So no value can forge a line or control the terminal.
    """
    if isinstance(value, str) and value.isprintable() and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=True)


def _line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]


def _escaped(line: str) -> str:
    """Escape characters that JSON leaves unescaped and terminals or log viewers interpret.

    These are C1 controls, U+2028, bidi controls and lone surrogates.
    """
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)


class _Handler(logging.Handler):
    """Handler that formats a record in the calling thread, because its fields may change later, and queues the line."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one line. A record that cannot be formatted is dropped: logging would print its arguments unmasked."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - logging must not end the caller
            self._writer.drop()
            return
        self._writer.put(line)


class Logs:
    """Logging of this process, as created by `setup`."""

    def __init__(self, handler: logging.Handler, redaction: Redaction, writer: LineWriter) -> None:
        self._handler = handler
        self._writer = writer
        self._level_before = logging.getLogger("shim").level
        self.redaction = redaction

    @property
    def dropped(self) -> int:
        """Lines since the start that could not be written: the reader was too slow, or writing failed."""
        return self._writer.dropped

    def count_drops(self, increase: Callable[[], None]) -> None:
        """Call `increase` once for each line that is dropped from now on, in any thread."""
        self._writer.on_drop = increase

    def set_level(self, level: Level) -> None:
        """Change the level of the shim's own modules."""
        logging.getLogger("shim").setLevel(level.upper())

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until all lines so far are written or dropped. Returns False after `timeout_s` seconds."""
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        """Stop logging. Queued lines are written for at most `FLUSH_S` seconds. Idempotent."""
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger("shim").setLevel(self._level_before)
        self._handler.close()
        self._writer.close(FLUSH_S)


def setup(level: Level, form: Literal["json", "console"], *, stream: TextIO | None = None) -> Logs:
    """Write all records of this process to `stream` (default stderr), until the returned object is closed."""
    target = sys.stderr if stream is None else stream
    redaction = Redaction()
    write: Callable[[dict[str, Any]], str] = as_json
    if form == "console":
        write = partial(as_text, colour=target is not None and target.isatty())
    formatter = Formatter(redaction, write)
    writer = LineWriter(target, lambda count: formatter.format(_dropped_lines(count)))
    handler = _Handler(writer)
    handler.setFormatter(formatter)
    handler.addFilter(RepeatFilter())
    logging.getLogger().addHandler(handler)
    logs = Logs(handler, redaction, writer)
    logs.set_level(level)
    return logs


def capture_stray_output() -> None:
    """Log the messages that Python itself prints to stderr: warnings, and exceptions in finalisers and threads.

    Printing could block the event loop if the reader of stderr is slow, and would not mask secrets.
    """
    logging.captureWarnings(True)
    stray = logging.getLogger("shim.stray")

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        """Log an exception that Python would print because nothing can handle it."""
        if found.exc_value is not None:
            error = (found.exc_type, found.exc_value, found.exc_traceback)
            stray.error("%s", "error_ignored_by_python", exc_info=error)

    def in_thread(found: threading.ExceptHookArgs) -> None:
        """Log an exception that ended a thread."""
        if found.exc_value is not None:
            error = (found.exc_type, found.exc_value, found.exc_traceback)
            stray.error("%s", "error_in_thread", exc_info=error)

    sys.unraisablehook = unraisable
    threading.excepthook = in_thread


def _dropped_lines(count: int) -> logging.LogRecord:
    """Return the record that reports dropped lines."""
    fields = {"count": count, "hint": "The log's reader was too slow, or the log could not be written."}
    record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, "log_lines_dropped", None, None)
    record.fields = fields
    return record


# --- writing without waiting ------------------------------------------------------------------------------------------

MAX_QUEUED_BYTES = 4 * 1024 * 1024
RETRY_MS = 1000


class LineWriter:
    """Writer of lines in order. If more than `MAX_QUEUED_BYTES` wait, new lines are dropped and counted.

    A line is written to a pipe at once if it has room, so that a kill in the next moment does not lose the line. All
    other lines are written by the thread.

    `tell(count)` returns the line that reports dropped ones, which is written as soon as writing works again. The
    standard library's QueueListener is not used: its stop waits forever for a write that hangs, and it does not bound
    bytes.
    """

    def __init__(self, stream: TextIO | None, tell: Callable[[int], str]) -> None:
        self.dropped = 0
        self.on_drop: Callable[[], None] | None = None
        self._told = 0
        self._tell = tell
        self._stream = stream
        self._fd = _fd_of(stream)
        self._pipe = None if self._fd is None else _own_end_of_pipe(self._fd)
        self._lines: deque[bytes] = deque()
        self._queued_bytes = 0
        self._writing = False
        self._torn = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue one line. Waits for nothing but another thread's append."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if self._takes_at_once(data):
                return
            if not self._closing and self._queued_bytes + len(data) <= MAX_QUEUED_BYTES:
                self._lines.append(data)
                self._queued_bytes += len(data)
                self._changed.notify_all()
                return
        self.drop()

    def _takes_at_once(self, data: bytes) -> bool:
        busy = self._lines or self._writing or self._torn or self._closing or self.dropped > self._told
        if self._pipe is None or busy or len(data) > select.PIPE_BUF:
            return False
        try:
            os.write(self._pipe, data)  # up to PIPE_BUF bytes are written completely or not at all
        except OSError:  # the pipe is full or has no reader: the thread will find out
            return False
        return True

    def drop(self) -> None:
        """Count a lost line."""
        with self._changed:
            self.dropped += 1
        if self.on_drop is not None:
            self.on_drop()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or being written. Returns False after `timeout_s` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._writing, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write the queued lines for at most `timeout_s` seconds, then end the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if self._pipe is not None:
                os.close(self._pipe)
                self._pipe = None
        self._thread.join(timeout_s)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._closing)
                if not self._lines:
                    return
                line = self._lines.popleft()
                self._queued_bytes -= len(line)
                self._writing = True
            if not self._write(line):
                self.drop()
            elif self.dropped > self._told and not self._lines:
                count = self.dropped - self._told
                if self._write(self._tell(count).encode("utf-8", "backslashreplace") + b"\n"):
                    self._told += count

    def _write(self, line: bytes) -> bool:
        """Write one line, waiting for the reader. Returns False if it cannot be written."""
        # After a line that a full disk cut off, a line break keeps the next line intact.
        data = b"\n" + line if self._torn else line
        if self._fd is not None:
            left_bytes = _write_all(self._fd, data)
            if left_bytes < len(data):
                self._torn = left_bytes > 0
            return not left_bytes
        try:
            if self._stream is not None:
                self._stream.write(data.decode("utf-8"))
                self._stream.flush()
        except (OSError, ValueError):  # ValueError for a closed stream
            return False
        return self._stream is not None


def _write_all(fd: int, data: bytes) -> int:
    """Write to a descriptor that may be non-blocking, because another process that shares it may have made it so.

    Returns the number of bytes that could not be written (EPIPE, ENOSPC, EIO).
    """
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            writable = select.poll()
            writable.register(fd, select.POLLOUT)
            writable.poll(RETRY_MS)
        except OSError:
            break
    return len(data)


def _fd_of(stream: TextIO | None) -> int | None:
    """Return the descriptor of a stream. Writing to it needs no lock for which the end of the process would wait."""
    if stream is None:  # stderr was closed when the process was started
        return None
    try:
        stream.flush()
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _own_end_of_pipe(fd: int) -> int | None:
    """Return another, non-blocking descriptor of a pipe, or None for anything else.

    The flag cannot be set on `fd` itself, because other processes may share it. Without permission to open the pipe, as
    in a container whose user did not create it, all lines are written by the thread.
    """
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        pass
    return None
