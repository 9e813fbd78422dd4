"""Reader of configured files that never blocks: only regular files are opened.

Opening a FIFO, a device or a socket could block the event loop, and reading it might never end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


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
