"""The files of a database: created for our eyes only, and moved aside when they are beyond repair."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from shim.errors import StoreError

SIDECAR_SUFFIXES = ("-wal", "-shm")
LOCK_SUFFIX = ".lock"
# A check of an open database's files before every commit would cost a tenth of a commit of one command. What is stored
# between a replacement and the next check is lost with the next restart, as is all that was stored before it.
CHECK_INTERVAL_S = 0.05
_HEADER = b"SQLite format 3\x00"


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def require_regular(path: Path) -> None:
    """Raise `StoreError` where `path` exists and is no regular file, symbolic links followed. Raises `OSError`.

    SQLite would wait for the other end of a FIFO, and take any device for a damaged database.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "")
        if kind:
            raise StoreError(f"store.path must name a regular file, or none yet: {path} is {kind}")


def require_regular_files(path: Path) -> None:
    """Raise `StoreError` where the database or a companion exists and is no regular file. Raises `OSError`."""
    for each in (path, *(sidecar_path(path, suffix) for suffix in (*SIDECAR_SUFFIXES, LOCK_SUFFIX))):
        require_regular(each)


def sidecar_path(path: Path, suffix: str) -> Path:
    """The file beside a database that SQLite names by appending `suffix`."""
    return path.with_name(path.name + suffix)


def advice(error: OSError, path: Path) -> str:
    """Return what a person can do about a database file at `path` that cannot be used."""
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
    """Make the directory of `path`, with missing parents, mode 0700. Returns warnings. Raises `OSError`."""
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
    """Create an empty database file, mode 0600 whatever the umask, unless there is one. Raises `OSError`.

    SQLite gives `-wal` and `-shm` the mode of the database.
    """
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)


def make_private(path: Path) -> None:
    """Take from others what an older file grants them. Left as it is where the file belongs to somebody else."""
    for each in (path, *(sidecar_path(path, suffix) for suffix in SIDECAR_SUFFIXES)):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            mode = stat.S_IMODE(each.stat().st_mode)
            if mode & 0o077:
                each.chmod(mode & 0o700)


def foreign_owner_warnings(path: Path) -> tuple[str, ...]:
    """A warning where the database belongs to another user, who can read what is in it. Raises `OSError`."""
    if path.stat().st_uid == os.geteuid():
        return ()
    return ("the database belongs to another user, who can read the commands in it",)


def has_bad_header(path: Path) -> bool:
    """Whether the file does not begin as a database does; SQLite begins a new one over some of these. Raises `OSError`.

    A file of one byte is its own workaround for a file system. An empty one it takes for new, and deletes the log that
    lies beside it; but a log is begun only when the file has its first page.
    """
    with path.open("rb") as file:
        head = file.read(len(_HEADER))
    return (len(head) > 1 and head != _HEADER) or (not head and has_log(path))


def is_truncated(path: Path, page_bytes: int) -> bool:
    """Whether the last page is cut, of which SQLite reads the missing end as zeros. Raises `OSError`.

    While there is a log to recover it from, the file may end anywhere.
    """
    return path.stat().st_size % page_bytes != 0 and not has_log(path)


def has_log(path: Path) -> bool:
    """Whether a write-ahead log may hold more than the database itself. Raises `OSError`."""
    wal = sidecar_path(path, "-wal")
    return wal.exists() and wal.stat().st_size > 0


def move_aside(path: Path) -> Path:
    """Move a database with its companions to `<path>.corrupt-<n>`, never over another file. Raises `OSError`."""
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
    """Another file has taken the place of an open one: what is written now would be lost with the next restart."""


class OpenFiles:
    """The files of an open database, as they were when it was opened."""

    def __init__(self, path: Path, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._checked_at = -CHECK_INTERVAL_S
        self._path = str(path)
        self._log_path = str(sidecar_path(path, "-wal"))
        self._database = _identity(path.stat())
        self._log: tuple[int, int] | None = None

    def check(self) -> int | None:
        """Return the size of the write-ahead log, `None` if the last check is not `CHECK_INTERVAL_S` old.

        A check that fails is repeated by the next call. Raises `ReplacedError`, `OSError`.
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
