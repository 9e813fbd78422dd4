"""The workflows cannot be run here: they are linted, and what matters about them is asserted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
PINNED = re.compile(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return loaded


def test_there_is_one_for_every_push_and_one_for_releases() -> None:
    assert [file.name for file in FILES] == ["ci.yml", "pages.yml", "release.yml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_action_is_pinned_by_its_commit_and_the_file_says_that_it_was_not_run(file: Path) -> None:
    used = re.findall(r"uses: (.*)", file.read_text())
    assert used
    assert [each for each in used if not PINNED.fullmatch(each)] == []
    assert "Not yet run" in file.read_text().splitlines()[0]


def test_one_action_has_one_commit() -> None:
    used = {use for file in FILES for use in re.findall(r"uses: (\S+@\S+)", file.read_text())}
    assert len(used) == len({use.partition("@")[0] for use in used})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_is_permitted_that_a_job_does_not_ask_for(file: Path) -> None:
    loaded = workflow(file.name)
    assert loaded["permissions"] == {}
    assert all("permissions" in job and "timeout-minutes" in job for job in loaded["jobs"].values())


def test_the_matrix_has_every_python_that_the_package_claims() -> None:
    claimed = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    matrix = workflow("ci.yml")["jobs"]["python"]["strategy"]["matrix"]["python"]
    assert matrix == ["3.11", "3.12", "3.13", "3.14"]
    assert not claimed or sorted(claimed, key=lambda each: int(each[2:])) == matrix


def test_a_release_is_attested_and_signed_before_anything_is_published() -> None:
    jobs = workflow("release.yml")["jobs"]
    assert set(jobs["publish"]["needs"]) == {"attest", "index", "chart"}
    said = (FOLDER / "release.yml").read_text()
    assert said.count("actions/attest-build-provenance@") == 3, "wheels, each image, and both as one"
    assert said.count("cosign sign --yes") == 3, "each image, both as one, and chart"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_tests_that_it_runs_exist(file: Path) -> None:
    named = re.findall(r"make test ARGS=(\S+)", file.read_text())
    assert [each for each in named if not (ROOT / each).exists()] == []


def test_the_image_is_built_for_both_kinds_of_machine_and_published_as_one() -> None:
    jobs = workflow("release.yml")["jobs"]
    kinds = {each["arch"]: each["machine"] for each in jobs["image"]["strategy"]["matrix"]["include"]}
    assert kinds == {"amd64": "ubuntu-24.04", "arm64": "ubuntu-24.04-arm"}
    assert jobs["index"]["needs"] == "image"
    assert jobs["chart"]["needs"] == "index", "the chart's default tag names both"
    script = "".join(step.get("run", "") for step in jobs["index"]["steps"])
    assert all(f"digest/{arch}" in script for arch in kinds)


def test_a_release_has_checksums_of_everything_that_it_holds() -> None:
    (script,) = [step["run"] for step in workflow("release.yml")["jobs"]["notes"]["steps"] if "run" in step]
    assert script.index("sha256sum -- *") < script.index("gh release create")


def test_a_release_builds_the_wheels_of_both_distributions() -> None:
    steps = [step.get("run", "") for step in workflow("release.yml")["jobs"]["build"]["steps"]]
    assert "make wheels" in steps
    (version,) = [step for step in steps if "TAG#v" in step]
    assert "shim/__init__.py" in version
    assert "devtools/pyproject.toml" in version


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_scripts_in_it_pass_shellcheck(file: Path, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck")
    steps = [step["run"] for job in workflow(file.name)["jobs"].values() for step in job["steps"] if "run" in step]
    for number, script in enumerate(steps):
        path = tmp_path / f"{number}.sh"
        path.write_text(f"set -e\n{script}")
        done = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_zizmor_has_nothing_to_say() -> None:
    zizmor = Path(sys.executable).with_name("zizmor")
    if not zizmor.exists():
        pytest.skip("needs zizmor")
    done = subprocess.run(
        [zizmor, "--offline", "--pedantic", "--no-progress", *FILES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_gate_installs_every_program_that_a_test_needs() -> None:
    scripts = (ROOT / ".ci" / "run").read_text() + (ROOT / ".ci" / "helm-tools").read_text()
    installed = set(re.findall(r"[\w-]+", scripts))
    # Of packages that every Debian has.
    essential = {"awk", "bash", "mount", "sh", "sha256sum", "unshare"}
    marks = [
        mark
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in ("test_conftest.py", "test_workflows.py") and "node_modules" not in path.parts
        for mark in re.findall(r"\.needs\((.*?)\)", path.read_text())
    ]
    needed = {tool for mark in marks for tool in re.findall(r'"([\w-]+)"', mark)}
    assert {"curl", "postgresql"} <= needed
    assert needed - essential - installed == set()
