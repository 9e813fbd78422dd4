"""Incremental reader of HTTP/1.1 replies from another replica, without I/O (RFC 9112)."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD_BYTES = 65_536
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})(?: [^\r\n]*)?\Z")
_BODILESS = frozenset({204, 304})


class ReplyError(Exception):
    """The peer's bytes are no HTTP reply."""


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """Status and headers of a reply. `length` is the size of its body, `None` if only its end shows it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    length: int | None

    def header(self, name: str) -> str | None:
        """Return the first header of this (lower-case) name."""
        return next((value for each, value in self.headers if each.lower() == name), None)


class ReplyReader:
    """Reader of one reply. `head` is set and `done` becomes true in the course of `feed`."""

    __slots__ = ("_buffer", "_chunked", "_head_only", "_left", "done", "head", "until_close")

    def __init__(self, *, head_only: bool = False) -> None:
        """Create a reader. `head_only` is true for the reply to a HEAD request, which never has a body."""
        self._buffer = bytearray()
        self._head_only = head_only
        self._chunked = False
        self._left = 0
        self.head: ReplyHead | None = None
        self.done = False
        self.until_close = False

    @property
    def rest(self) -> bytes:
        """The bytes after the end of the reply."""
        return bytes(self._buffer) if self.done else b""

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes and return the complete pieces of the body. Raises `ReplyError`."""
        self._buffer += data
        if self.head is None and not self._read_head():
            return []
        if self.done:
            return []
        if self.until_close:
            return self._all()
        return self._chunks() if self._chunked else self._counted()

    def closed(self) -> bool:
        """Record that the peer closed the connection. Returns True if the reply is complete."""
        self.done = self.done or self.until_close
        return self.done

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD_BYTES:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ReplyError("the head is too long")
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        match = _STATUS.match(first)
        if match is None:
            raise ReplyError("no status line")
        status = int(match[1])
        headers = []
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise ReplyError("a malformed header")
            headers.append((name.decode("latin-1"), value.strip().decode("latin-1")))
        self._frame(status, tuple(headers))
        return True

    def _frame(self, status: int, headers: tuple[tuple[str, str], ...]) -> None:
        found = {name.lower(): value for name, value in headers}
        self._chunked = found.get("transfer-encoding", "").lower() == "chunked"
        length = found.get("content-length")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise ReplyError("a malformed length")
        if self._head_only or status in _BODILESS:
            size: int | None = 0
            self._chunked = False
            self.done = True
        elif self._chunked:
            size = None
        else:
            size = int(length) if length is not None else None
            self.until_close = size is None
            self._left = size or 0
            self.done = size == 0
        self.head = ReplyHead(status, headers, size)

    def _all(self) -> list[bytes]:
        piece = bytes(self._buffer)
        self._buffer.clear()
        return [piece] if piece else []

    def _counted(self) -> list[bytes]:
        piece = bytes(self._buffer[: self._left])
        del self._buffer[: len(piece)]
        self._left -= len(piece)
        self.done = self._left == 0
        return [piece] if piece else []

    def _chunks(self) -> list[bytes]:
        pieces = []
        while not self.done:
            if self._left:  # the rest of a chunk, and the line end behind it
                if len(self._buffer) < self._left:
                    break
                pieces.append(bytes(self._buffer[: self._left - 2]))
                del self._buffer[: self._left]
                self._left = 0
            end = self._buffer.find(b"\r\n")
            if end < 0:
                break
            try:
                size = int(bytes(self._buffer[:end]).partition(b";")[0], 16)
            except ValueError:
                raise ReplyError("a malformed chunk") from None
            if size == 0:
                if len(self._buffer) < end + 4:
                    break
                del self._buffer[: end + 4]
                self.done = True
            else:
                del self._buffer[: end + 2]
                self._left = size + 2
        return [piece for piece in pieces if piece]
