"""docs/reference/commands.md lists every command, and each exit code that the configuration's page lists."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "commands.md").read_text()


def group() -> click.Group:
    """Return the command that the project's script starts."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["agent-shim"]
    module = import_module(script.partition(":")[0])
    return next(each for each in vars(module).values() if isinstance(each, click.Group))


def test_every_command_is_listed_and_no_other() -> None:
    main = group()
    listed = set(re.findall(r"^\| `agent-shim ([a-z-]+)", PAGE, re.MULTILINE))
    assert listed == set(main.list_commands(click.Context(main)))


def test_the_exit_codes_are_those_of_the_configurations_page() -> None:
    codes = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    assert codes == re.findall(r"^\| (\d+) \|", (ROOT / "docs/reference/configuration.md").read_text(), re.MULTILINE)
