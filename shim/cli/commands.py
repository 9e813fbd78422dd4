"""The commands of `agent-shim`. The module of a subcommand is imported only when it is called."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from shim import __version__
from shim.cli import run as run_command

# Each command as `module:name`, with the help that is shown without importing the module.
_LAZY_COMMANDS = {
    "controller": (
        "devtools.controller:command",
        "Run a development controller: the vendor's WebSocket API with fault scripts.",
    ),
    "demo": ("devtools.demo:command", "Run a controller, a shim and one legacy agent in this terminal, step by step."),
    "doctor": ("shim.cli.doctor:command", "Examine everything between this machine and a working shim, with remedies."),
    "drain": (
        "shim.cli.admin_commands:drain_command",
        "Make a running shim refuse new commands and deliver those that it has.",
    ),
    "fleet": ("devtools.fleet.main:command", "Run simulated legacy agents of every dialect, with a latency report."),
    "forget": ("shim.cli.admin_commands:forget_command", "Forget an agent that has stopped calling."),
    "health": ("shim.cli.health:command", "Check a running shim: exit code 0 or 1."),
    "inject": ("shim.cli.inject:command", "Add the sidecar to a manifest of the agent, or take it out again."),
    "purge": ("shim.cli.admin_commands:purge_command", "Give up a command that waits for its agent."),
    "redeliver": ("shim.cli.admin_commands:redeliver_command", "Queue a command again that ended without a result."),
    "rollout": (
        "shim.cli.rollout:command",
        "Move many clusters step by step: preview, report with verdict, next step.",
    ),
    "store": ("shim.cli.store_commands:command", "Copy a store from a file to a database, or back."),
    "status": ("shim.cli.status:command", "Show the state of a running shim, once or live: links, agents, commands."),
}


def _has_devtools() -> bool:
    """Return True if the distribution agent-shim-devtools, or a checkout, is installed."""
    # An unrelated distribution on PyPI also installs a package `devtools`: only a module of ours identifies ours.
    try:
        return importlib.util.find_spec("devtools.controller") is not None
    except ModuleNotFoundError:
        return False


class LazyGroup(click.Group):
    """A group that imports the module of a subcommand when it is called.

    `modules` maps each name to `module:name` of its command and to its help. Commands of `devtools` are listed only if
    it is installed.
    """

    def __init__(self, *args: Any, modules: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all installed commands, sorted."""
        return sorted([*super().list_commands(ctx), *self._installed()])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command, or None if there is none of this name."""
        if cmd_name not in self._modules:
            return super().get_command(ctx, cmd_name)
        module, _, name = self._modules[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of all installed commands without importing their modules."""
        own = {name: command.get_short_help_str(100) for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted({**own, **self._installed()}.items()))

    def _installed(self) -> dict[str, str]:
        """Map the names of the lazy commands that are installed to their help."""
        has_devtools = _has_devtools()
        return {
            name: text for name, (at, text) in self._modules.items() if has_devtools or not at.startswith("devtools.")
        }


_config = click.option("--config", metavar="FILE", help="The YAML file; without it, defaults and environment.")
_sets = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Overrides file and environment.")


@click.group(cls=LazyGroup, modules=_LAZY_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Serve an agent's legacy HTTP API on localhost and speak the vendor's WebSocket API for it."""


@cli.command()
@_config
@_sets
@click.option("--ready-file", metavar="FILE", help="Written when the shim serves: its addresses and pid as JSON.")
def run(config: str | None, sets: tuple[str, ...], ready_file: str | None) -> NoReturn:
    """Run the sidecar until SIGTERM or SIGINT."""
    run_command.start(config, sets, ready_file)


@cli.command("check-config")
@_config
@_sets
def check_config(config: str | None, sets: tuple[str, ...]) -> None:
    """Print the effective configuration with secrets masked, or all its faults. Warnings are printed to stderr."""
    from shim.config.loader import dump, load
    from shim.config.warnings import find_warnings

    settings = load(config, os.environ, sets)
    for warning in find_warnings(settings, os.environ, config):
        click.echo(f"warning: {warning}", err=True)
    click.echo(dump(settings), nl=False)
