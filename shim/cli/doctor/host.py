"""Findings on this machine and its store: two ports, and a file or the database of `store.url`. Nothing is changed."""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from shim.cli.doctor.report import Finding, failed, passed, warned
from shim.cli.doctor.running_shim import RunningShim
from shim.cli.threads import within
from shim.config import settings
from shim.errors import ConfigError, StoreError, StoreVersionError
from shim.hosts import host_and_port, is_this_machine
from shim.store import advice, check_database, check_files

if TYPE_CHECKING:
    from shim.store.postgres.inspection import Inspection

RESOLVE_S = 5.0

VENDORS_PORTS = frozenset({8080, 8090})
LITTLE_BYTES = 64 * 1024 * 1024
NOTHING_BYTES = 1024 * 1024
MOUNTS = Path("/proc/self/mountinfo")
LOCKS = Path("/proc/locks")
_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_CONTAINER = frozenset({"overlay", "aufs", "fuse-overlayfs", "fuse.fuse-overlayfs"})
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "afs", "virtiofs"})
_ESCAPE = re.compile(r"\\([0-7]{3})")


class Kind(Enum):
    """Durability of files on a volume."""

    DISK = "disk"
    MEMORY = "memory"  # lost with the machine, or with the mount
    CONTAINER = "container"  # the container's own layer: lost when the container is replaced
    EMPTY_DIR = "emptyDir"  # lost with the pod
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Volume:
    """Mount that holds a path. `type` is the kernel's name of its file system."""

    mount_point: str
    type: str
    kind: Kind
    read_only: bool


def volume_of(path: str, mountinfo: str) -> Volume:
    """Return the volume of an absolute path without symbolic links; `mountinfo` as in proc(5)."""
    found = Volume("/", "?", Kind.DISK, read_only=False)
    target = PurePosixPath(path)
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if not dash or len(fields) < 6 or len(more) < 3:
            continue
        root, point = _plain(fields[3]), _plain(fields[4])
        if not target.is_relative_to(point) or len(point) < len(found.mount_point):
            continue
        read_only = "ro" in fields[5].split(",") or "ro" in more[2].split(",")
        found = Volume(point, more[0], _kind(more[0], root), read_only)
    return found


def _kind(file_system: str, root: str) -> Kind:
    if "kubernetes.io~empty-dir" in root:
        return Kind.EMPTY_DIR
    if file_system in _MEMORY:
        return Kind.MEMORY
    if file_system in _CONTAINER:
        return Kind.CONTAINER
    if file_system in _NETWORK or file_system.startswith("fuse."):
        return Kind.NETWORK
    return Kind.DISK


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), text)


_LASTS = {
    Kind.MEMORY: (
        "in memory ({type}): gone when the pod or the machine restarts",
        "put store.path on a disk: a volume of the pod",
    ),
    Kind.CONTAINER: (
        "in the container's own layer ({type}): gone when the container is replaced",
        "mount a volume and put store.path there",
    ),
    Kind.EMPTY_DIR: (
        "an emptyDir: it survives a container, and is gone with the pod",
        "a persistent volume keeps commands when the pod is replaced; agents are adopted again without it",
    ),
    Kind.NETWORK: (
        "a network file system ({type}): the write-ahead log works there for one machine only, and slowly",
        "a local disk, or a block volume",
    ),
}


# --- ports ------------------------------------------------------------------------------------------------------------


def examine_port(check: str, host: str, port: int, running: RunningShim) -> Finding:
    """Check that `host:port` can be bound; `check` is `listen` or `admin`, as in the configuration."""
    key = f"{check}.port"
    if port == 0:
        return passed(check, f"{key} is 0: any free port")
    where = host_and_port(host, port)
    reason = _bind(host, port)
    if reason == 0:
        if port in VENDORS_PORTS:
            return warned(check, f"{where} is free", f"the vendor's agent in the same pod needs {port}: change {key}")
        return passed(check, f"{where} is free")
    if reason == errno.EADDRINUSE:
        if running.holds(check, port):
            return passed(check, f"{where} is held by the running shim")
        todo = f"stop what listens there (ss -ltnp 'sport = :{port}'), or change {key}"
        return failed(check, f"{where} is taken by another process", todo)
    todo = f"an address of this machine in {check}.host"
    if reason == errno.EACCES:
        todo = f"ports below 1024 need a privilege: change {key}"
    return failed(check, f"{where} cannot be listened on: {os.strerror(reason) if reason else '?'}", todo)


def _bind(host: str, port: int) -> int:
    """Try to bind; return the error number, or 0 on success."""
    try:
        found = within(
            RESOLVE_S, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        )
    except OSError:
        return errno.EADDRNOTAVAIL
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                return error.errno or errno.EADDRNOTAVAIL
    return 0


# --- the store --------------------------------------------------------------------------------------------------------


def examine_store(store: settings.Store, running: RunningShim) -> Iterator[Finding]:
    """Check that the store's file can be written, and find out how long its contents last."""
    if store.path == ":memory:":
        yield warned("store", "in memory: nothing survives the process", "give store.path a file on a disk")
        return
    path = Path(store.path).absolute()
    place = _existing(path.parent)
    volume = _volume(place)
    try:
        check_files(path)
        yield _writable(path, place, volume)
    except StoreError as error:
        yield failed("store", str(error), "put store.path on a file of its own: it is made where there is none")
        return
    except OSError as error:
        yield failed("store", f"{path} cannot be written: {os.strerror(error.errno or errno.EIO)}", advice(error, path))
        return
    yield from _contents(path, running)
    yield from _space(place)
    if volume.kind in _LASTS:
        text, todo = _LASTS[volume.kind]
        yield warned("volume", text.format(type=volume.type), todo)
    else:
        yield passed("volume", f"on a disk ({volume.type}, mounted at {volume.mount_point})")


