"""Reading of configured files without blocking, and detection of files that were replaced or rewritten.

Opening a FIFO, a device or a socket could block the event loop, and reading it might never end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

FileFingerprint = tuple[int, int, int, int, int]


def read_regular(path: str | Path, limit_bytes: int) -> bytes:
    """Return the content of a regular file. Symbolic links are followed.

    Raises `OSError` if the file cannot be read, is not a regular file, or is larger than `limit_bytes`. Raises
    `ValueError` if `path` contains a null byte. `reason` converts both to text.
    """
    require_regular(path)
    # The file may have been replaced since the check. So opening must not wait for the writer of a FIFO (O_NONBLOCK),
    # nor make a terminal the controlling one of this process (O_NOCTTY).
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(descriptor, "rb") as file:
        _check(os.fstat(descriptor))
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes")
    return data


def require_regular(path: str | Path) -> None:
    """Raise `OSError` unless `path` is an existing regular file.

    Call this before a library opens a file by its name, for example the certificates that `ssl` loads.
    """
    _check(Path(path).stat())


def reason(error: OSError | ValueError) -> str:
    """Return the reason why a file could not be read, without its name or content."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "not a path"


def _check(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def fingerprint(path: str | Path) -> FileFingerprint:
    """Return a value that changes with every write to a file, every replacement of it, and its permissions.

    Raises `OSError`.
    """
    found = Path(path).stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def fingerprints(paths: Iterable[str | Path]) -> tuple[FileFingerprint, ...]:
    """Return the fingerprints of several files. Raises `OSError` if one is missing."""
    return tuple(map(fingerprint, paths))


class FileWatcher:
    """Watcher of named files, some of which may have no path.

    A missing file counts as unchanged, because it may be about to be replaced. One that is back counts as changed,
    because it may have been read in vain meanwhile.
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
            self._seen[name] = now
        return changed
