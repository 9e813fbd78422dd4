"""The history as a file with one JSON object a line, which a `kill -9` does not lose."""

from __future__ import annotations

import json
import mmap
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any

import msgspec


class HistoryFile:
    """Append-only file of events.

    A line has reached the operating system when `write` returns: the end of this process loses none, the end of the
    machine may. Several runs may append to one file.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises `OSError`."""
        self.last_n = _last_n(path)
        self._file = append_lines(path)

    def write(self, event: dict[str, Any]) -> None:
        """Append one event. Raises `OSError`."""
        self._file.write(msgspec.json.encode(event) + b"\n")

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


def append_lines(path: Path) -> FileIO:
    """Open a file for unbuffered appending, and terminate the incomplete last line of a run that was killed."""
    file = path.open("ab+", buffering=0)
    if file.tell():
        file.seek(-1, SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _last_n(path: Path) -> int:
    """Return the number of the last complete event of the file, or 0."""
    if not path.exists() or not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n")
        while end > 0:
            start = content.rfind(b"\n", 0, end) + 1
            try:
                return int(json.loads(content[start:end])["n"])
            except (ValueError, KeyError, TypeError):
                end = start - 1
    return 0
