"""The wheel is the same wherever and whenever it is built."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from shim import __version__

pytest.importorskip("hatchling", reason="the build backend comes with requirements/dev.txt")

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "shim", "config", "docs", "devtools")


def built(folder: Path, *, umask: int = 0o022, age_s: int = 0, zone: str = "UTC", project: str = ".") -> Path:
    """Build the wheel of `project` (`.` or `devtools`) from a copy of the sources in `folder`, and return its path."""
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
        cwd=folder / project,
        env=environ,
        check=True,
        capture_output=True,
    )
    [wheel] = (folder / project / "out").glob("*.whl")
    return wheel


@pytest.mark.parametrize(
    "project,package,distribution", [(".", "shim", "agent_shim"), ("devtools", "devtools", "agent_shim_devtools")]
)
def test_two_builds_have_the_same_hash(project: str, package: str, distribution: str, tmp_path: Path) -> None:
    first = built(tmp_path / "a", project=project)
    second = built(tmp_path / "a-longer-name", umask=0o077, age_s=90_000, zone="Asia/Tokyo", project=project)
    assert first.name == second.name
    hashes = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in (first, second)]
    assert hashes[0] == hashes[1]
    names = zipfile.ZipFile(first).namelist()
    assert all(name.startswith((f"{package}/", f"{distribution}-")) for name in names), "nothing but the package"
    assert not [name for name in names if "__pycache__" in name or name.endswith((".db", ".pem", ".env", ".toml"))]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert [name for name in names if name.endswith("licenses/LICENSE")], "the licence is part of each wheel"


def test_both_distributions_have_the_same_version_and_fit_only_each_other() -> None:
    project = tomllib.loads((ROOT / "devtools" / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"agent-shim=={__version__}" in project["dependencies"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert project["name"] in extras["devtools"]
