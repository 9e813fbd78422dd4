"""Files of a SQLite database: created with mode 0600, renamed when corrupt, locked against a second process."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from shim.errors import StoreError

SIDECAR_SUFFIXES = ("-wal", "-shm")
LOCK_SUFFIX = ".lock"
# Checking the files before every commit would add a tenth to the cost of committing one command. Data stored between a
# replacement of the files and the next check is lost at the next restart, as is everything in the replaced files.
CHECK_INTERVAL_S = 0.05
_HEADER = b"SQLite format 3\x00"
_TEXT_BYTES = 1 << 20


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def require_regular(path: Path) -> None:
    """Raise `StoreError` if `path` exists and is not a regular file; follows symbolic links. Raises `OSError`.

    SQLite would block on a FIFO, and would treat a device as a corrupt database.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "")
        if kind:
            raise StoreError(f"store.path must name a regular file, or none yet: {path} is {kind}")


def require_regular_files(path: Path) -> None:
    """Raise `StoreError` if the database or a file beside it exists and is not a regular file. Raises `OSError`."""
    for each in (path, *(sidecar_path(path, suffix) for suffix in (*SIDECAR_SUFFIXES, LOCK_SUFFIX))):
        require_regular(each)


def sidecar_path(path: Path, suffix: str) -> Path:
    """Return the path of the database with `suffix` appended to the file name."""
    return path.with_name(path.name + suffix)


def advice(error: OSError, path: Path) -> str:
    """Return a hint on how to solve `error` for a database file at `path`."""
    match error.errno:
        case errno.EROFS:
            return "the file system is read-only: mount a volume that is not, or put store.path elsewhere"
        case errno.EACCES | errno.EPERM:
            return f"the user {os.geteuid()} needs to write there (fsGroup, or chown of {path.absolute().parent})"
        case errno.ENOSPC | errno.EDQUOT:
            return "make room: the disk, or the quota, is full"
        case errno.EISDIR:
            return "name a file in that directory"
    return "put store.path on a directory that can be written"


def prepare_directory(path: Path) -> tuple[str, ...]:
    """Create the directory of `path` and its missing parents with mode 0700. Returns warnings. Raises `OSError`."""
    missing = []
    directory = path.absolute().parent
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
    mode = path.absolute().parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return ("the directory of store.path can be written by everyone: others may replace the database",)
    return ()


def create(path: Path) -> None:
    """Create an empty file with mode 0600, whatever the umask, unless `path` exists. Raises `OSError`.

    SQLite gives `-wal` and `-shm` the mode of the database.
    """
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)


def make_private(path: Path) -> None:
    """Remove the permissions of group and others from the database files. Skip files of another user."""
    for each in (path, *(sidecar_path(path, suffix) for suffix in SIDECAR_SUFFIXES)):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            mode = stat.S_IMODE(each.stat().st_mode)
            if mode & 0o077:
                each.chmod(mode & 0o700)


def foreign_owner_warnings(path: Path) -> tuple[str, ...]:
    """Return a warning if the database belongs to another user, who can read it. Raises `OSError`."""
    if path.stat().st_uid == os.geteuid():
        return ()
    return ("the database belongs to another user, who can read the commands in it",)


def has_bad_header(path: Path) -> bool:
    """Return whether the file does not begin like a SQLite database. Raises `OSError`.

    The check protects data, because SQLite overwrites some files that are no databases. A file of one byte passes:
    SQLite makes such files itself, as a workaround for a file system. SQLite treats an empty file as new and deletes
    the log beside it. But a log is only ever started after the first page was written, so an empty file beside a log
    has lost its content and fails the check.
    """
    with path.open("rb") as file:
        head = file.read(len(_HEADER))
    return (len(head) > 1 and head != _HEADER) or (not head and has_log(path))


def require_no_text(path: Path) -> None:
    """Raise `StoreError` if the file is a text: it was never a database, and may be needed elsewhere. Raises `OSError`.

    Every database contains NUL characters. A text beside a log is not meant: it has taken the place of a database.
    """
    with path.open("rb") as file:
        head = file.read(_TEXT_BYTES)
    if len(head) < 2 or b"\x00" in head or has_log(path):
        return
    with contextlib.suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _TEXT_BYTES)
        raise StoreError(f"store.path must name a database, or no file yet: {path} is a text file")


def is_truncated(path: Path, page_bytes: int) -> bool:
    """Return whether the last page is incomplete. Raises `OSError`.

    SQLite would read the missing bytes as zeros. With a write-ahead log the file may end anywhere, because SQLite
    recovers the page from the log.
    """
    return path.stat().st_size % page_bytes != 0 and not has_log(path)


def has_log(path: Path) -> bool:
    """Return whether a write-ahead log exists and is not empty. Raises `OSError`."""
    wal = sidecar_path(path, "-wal")
    return wal.exists() and wal.stat().st_size > 0


def move_aside(path: Path) -> Path:
    """Rename a database and its `-wal` and `-shm` files to `<path>.corrupt-<n>`. Raises `OSError`.

    Returns the new path. No existing file is overwritten.
    """
    number = 1
    while True:
        target = sidecar_path(path, f".corrupt-{number}")
        taken = any(os.path.lexists(sidecar_path(target, suffix)) for suffix in SIDECAR_SUFFIXES)
        if not taken and _reserve(target):
            break
        number += 1
    for suffix in SIDECAR_SUFFIXES:
        with contextlib.suppress(FileNotFoundError):
            sidecar_path(path, suffix).replace(sidecar_path(target, suffix))
    return path.replace(target)


def _reserve(target: Path) -> bool:
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True


class ReplacedError(StoreError):
    """A file of the open database was removed or replaced. Data written now would be lost at the next restart."""


class OpenFiles:
    """Identity (device and inode) of the files of an open database, to detect that they were replaced."""

    def __init__(self, path: Path, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._checked_at = -CHECK_INTERVAL_S
        self._path = str(path)
        self._log_path = str(sidecar_path(path, "-wal"))
        self._database = _identity(path.stat())
        self._log: tuple[int, int] | None = None

    def check(self) -> int | None:
        """Check the files and return the size of the write-ahead log in bytes.

        Returns `None` without a check if the last successful one is less than `CHECK_INTERVAL_S` old. Raises
        `ReplacedError`, `OSError`.
        """
        now = self._monotonic()
        if now - self._checked_at < CHECK_INTERVAL_S:
            return None
        log_bytes = self._log_bytes()
        self._checked_at = now
        return log_bytes

    def _log_bytes(self) -> int:
        try:
            database = os.stat(self._path)  # noqa: PTH116 - half the cost of a path's own
            log = os.stat(self._log_path)  # noqa: PTH116 - as above
        except FileNotFoundError as error:
            raise ReplacedError(f"{error.filename} was removed while it was in use: {_REMEDY}") from None
        if self._log is None:
            self._log = _identity(log)
        if _identity(database) != self._database or _identity(log) != self._log:
            raise ReplacedError(f"another file has taken the place of {self._path}: {_REMEDY}")
        return log.st_size


_REMEDY = "put the right one back, or restart agent-shim to go on with what is there"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


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
