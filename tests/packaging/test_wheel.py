"""The wheel is the same wherever and whenever it is built."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the build backend comes with requirements/dev.txt")

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "shim", "config", "docs")


def built(folder: Path, *, umask: int, age_s: int, zone: str) -> Path:
    """A wheel, built from a copy of the sources in a folder of its own."""
    folder.mkdir()
    for name in SOURCES:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for path in folder.rglob("*"):
        stat = path.stat()
        os.utime(path, (stat.st_atime - age_s, stat.st_mtime - age_s))
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    environ = {"PATH": os.environ["PATH"], "TZ": zone, "HOME": str(folder)}
    script = f"import os, sys; os.umask({umask}); from hatchling.cli import hatchling; sys.exit(hatchling())"
    subprocess.run(
        [sys.executable, "-c", script, "build", "-t", "wheel", "-d", "out"],
        cwd=folder,
        env=environ,
        check=True,
        capture_output=True,
    )
    [wheel] = (folder / "out").glob("*.whl")
    return wheel


def test_two_builds_have_the_same_hash(tmp_path: Path) -> None:
    first = built(tmp_path / "a", umask=0o022, age_s=0, zone="UTC")
    second = built(tmp_path / "a-longer-name", umask=0o077, age_s=90_000, zone="Asia/Tokyo")
    assert first.name == second.name
    hashes = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in (first, second)]
    assert hashes[0] == hashes[1]
    names = zipfile.ZipFile(first).namelist()
    assert all(name.startswith(("shim/", "agent_shim-")) for name in names), "nothing but the package"
    assert not [name for name in names if "__pycache__" in name or name.endswith((".db", ".pem", ".env"))]
