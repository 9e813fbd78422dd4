"""Detect replaced files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FileFingerprint = tuple[int, int, int, int]


def fingerprint(path: str | Path) -> FileFingerprint:
    """What tells a file's content from another's: it changes with every write and every swap. Raises `OSError`."""
    found = Path(path).stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def fingerprints(paths: Iterable[str | Path]) -> tuple[FileFingerprint, ...]:
    """The marks of several files. Raises `OSError` when one is missing."""
    return tuple(map(fingerprint, paths))


class FileWatcher:
    """Files by name, some of which may have no path. A missing file is no change: it may be in the middle of a swap."""

    def __init__(self) -> None:
        self._seen: dict[str, FileFingerprint | None] = {}

    def changed(self, files: dict[str, str | None]) -> set[str]:
        """The names whose files are others than at the last look; nothing at the first."""
        changed = set()
        for name, path in files.items():
            if not path:
                continue
            try:
                now: FileFingerprint | None = fingerprint(path)
            except OSError:
                now = None
            if now is not None and self._seen.get(name, now) != now:
                changed.add(name)
            if now is not None or name not in self._seen:
                self._seen[name] = now
        return changed
