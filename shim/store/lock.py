"""One process to a database: each delivers what it finds, so two would deliver every command twice."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from shim.errors import StoreError
from shim.store.files import LOCK_SUFFIX, create, sidecar_path

# File systems that know no such lock say so in one of these ways; there two processes are not told apart.
_UNKNOWN = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
_NO_LOCKS = "the file system of store.path knows no locks: no other agent-shim may use this database"
# A byte that SQLite never locks: it uses 512 of them from the first GiB on.
_LOCKED_BYTE = 2**62
_FLOCK = "hhqqi4x"


class StoreLock:
    """Two exclusive locks, given up by the kernel when the process ends, however it ends.

    The one on a file beside the database also keeps two processes from creating the database at the same time. The one
    on the database's own inode holds whatever name the database was opened by (a symbolic link, a hard link, a mount
    of its directory elsewhere), and when somebody has removed the file beside it. It is a lock of the open file, while
    SQLite's own locks belong to the process: neither concerns the other. But closing any descriptor of the database
    drops SQLite's locks, so this one is closed after SQLite has closed its own, or never.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside: int | None = None
        self._database: int | None = None

    def acquire(self) -> tuple[str, ...]:
        """Lock the file beside the database, or raise `StoreError` at once. Return warnings. Raises `OSError`.

        Idempotent, as `acquire_database` is.
        """
        if self._beside is not None:
            return ()
        path = sidecar_path(self._path, LOCK_SUFFIX)
        create(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            return _failed(error)
        self._beside = descriptor
        return ()

    def acquire_database(self) -> tuple[str, ...]:
        """Lock the database itself, which must exist, before SQLite opens it. As `acquire` otherwise."""
        if self._database is not None or not hasattr(fcntl, "F_OFD_SETLK"):
            return ()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_BYTE, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
        except OSError as error:
            # The descriptor stays open: it may be this process that has the database open under another name.
            return _failed(error)
        self._database = descriptor
        return ()

    def release_database(self) -> None:
        """Give up the lock on the database, which SQLite must have closed. Idempotent."""
        descriptor, self._database = self._database, None
        _close(descriptor)

    def release(self) -> None:
        """Give up both locks. Idempotent."""
        self.release_database()
        descriptor, self._beside = self._beside, None
        _close(descriptor)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _failed(error: OSError) -> tuple[str, ...]:
    if isinstance(error, BlockingIOError) or error.errno == errno.EACCES:
        raise StoreError("another agent-shim uses the database at store.path: each needs its own") from None
    if error.errno in _UNKNOWN:
        return (_NO_LOCKS,)
    raise error
