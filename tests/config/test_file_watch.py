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
