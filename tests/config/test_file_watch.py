"""Has a file become another one?"""

from __future__ import annotations

from pathlib import Path

import pytest

from shim.config.files import FileWatcher, fingerprints


def test_a_change_is_told_once_and_a_missing_file_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    watched = FileWatcher()
    assert watched.changed({"a": str(file), "b": None}) == set()
    file.write_text("one")
    assert watched.changed({"a": str(file)}) == {"a"}
    assert watched.changed({"a": str(file)}) == set()
    file.unlink()
    assert watched.changed({"a": str(file)}) == set()
    file.write_text("another")
    assert watched.changed({"a": str(file)}) == {"a"}


def test_a_file_that_was_away_or_got_other_permissions_has_changed(tmp_path: Path) -> None:
    """It may have been read in vain before."""
    file, folder = tmp_path / "folder" / "file", tmp_path / "folder"
    folder.mkdir()
    file.write_text("one")
    watched = FileWatcher()
    assert watched.changed({"a": str(file)}) == set()
    folder.rename(tmp_path / "away")
    assert watched.changed({"a": str(file)}) == set()
    (tmp_path / "away").rename(folder)
    assert watched.changed({"a": str(file)}) == {"a"}
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:  # the kernel's clock of files may stand still for some milliseconds
        file.chmod(0o600)
    assert watched.changed({"a": str(file)}) == {"a"}
    assert watched.changed({"a": str(file)}) == set()


def test_a_swapped_symlink_is_a_change(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text("same text")
    link = tmp_path / "data"
    link.symlink_to("one")
    watched = FileWatcher()
    assert watched.changed({"token": str(link / "token")}) == set()
    swap = tmp_path / "swap"
    swap.symlink_to("two")
    swap.replace(link)
    assert watched.changed({"token": str(link / "token")}) == {"token"}


def test_marks_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprints([tmp_path / "nowhere"])
