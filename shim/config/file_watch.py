"""Detection of replaced or rewritten files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FileFingerprint = tuple[int, int, int, int]


def fingerprint(path: str | Path) -> FileFingerprint:
    """Return a value that changes with every write to a file and every replacement of it. Raises `OSError`."""
    found = Path(path).stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def fingerprints(paths: Iterable[str | Path]) -> tuple[FileFingerprint, ...]:
    """Return the fingerprints of several files. Raises `OSError` if one is missing."""
    return tuple(map(fingerprint, paths))


class FileWatcher:
    """Watcher of named files, some of which may have no path.

    A missing file counts as unchanged, because it may be about to be replaced.
    """

    def __init__(self) -> None:
        self._seen: dict[str, FileFingerprint | None] = {}

    def changed(self, files: dict[str, str | None]) -> set[str]:
        """Return the names whose file changed since the previous call.

        The first call for a name only records its file.
        """
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
