"""A small file system of a test's own: it can be filled to the last byte without hurting anybody."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIZE_MIB = 48


@contextmanager
def mounted(folder: Path, size_mib: int = SIZE_MIB) -> Iterator[bool]:
    """Mount a tmpfs there while the block lasts. Yields False where that is not permitted: the folder is as it was."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A mounted folder cannot be written while the block lasts; nobody may have a file of it open."""
    _remount(folder, "ro")
    try:
        yield
    finally:
        _remount(folder, "rw")


def _remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], capture_output=True, check=True)


def permitted(folder: Path) -> bool:
    """Return True if `mounted` works here."""
    with mounted(folder, 1) as works:
        return works


def fill(filler: Path) -> None:
    """Write until nothing more fits."""
    with filler.open("wb", buffering=0) as file:
        for size_bytes in (1 << 20, 4096, 64, 1):
            with suppress(OSError):
                while file.write(bytes(size_bytes)) == size_bytes:
                    pass
