"""doctor on this machine: ports, the store, and the volume that it lies on."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest

from shim.cli.doctor.host import Kind, volume_of
from tests.cli.doctor.conftest import Doctor
from tests.support.disks import fill, mounted
from tests.support.processes import Shim

NOWHERE = {"url": "http://127.0.0.1:9", "token": "canary-token"}


async def test_ports_that_are_taken_and_ports_that_cannot_be(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        found = await doctor.examine(
            listen={"port": taken}, admin={"host": "192.0.2.1", "port": 7090}, upstream=NOWHERE
        )
    found.expect("listen", "FAIL", "taken by another process", f":{taken}", "listen.port")
    found.expect("admin", "FAIL", "192.0.2.1", "admin.host")


async def test_the_vendors_port(doctor: Doctor) -> None:
    found = await doctor.examine(listen={"port": 8090}, upstream=NOWHERE)
    found.expect("listen", "WARN", "vendor's agent", "listen.port")


async def test_a_store_that_is_not_there_yet(doctor: Doctor) -> None:
    path = doctor.folder / "some" / "where" / "agent-shim.db"
    found = await doctor.examine(store={"path": str(path)}, upstream=NOWHERE)
    found.expect("store", "PASS", str(path), "can be made")
    assert not path.parent.exists(), "nothing is changed"
    assert [each.name for each in doctor.folder.iterdir()] == ["doctor.yaml"]


async def test_a_store_in_memory(doctor: Doctor) -> None:
    found = await doctor.examine(store={"path": ":memory:"}, upstream=NOWHERE)
    found.expect("store", "WARN", "nothing survives")


async def test_a_text_file_in_the_place_of_the_store(doctor: Doctor) -> None:
    path = doctor.folder / "settings.yaml"
    path.write_text("mode: websocket\n")
    found = await doctor.examine(store={"path": str(path)}, upstream=NOWHERE)
    found.expect("database", "FAIL", f"{path} is a text file", "-> give this shim a store.path of its own")
    assert path.read_text() == "mode: websocket\n"


async def test_a_store_where_nothing_can_be_written(doctor: Doctor) -> None:
    found = await doctor.examine(store={"path": "/sys/kernel/agent-shim.db"}, upstream=NOWHERE)
    found.expect("store", "FAIL", "cannot be written", "the user")
    assert found.code == 1


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


async def test_volumes_that_do_not_last_are_full_or_read_only(doctor: Doctor) -> None:
    folder = doctor.folder / "volume"
    folder.mkdir()
    store = {"path": str(folder / "agent-shim.db")}
    with mounted(folder) as works:
        if not works:
            pytest.skip("needs the right to mount")
        found = await doctor.examine(store=store, upstream=NOWHERE)
        found.expect("store", "PASS")
        found.expect("volume", "WARN", "in memory (tmpfs)", "on a disk")
        found.expect("space", "WARN", "MiB are free")
        fill(folder / "filler")
        found = await doctor.examine(store=store, upstream=NOWHERE)
        found.expect("store", "FAIL", "No space left", "make room")
        remount_read_only(folder)
        found = await doctor.examine(store=store, upstream=NOWHERE)
        found.expect("store", "FAIL", "Read-only", "read-only")


async def test_a_database_of_a_newer_version_and_one_that_is_in_use(doctor: Doctor, tmp_path: Path) -> None:
    database = tmp_path / "agent-shim.db"
    async with Shim(tmp_path, {"upstream": NOWHERE}) as shim:
        await shim.start()
        # its admin port is not where the configuration says, so all that can be seen is that somebody is at work
        found = await doctor.examine(admin={"port": 1}, upstream=NOWHERE)
        found.expect("store", "PASS", "can be written")
        found.expect("database", "WARN", "another agent-shim")
        assert await shim.stop() == 0
    found = await doctor.examine(upstream=NOWHERE)
    assert "database" not in found.findings
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE meta SET value = 99 WHERE key = 'min_reader_version'")
    before = database.read_bytes()
    found = await doctor.examine(upstream=NOWHERE)
    found.expect("database", "FAIL", "99", "newer version")
    assert database.read_bytes() == before


# --- mounts -----------------------------------------------------------------------------------------------------------

MOUNTS = r"""
27 1 0:20 / / rw,relatime - overlay overlay rw,lowerdir=/a,upperdir=/b
30 27 0:21 / /proc rw,nosuid - proc proc rw
41 27 8:1 /var/lib/kubelet/pods/6a/volumes/kubernetes.io~empty-dir/data /var/lib/shim rw - ext4 /dev/sda1 rw
42 27 8:1 /var/lib/kubelet/pods/6a/volumes/kubernetes.io~configmap/config /etc/shim ro,relatime - ext4 /dev/sda1 rw
43 27 0:50 / /data rw,relatime - tmpfs tmpfs rw,size=64k
44 43 8:16 / /data/disk\040two rw,relatime shared:1 - xfs /dev/sdb rw
45 27 0:51 / /net rw - nfs4 server:/export rw,vers=4.2
46 27 0:52 / /bucket rw - fuse.s3fs s3fs rw
47 27 0:53 / /locked rw - ext4 /dev/sdc ro
not a line
"""


@pytest.mark.parametrize(
    "path, kind, mount_point, read_only",
    [
        ("/app", Kind.CONTAINER, "/", False),
        ("/var/lib/shim", Kind.EMPTY_DIR, "/var/lib/shim", False),
        ("/var/lib/shimmer", Kind.CONTAINER, "/", False),
        ("/etc/shim/deep/er", Kind.DISK, "/etc/shim", True),
        ("/data/x", Kind.MEMORY, "/data", False),
        ("/data/disk two/x", Kind.DISK, "/data/disk two", False),
        ("/net/x", Kind.NETWORK, "/net", False),
        ("/bucket", Kind.NETWORK, "/bucket", False),
        ("/locked", Kind.DISK, "/locked", True),
    ],
)
def test_the_volume_of_a_path(path: str, kind: Kind, mount_point: str, read_only: bool) -> None:
    volume = volume_of(path, MOUNTS)
    assert (volume.kind, volume.mount_point, volume.read_only) == (kind, mount_point, read_only)


def test_without_mounts_there_is_no_warning() -> None:
    assert volume_of("/x", "").kind is Kind.DISK
