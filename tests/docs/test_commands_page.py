"""docs/reference/commands.md lists every command, and every exit code."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import click

from shim import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "commands.md").read_text()


def group() -> click.Group:
    """Return the command that the project's script starts."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["agent-shim"]
    module = import_module(script.partition(":")[0])
    return next(each for each in vars(module).values() if isinstance(each, click.Group))


def test_every_command_is_listed_and_no_other() -> None:
    commands = group()
    listed = set(re.findall(r"^\| `agent-shim ([a-z-]+)", PAGE, re.MULTILINE))
    assert listed == set(commands.list_commands(click.Context(commands)))


def test_the_exit_codes_are_those_of_the_command() -> None:
    codes = list(map(int, re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)))
    assert codes == [0, 1, errors.EXIT_CONFIG, errors.EXIT_USAGE, errors.EXIT_INTERNAL, errors.EXIT_STORE_VERSION]
