"""docs/reference/commands.md lists every command, and every exit code."""

from __future__ import annotations

import re
from pathlib import Path

import click

from shim import errors
from shim.cli.commands import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "commands.md").read_text()


def test_every_command_is_listed_and_no_other() -> None:

    listed = set(re.findall(r"^\| `agent-shim ([a-z-]+)", PAGE, re.MULTILINE))
    assert listed == set(cli.list_commands(click.Context(cli)))


def test_the_exit_codes_are_those_of_the_command() -> None:
    codes = list(map(int, re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)))
    assert codes == [0, 1, errors.EXIT_CONFIG, errors.EXIT_USAGE, errors.EXIT_INTERNAL, errors.EXIT_STORE_VERSION]