def _existing(directory: Path) -> Path:
    """Return the directory, or its nearest existing parent: the shim creates missing ones."""
    return next(each for each in (directory, *directory.parents) if each.exists())


def _volume(place: Path) -> Volume:
    try:
        return volume_of(str(place.resolve()), MOUNTS.read_text())
    except OSError:
        return Volume("?", "?", Kind.DISK, read_only=False)


def _writable(path: Path, place: Path, volume: Volume) -> Finding:
    """Write and sync a file beside the database, which itself is only opened. Raises `OSError`."""
    if volume.read_only:
        raise OSError(errno.EROFS, "read-only")
    with tempfile.TemporaryFile(dir=place) as probe:
        probe.write(b"agent-shim doctor\n")
        probe.flush()
        os.fsync(probe.fileno())
    if path.exists():
        path.open("r+b").close()
        return passed("store", f"{path} can be written")
    return passed("store", f"{path} can be made")


def _contents(path: Path, running: RunningShim) -> Iterator[Finding]:
    if not path.exists():
        return
    try:
        check_database(path)
    except (StoreError, OSError) as error:
        newer = "run the newer version, or " if isinstance(error, StoreVersionError) else ""
        todo = f"{newer}give this shim a store.path of its own"
        yield failed("database", str(error), todo)
        return
    if not running.answers and _locked(path):
        todo = "each shim needs its own store.path; or the running one's admin port is not where --config says"
        yield warned("database", "another agent-shim uses it", todo)


def _locked(path: Path) -> bool:
    """Return True if a process holds the store's lock, according to the kernel's list.

    Trying the lock could prevent a shim from starting. The lock is on the database file itself; SQLite's own locks on
    it are of another kind.
    """
    try:
        database = path.stat()
        held = LOCKS.read_text().splitlines()
    except OSError:
        return False
    inode = f" {os.major(database.st_dev):02x}:{os.minor(database.st_dev):02x}:{database.st_ino} "
    return any(" OFDLCK " in line and inode in line for line in held)


def _space(place: Path) -> Iterator[Finding]:
    room = os.statvfs(place)
    free_bytes = room.f_bavail * room.f_frsize
    text = f"{free_bytes // (1024 * 1024)} MiB are free"
    if free_bytes < NOTHING_BYTES:
        yield failed("space", text, "make room: commands and results cannot be stored")
    elif free_bytes < LITTLE_BYTES:
        yield warned("space", text, "make room: a full disk rejects commands")


# --- the database of `store.url` --------------------------------------------------------------------------------------

NEWEST = 18
SLOW_S = 0.1
_PAGE = "docs/how-to/several-replicas.md#the-database"


def examine_database(store: settings.Store) -> Iterator[Finding]:
    """Connect as the shim does, and yield what stands between it and its store. Nothing is changed."""
    try:
        from shim.store.postgres import inspection
    except ModuleNotFoundError as error:
        text = f"store.url needs agent-shim[postgres]: {error.name} is not installed"
        yield failed("store", text, "pip install 'agent-shim[postgres]'; the image has it")
        return
    try:
        found = inspection.inspect(store)
    except (StoreError, ConfigError) as error:
        yield failed("store", str(error), f"{_PAGE} says what the database must be")
        return
    yield _way(found)
    yield _version(found)
    yield _rights(found)
    yield _commit(found, inspection.PATIENCE_S)
    yield _replication(found)


def _way(found: Inspection) -> Finding:
    where = f"database {found.database} on {found.host}:{found.port}"
    if found.encrypted:
        return passed("store", f"{where}, over TLS")
    if is_this_machine(found.host):
        return passed("store", f"{where}, on this machine without TLS")
    return warned("store", f"{where}, without TLS", "take store.allow_insecure away: commands can be read on the way")


def _version(found: Inspection) -> Finding:
    if found.version > NEWEST:
        return warned(
            "database", f"PostgreSQL {found.version} is newer than this shim", f"14 to {NEWEST} are supported"
        )
    schema = f"schema version {found.schema}" if found.schema else "no schema yet: the shim makes it"
    return passed("database", f"PostgreSQL {found.version}, {schema}")


def _rights(found: Inspection) -> Finding:
    if found.may_write:
        return passed("rights", "the user may make and write the schema agent_shim")
    todo = "GRANT CREATE ON DATABASE to it, or make a schema agent_shim that this user owns, with all tables in it"
    return failed("rights", "the user may not make or write the schema agent_shim", todo)


def _commit(found: Inspection, patience_s: float) -> Finding:
    if found.commit_s >= patience_s:
        text = f"a commit did not end in {patience_s:g} s: it waits for a standby ({found.synchronous_names})"
        todo = "start the standby, or take it out of synchronous_standby_names: until then no command is stored"
        return failed("commit", text, todo)
    text = f"a commit takes {found.commit_s * 1000:.1f} ms"
    if found.commit_s > SLOW_S:
        return warned("commit", text, "each command waits for one: a database near by, on faster disks")
    return passed("commit", text)


def _replication(found: Inspection) -> Finding:
    if found.synchronous_names:
        return passed("replication", f"commits wait for standbys: {found.synchronous_names}")
    if found.standbys:
        text = f"servers that replicate from it: {found.standbys}; no commit waits for them"
        todo = "a failover loses acknowledged commands: name a standby in synchronous_standby_names"
        return warned("replication", text, todo)
    return passed("replication", "no standby: what is acknowledged is on one server's disk")
