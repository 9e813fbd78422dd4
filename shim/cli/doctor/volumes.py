"""Kind of the volume that holds a path, according to the kernel's list of mounts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath


class Kind(Enum):
    """Durability of files on a volume."""

    DISK = "disk"
    MEMORY = "memory"  # lost with the machine, or with the mount
    CONTAINER = "container"  # the container's own layer: lost when the container is replaced
    EMPTY_DIR = "emptyDir"  # lost with the pod
    NETWORK = "network"


_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_CONTAINER = frozenset({"overlay", "aufs", "fuse-overlayfs", "fuse.fuse-overlayfs"})
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "afs", "virtiofs"})
_ESCAPE = re.compile(r"\\([0-7]{3})")


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
