"""Writer of log lines in a thread of its own, so that a reader that stands still does not block the event loop."""

from __future__ import annotations

import os
import select
import stat
import threading
from collections import deque
from collections.abc import Callable
from typing import TextIO

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
        try:
            if self._stream is None:
                return False
            if self._fd is None:
                self._stream.write(data.decode("utf-8"))
                self._stream.flush()
            else:
                _write_all(self._fd, data)
        except _Torn:
            self._torn = True
            return False
        except (OSError, ValueError):  # EPIPE, ENOSPC, EIO; ValueError for a closed stream
            return False
        self._torn = False
        return True


class _Torn(Exception):
    """A line of which only a part could be written."""


def _write_all(fd: int, data: bytes) -> None:
    """Write to a descriptor that may be non-blocking, because another process that shares it may have made it so."""
    total = len(data)
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            writable = select.poll()
            writable.register(fd, select.POLLOUT)
            writable.poll(RETRY_MS)
        except OSError as error:
            if len(data) < total:
                raise _Torn from error
            raise


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
