"""The command of every pod is parsed without click, and means what click reads from it."""

from __future__ import annotations

import click
import pytest

from shim.cli import run
from shim.cli.commands import cli

PLAIN = [
    ["run"],
    ["run", "--config", "/etc/a.yaml"],
    ["run", "--set", "listen.port=1", "--config", "a", "--set", "mode=http", "--ready-file", "/r"],
    ["run", "--config", "a", "--config", "b"],
    ["run", "--config", ""],
]


@pytest.mark.parametrize("args", PLAIN)
def test_a_plain_run_is_parsed_as_by_click(args: list[str]) -> None:
    context = cli.commands["run"].make_context("run", args[1:])
    given = context.params
    assert run.parse(args) == (given["config"], given["sets"], given["ready_file"])


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["status"],
        ["--help"],
        ["run", "--help"],
        ["run", "--config"],
        ["run", "--config=a"],
        ["run", "--config", "--set"],
        ["run", "stray", "words"],
    ],
)
def test_everything_else_is_left_to_click(args: list[str]) -> None:
    assert run.parse(args) is None


def test_every_option_of_run_is_known() -> None:
    options = [name for each in cli.commands["run"].params if isinstance(each, click.Option) for name in each.opts]
    assert all(run.parse(["run", name, "x"]) for name in options)
