"""One process to a database: each delivers what it finds, so two would deliver every command twice."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from shim.errors import StoreError
from shim.store.files import companion, create

SUFFIX = ".lock"
# File systems that know no such lock say so in one of these ways; there two processes are not told apart.
_UNKNOWN = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class StoreLock:
    """An exclusive lock on a file beside the database; the kernel gives it up when its process ends, however it ends.

    Not on the database itself: closing any descriptor of that file would drop SQLite's own locks. The file stays where
    it is: whoever removed it could remove the one that another process has just locked.
    """

    def __init__(self, path: Path) -> None:
        self._path = companion(path, SUFFIX)
        self._descriptor: int | None = None

    def acquire(self) -> tuple[str, ...]:
        """Take the lock or raise `StoreError` at once. Returns warnings. Raises `OSError`. Idempotent."""
        if self._descriptor is not None:
            return ()
        create(self._path)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise StoreError("another agent-shim uses the database at store.path: each needs its own") from None
            if error.errno in _UNKNOWN:
                return ("the file system of store.path knows no locks: no other agent-shim may use this database",)
            raise
        self._descriptor = descriptor
        return ()

    def release(self) -> None:
        """Give it up. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)
