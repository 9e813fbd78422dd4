"""Commands of `pip install agent-shim` without extras, and with the wheel of the developer tools beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement

from shim.cli.commands import cli
from tests.packaging.test_wheel import built

pytest.importorskip("hatchling", reason="the build backend comes with requirements/dev.txt")

DEVTOOLS = ("controller", "demo", "fleet")
COMMANDS = [name for name in cli.list_commands(click.Context(cli)) if name not in DEVTOOLS]
AGENT = "kind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n  - {name: agent, image: a}\n"


def needed(name: str, seen: set[str]) -> Iterator[metadata.Distribution]:
    """A distribution and what it needs without extras, from this environment."""
    if name.lower() in seen:
        return
    seen.add(name.lower())
    found = metadata.distribution(name)
    yield found
    for text in found.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from needed(requirement.name, seen)


def link(found: metadata.Distribution, target: Path) -> None:
    """Make the distribution's modules importable from `target`, and nothing else."""
    for name in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
        source = Path(str(found.locate_file(name)))
        if source.exists() and not (target / name).exists():
            (target / name).symlink_to(source)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`agent-shim` in a virtual environment with the wheel and its dependencies, without those of its extras."""
    folder = tmp_path_factory.mktemp("plain")
    return installed(folder, built(folder / "source"))


@pytest.fixture(scope="module")
def program_with_devtools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`agent-shim` in a virtual environment with both wheels, without what the extras need besides."""
    folder = tmp_path_factory.mktemp("devtools")
    return installed(folder, built(folder / "plain"), built(folder / "tools", project="devtools"))


def installed(folder: Path, *wheels: Path) -> Path:
    """Install the wheels and what agent-shim needs in a virtual environment below `folder`; return its program."""
    home = folder / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    seen: set[str] = set()
    for requirement in map(Requirement, metadata.requires("agent-shim") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            for found in needed(requirement.name, seen):
                link(found, site)
    assert not seen & {"rich", "ruamel-yaml", "ruamel.yaml", "psycopg"}
    unpack = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        *map(str, wheels),
    ]
    subprocess.run(unpack, check=True, capture_output=True, timeout=120)
    start = home / "bin" / "agent-shim"
    start.write_text(f"#!{home}/bin/python\nfrom shim.cli.main import main\nmain()\n")
    start.chmod(0o755)
    return start


def call(
    program: Path, *args: str, text: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *args],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=program.parent,
        env=None if env is None else {**os.environ, **env},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_extra(program: Path, command: str) -> None:
    done = call(program, command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: agent-shim {command}")


@pytest.mark.parametrize("command", DEVTOOLS)
def test_without_the_developer_tools_their_commands_name_the_extra(program: Path, command: str) -> None:
    assert f"\n  {command} " not in call(program, "--help").stdout
    for args in ((command,), (command, "--help")):
        done = call(program, *args)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "Error: this needs devtools: pip install 'agent-shim[devtools]'\n"


@pytest.mark.parametrize("command", DEVTOOLS)
def test_with_their_wheel_the_commands_of_the_developer_tools_are_there(
    program_with_devtools: Path, command: str
) -> None:
    assert f"\n  {command} " in call(program_with_devtools, "--help").stdout
    done = call(program_with_devtools, command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: agent-shim {command}")


def test_the_demo_runs_from_both_wheels(program_with_devtools: Path) -> None:
    done = call(program_with_devtools, "demo", "--once")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unrelated_package_of_the_same_name_is_not_taken_for_the_developer_tools(
    program: Path, tmp_path: Path
) -> None:
    (tmp_path / "devtools").mkdir()
    (tmp_path / "devtools" / "__init__.py").write_text("print('unrelated')\n")
    environ = {"PYTHONPATH": str(tmp_path)}
    assert "\n  demo " not in call(program, "--help", env=environ).stdout
    done = call(program, "demo", env=environ)
    assert done.returncode == 2
    assert done.stderr == "Error: this needs devtools: pip install 'agent-shim[devtools]'\n"


def test_operators_commands_need_no_extra(program: Path, tmp_path: Path) -> None:
    nowhere = ("--url", "http://127.0.0.1:1")
    for args in (("status", *nowhere), ("drain", *nowhere), ("health", "--url", "http://127.0.0.1:1/healthz")):
        done = call(program, *args)
        assert done.returncode == 1, (args, done.stderr)
        assert "Traceback" not in done.stderr
        assert "pip install" not in done.stderr
    sets = (
        f"--set=store.path={tmp_path}/db",
        "--set=upstream.url=http://127.0.0.1:1",
        "--set=listen.port=0",
        "--set=admin.port=0",
    )
    done = call(program, "doctor", *sets)
    assert done.returncode == 1, done.stderr
    assert "PASS  store" in done.stdout
    assert call(program, "check-config", *sets).returncode == 0


def test_a_command_that_needs_an_extra_says_which(program: Path) -> None:
    done = call(program, "inject", "--image", "r.example/agent-shim:1", text=AGENT)
    assert done.returncode == 2
    assert done.stderr == "Error: this needs ruamel: pip install 'agent-shim[tools]'\n"
    assert done.stdout == ""
