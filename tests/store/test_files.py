"""Opening what lies on the disk: new, ours, somebody else's, newer, damaged, or not to be had."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from shim.core.records import StoreContents
from shim.errors import StoreError, StoreVersionError
from shim.store import check_database, schema
from tests.support.stores import Stores, put

SOME_COMMANDS = 300
ROOT = Path(__file__).parents[2]


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def hashes(directory: Path) -> dict[str, str]:
    """What is in a directory, the lock apart, which says nothing of a database."""
    found = (each for each in directory.iterdir() if each.suffix != ".lock")
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in found}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_the_files_are_ours_alone_whatever_the_umask(
    stores: Stores, path: Path, umask: Callable[[int], object], mask: int
) -> None:
    umask(mask)
    client, _ = stores.open(path)
    client.run(put("1"))
    umask(0o022)
    files = {each.name: mode(each) for each in path.parent.iterdir()}
    client.close()
    assert files == {"shim.db": 0o600, "shim.db-wal": 0o600, "shim.db-shm": 0o600, "shim.db.lock": 0o600}


def test_missing_directories_are_made_for_us_alone(
    stores: Stores, tmp_path: Path, umask: Callable[[int], object]
) -> None:
    umask(0)
    assert stores.loaded(tmp_path / "a" / "b" / "shim.db").warnings == ()
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]


def test_an_older_file_that_others_could_read_is_made_private(stores: Stores, path: Path) -> None:
    stores.fill(path, SOME_COMMANDS)
    path.chmod(0o644)
    stores.loaded(path)
    assert mode(path) == 0o600


@pytest.mark.parametrize("bits, warned", [(0o777, True), (0o1777, False), (0o750, False)])
def test_a_directory_that_everybody_can_write_is_warned_about(
    stores: Stores, tmp_path: Path, bits: int, warned: bool
) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(bits)
    warnings = stores.loaded(directory / "shim.db").warnings
    assert bool(warnings) == warned
    assert all("store.path" in warning for warning in warnings)


def test_a_path_with_every_odd_character_is_a_path(stores: Stores, tmp_path: Path) -> None:
    path = tmp_path / "a ?#%20'ü" / "x?mode=ro&.db"
    stores.fill(path, SOME_COMMANDS)
    assert len(stores.loaded(path).commands) == SOME_COMMANDS
    assert hashes(path.parent).keys() == {path.name}


def test_an_empty_file_becomes_a_database(stores: Stores, path: Path) -> None:
    path.touch()
    loaded = stores.loaded(path)
    assert (loaded.moved_aside, len(loaded.key)) == ("", 32)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# --- versions ---------------------------------------------------------------------------------------------------------


def make_newer(path: Path, min_reader_version: int) -> None:
    change(
        path,
        f"UPDATE meta SET value = {min_reader_version} WHERE key = 'min_reader_version'",  # noqa: S608
        f"PRAGMA user_version = {schema.SCHEMA_VERSION + 3}",
    )


def test_a_newer_database_is_left_untouched(stores: Stores, path: Path) -> None:
    stores.fill(path, SOME_COMMANDS)
    make_newer(path, schema.SCHEMA_VERSION + 1)
    path.chmod(0o640)
    before = hashes(path.parent)
    for _ in range(2):
        with pytest.raises(StoreVersionError, match=f"schema version {schema.SCHEMA_VERSION + 1}"):
            stores.open(path)
    assert hashes(path.parent) == before
    assert mode(path) == 0o640


def test_a_newer_database_that_was_not_closed_is_left_untouched(stores: Stores, path: Path, tmp_path: Path) -> None:
    stores.fill(path, SOME_COMMANDS)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE meta SET value = 99 WHERE key = 'min_reader_version'")
        for each in tmp_path.glob("shim.db*"):
            shutil.copy(each, crashed)
    before = hashes(crashed)
    assert before.keys() == {"shim.db", "shim.db-wal", "shim.db-shm"}
    with pytest.raises(StoreVersionError):
        stores.open(crashed / "shim.db")
    after = hashes(crashed)
    assert after.keys() == before.keys()
    assert (after["shim.db"], after["shim.db-wal"]) == (before["shim.db"], before["shim.db-wal"])


def test_a_newer_database_that_we_may_read_is_used(stores: Stores, path: Path) -> None:
    stores.fill(path, SOME_COMMANDS)
    make_newer(path, schema.SCHEMA_VERSION)
    change(path, "ALTER TABLE commands ADD COLUMN later TEXT DEFAULT 'x'", "CREATE TABLE later (a)")
    client, loaded = stores.open(path)
    assert len(loaded.commands) == SOME_COMMANDS
    assert client.one(put("1")).duplicate
    assert not client.one(put("new")).duplicate
    client.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (schema.SCHEMA_VERSION + 3,)


@pytest.mark.parametrize("application_id", [0, 0x1234])
def test_the_database_of_another_application_is_left_alone(stores: Stores, path: Path, application_id: int) -> None:
    change(path, "CREATE TABLE theirs (a)", f"PRAGMA application_id = {application_id}")
    before = hashes(path.parent)
    with pytest.raises(StoreError, match="another application"):
        stores.open(path)
    assert hashes(path.parent) == before


# --- damage -----------------------------------------------------------------------------------------------------------


def assert_replaced(stores: Stores, path: Path, number: int = 1) -> StoreContents:
    client, loaded = stores.open(path)
    assert loaded.moved_aside == f"{path}.corrupt-{number}"
    assert (loaded.commands, len(loaded.key)) == ((), 32)
    assert not client.one(put("1")).duplicate
    client.close()
    assert mode(path) == 0o600
    assert stores.loaded(path).moved_aside == ""
    return loaded


@pytest.mark.parametrize(
    "content", [b"x\xff", b"SQLite format 3\x00", b"garbage\x00" * 10_000], ids=["short", "head", "garbage"]
)
def test_what_is_no_database_is_moved_aside_as_it_is(stores: Stores, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    moved = Path(assert_replaced(stores, path).moved_aside)
    assert moved.read_bytes() == content


@pytest.mark.parametrize("content", [b"xy", b"host-1\n", b"mode: websocket\n", "ä".encode() * (1 << 20)])
def test_a_text_file_was_never_a_database_and_stays_where_it_is(stores: Stores, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"store\.path must name a database, or no file yet: .* is a text file"):
        stores.open(path)
    assert path.read_bytes() == content
    assert not list(path.parent.glob("*corrupt*"))


def test_a_text_beside_a_log_has_taken_the_place_of_a_database(stores: Stores, path: Path) -> None:
    path.write_bytes(b"text")
    Path(f"{path}-wal").write_bytes(b"log")
    assert_replaced(stores, path)


@pytest.mark.parametrize("cut", [50, 100, 4095, 4096, 3 * 4096, 3 * 4096 + 100, -1, -4096, -100_000])
def test_a_truncated_database_is_moved_aside(stores: Stores, path: Path, cut: int) -> None:
    stores.fill(path, SOME_COMMANDS)
    os.truncate(path, cut if cut > 0 else path.stat().st_size + cut)
    assert_replaced(stores, path)


@pytest.mark.parametrize("page", [1, 2, 5, 20])
def test_an_overwritten_page_is_damage(stores: Stores, path: Path, page: int) -> None:
    stores.fill(path, SOME_COMMANDS)
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xff" * 4096)
    assert_replaced(stores, path)


def test_missing_tables_are_damage(stores: Stores, path: Path) -> None:
    stores.fill(path, SOME_COMMANDS)
    change(path, "DROP TABLE outbox")
    assert_replaced(stores, path)


def test_companions_are_moved_along_and_nothing_is_overwritten(stores: Stores, path: Path) -> None:
    path.write_bytes(b"third")
    for name, content in {"corrupt-1": b"first", "corrupt-2-wal": b"second"}.items():
        Path(f"{path}.{name}").write_bytes(content)
    Path(f"{path}-wal").write_bytes(b"log")
    assert_replaced(stores, path, number=3)
    kept = {each.name: each.read_bytes() for each in path.parent.glob("*.corrupt-*")}
    assert kept == {
        "shim.db.corrupt-1": b"first",
        "shim.db.corrupt-2-wal": b"second",
        "shim.db.corrupt-3": b"third",
        "shim.db.corrupt-3-wal": b"log",
    }


def test_when_no_new_database_can_be_made_the_error_says_where_the_old_one_is(stores: Stores, path: Path) -> None:
    path.write_bytes(b"garbage\x00")
    # The new database's journal cannot be created: its name is taken by a directory.
    Path(f"{path}-journal").mkdir()
    with pytest.raises(StoreError, match=r"was moved to .*shim\.db\.corrupt-1"):
        stores.open(path)
    assert Path(f"{path}.corrupt-1").read_bytes() == b"garbage\x00"


# --- trouble that is no damage ----------------------------------------------------------------------------------------


def test_a_locked_database_is_no_damage(stores: Stores, path: Path) -> None:
    stores.fill(path, SOME_COMMANDS)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="SQLITE_BUSY: end the program that holds it"):
            stores.open(path)
        other.execute("ROLLBACK")
    loaded = stores.loaded(path)
    assert (len(loaded.commands), loaded.moved_aside) == (SOME_COMMANDS, "")


def test_a_directory_in_its_place_is_no_damage(stores: Stores, path: Path) -> None:
    path.mkdir()
    with pytest.raises(StoreError, match=r"store\.path"):
        stores.open(path)
    assert sorted(each.name for each in path.parent.iterdir()) == ["shim.db"]


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # a /dev/zero of the test's own
    except PermissionError:
        pytest.skip("only root may make a device node")


def _socket(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.bind(str(path))


MAKE = {"a FIFO": os.mkfifo, "a socket": _socket, "a character device": _device, "a directory": os.mkdir}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("place", ["shim.db", "shim.db-wal", "shim.db-shm", "shim.db.lock", "a link"])
def test_what_is_no_regular_file_is_refused_as_it_is(stores: Stores, path: Path, kind: str, place: str) -> None:
    odd = path.with_name("odd" if place == "a link" else place)
    MAKE[kind](odd)
    if place == "a link":
        path.symlink_to(odd)
    before = odd.lstat()
    with pytest.raises(StoreError, match=rf"store\.path must name a regular file.*{odd.name} is {kind}"):
        stores.open(path)
    with pytest.raises(StoreError, match=r"store\.path"):
        check_database(path)
    after = odd.lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert not list(path.parent.glob("*corrupt*"))


def test_a_file_in_place_of_its_directory_is_told(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"store\.path"):
        stores.open(tmp_path / "file" / "shim.db")


def test_a_failed_opening_can_be_repeated(stores: Stores, path: Path) -> None:
    stores.fill(path, SOME_COMMANDS)
    client = stores.client(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError):
            client.open()
        other.execute("ROLLBACK")
    assert len(client.open().commands) == SOME_COMMANDS
    client.close()


# --- one process to a database ---------------------------------------------------------------------------------------


def test_a_second_shim_is_told_to_take_a_database_of_its_own(stores: Stores, path: Path) -> None:
    first, _ = stores.open(path)
    first.run(put("1"))
    before = hashes(path.parent)
    with pytest.raises(StoreError, match="another agent-shim uses the database"):
        stores.open(path)
    assert hashes(path.parent) == before
    first.close()
    assert len(stores.loaded(path).commands) == 1


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_another_name_of_the_database_does_not_open_it_twice(stores: Stores, path: Path, link: str) -> None:
    first, _ = stores.open(path)
    first.run(put("1"))
    other = path.parent / "elsewhere" / "other.db"
    other.parent.mkdir()
    if link == "hard":
        other.hardlink_to(path)
    else:
        other.symlink_to(path)
    with pytest.raises(StoreError, match="another agent-shim uses the database"):
        stores.open(other)
    first.run(put("2"))
    first.close()
    assert len(stores.loaded(path).commands) == 2


def test_a_removed_lock_file_does_not_open_it_twice(stores: Stores, path: Path) -> None:
    first, _ = stores.open(path)
    path.with_name("shim.db.lock").unlink()
    with pytest.raises(StoreError, match="another agent-shim uses the database"):
        stores.open(path)
    first.close()
    assert stores.loaded(path).commands == ()


def test_a_database_that_replaced_a_corrupt_one_is_locked_too(stores: Stores, path: Path) -> None:
    path.write_bytes(b"garbage\x00")
    first, loaded = stores.open(path)
    assert loaded.moved_aside
    path.with_name("shim.db.lock").unlink()
    with pytest.raises(StoreError, match="another agent-shim uses the database"):
        stores.open(path)
    first.close()


def test_a_symbolic_link_to_a_database_that_is_yet_to_be_made_is_followed(stores: Stores, path: Path) -> None:
    target = path.parent / "target.db"
    path.symlink_to(target)
    client, _ = stores.open(path)
    client.run(put("1"))
    client.close()
    assert len(stores.loaded(target).commands) == 1


def test_a_predecessor_that_was_killed_does_not_block(stores: Stores, path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from shim.store.sqlite import SqliteStore;"
        "SqliteStore(Path(sys.argv[1]), lambda call: call()).open(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StoreError, match="another agent-shim"):
            stores.open(path)
        holder.kill()
        holder.wait()
    assert stores.loaded(path).commands == ()


def test_a_link_in_place_of_the_lock_is_not_followed(stores: Stores, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "somebody-elses"
    target.write_bytes(b"theirs")
    Path(f"{path}.lock").symlink_to(target)
    with pytest.raises(StoreError, match=r"store\.path .* cannot be used"):
        stores.open(path)
    assert target.read_bytes() == b"theirs"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_database_of_another_user_is_warned_about(stores: Stores, path: Path) -> None:
    assert stores.loaded(path).warnings == ()
    os.chown(path, 65534, -1)
    assert "another user" in stores.loaded(path).warnings[0]
