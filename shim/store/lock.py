"""Lock that keeps a second process from using a database: two would deliver every command twice."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from shim.errors import StoreError
from shim.store.files import LOCK_SUFFIX, create, sidecar_path

# Errors of file systems without such locks. There a second process cannot be detected.
_UNKNOWN = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
_NO_LOCKS = "the file system of store.path knows no locks: no other agent-shim may use this database"
# An offset that SQLite never locks: its own locks are on 512 bytes from the first GiB on.
_LOCKED_BYTE = 2**62
_FLOCK = "hhqqi4x"


class StoreLock:
    """Two exclusive locks, which the kernel releases when the process ends, however it ends.

    The lock on a file beside the database also keeps two processes from creating the database at the same time. The
    lock on the inode of the database works under any name of the file (a symbolic link, a hard link, another mount of
    its directory), and after the file beside it was removed. The inode's lock belongs to the open file description,
    SQLite's own locks to the process, so these do not conflict. But closing any descriptor of the database releases
    SQLite's locks: the descriptor of this lock is closed after SQLite has closed its own, or never.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside: int | None = None
        self._database: int | None = None

    def acquire(self) -> tuple[str, ...]:
        """Lock the file beside the database and return warnings. Idempotent.

        Raises `StoreError` without waiting if another process holds the lock, and `OSError`.
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
        """Lock the database file itself and return warnings. Idempotent.

        The file must exist, and SQLite must not have opened it yet. Raises `StoreError`, `OSError` as `acquire` does.
        """
        if self._database is not None or not hasattr(fcntl, "F_OFD_SETLK"):
            return ()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_BYTE, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
        except OSError as error:
            # Leave the descriptor open. If this process has the database open under another name, closing would release
            # SQLite's locks.
            return _failed(error)
        self._database = descriptor
        return ()

    def release_database(self) -> None:
        """Release the lock on the database file. SQLite must have closed the database. Idempotent."""
        descriptor, self._database = self._database, None
        _close(descriptor)

    def release(self) -> None:
        """Release both locks. Idempotent."""
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
