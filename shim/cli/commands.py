"""The commands of `agent-shim`: the small ones, and the modules of all others, which are imported when they are called.

A small command imports what it needs when it is called, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import click

from shim import __version__
from shim.cli import run as run_command

if TYPE_CHECKING:
    from shim.config.settings import Store

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
    "inject": ("shim.cli.inject:command", "Add the sidecar to a manifest of the agent, or take it out again."),
    "purge": ("shim.cli.admin_commands:purge_command", "Give up a command that waits for its agent."),
    "redeliver": ("shim.cli.admin_commands:redeliver_command", "Queue a command again that ended without a result."),
    "rollout": (
        "shim.cli.rollout:command",
        "Move many clusters step by step: preview, report with verdict, next step.",
    ),
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
    """Serve agents until SIGTERM or SIGINT."""
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


# --- health -----------------------------------------------------------------------------------------------------------

_SHOWN_BYTES = 300
_PAUSE_S = 0.2


@cli.command("health", short_help="Check a running shim: exit code 0 or 1.")
@click.option("--config", metavar="FILE", help="The shim's configuration: it says where the admin port is.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As given to `run`.")
@click.option("--url", metavar="URL", help="The admin port itself, http://host:port, instead of a configuration.")
@click.option("--ready", is_flag=True, help="Ask whether it can serve (/readyz), not only whether it lives (/healthz).")
@click.option("--wait", "wait_s", type=click.FloatRange(0, 600), default=0, metavar="S", help="Ask again for so long.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 60), default=3, show_default=True, metavar="S")
def health(
    config: str | None, sets: tuple[str, ...], url: str | None, ready: bool, wait_s: float, timeout_s: float
) -> None:
    """Check a running shim: exit code 0 if it is healthy, 1 if it is not or does not answer."""
    from shim.cli.admin_client import configured, given
    from shim.clock import Clock, pause
    from shim.config.loader import load

    host, port = given(url) if url else configured(load(config, os.environ, sets).admin)
    path, clock = "/readyz" if ready else "/healthz", Clock()
    end_s = clock.monotonic_s() + wait_s
    well, text = _ask_health(host, port, path, timeout_s)
    while not well and clock.monotonic_s() < end_s:
        pause(_PAUSE_S)
        well, text = _ask_health(host, port, path, timeout_s)
    click.echo(text, err=not well)
    sys.exit(0 if well else 1)


def _ask_health(host: str, port: int, path: str, timeout_s: float) -> tuple[bool, str]:
    """Send GET `path`; return True if the answer was 200, and a sentence for people.

    The standard library's client is used: a check of a container every few seconds must be cheap.
    """
    from http.client import HTTPException

    from shim.cli.admin_client import WHOLE_S, AdminPort

    try:
        admin_port = AdminPort(host, port, timeout_s=timeout_s, whole_s=max(WHOLE_S, timeout_s))
        status, body = admin_port.exchange("GET", path, limit_bytes=_SHOWN_BYTES)
    except (OSError, HTTPException) as error:
        return False, f"no answer from the admin port {host}:{port}: {str(error) or type(error).__name__}"
    return status == 200, body.strip() if status == 200 else f"{status} {body.strip()}"


# --- store ------------------------------------------------------------------------------------------------------------


@cli.group(short_help="Copy a store, or divide a database into another number of shards.")
def store() -> None:
    """Copy or divide a store that no shim uses."""


@store.command("copy")
@click.option("--from", "source", required=True, metavar="PATH|URL", help="A file, or postgresql://…")
@click.option("--to", "target", required=True, metavar="PATH|URL", help="The same; it must be empty.")
@click.option("--config", metavar="FILE", help="Its store section says how to reach a database: password, TLS.")
def copy_store(source: str, target: str, config: str | None) -> None:
    """Copy a store into an empty one. No shim may use either; an interrupted copy leaves nothing behind."""
    from shim.errors import StoreError
    from shim.store.copy import copy

    try:
        copied = copy(_store_at(source, config), _store_at(target, config))
    except StoreError as error:
        click.echo(f"store copy: {error}", err=True)
        sys.exit(1)
    for table, (rows, left_out) in copied.items():
        click.echo(f"{table}: {rows}" + (f", and {left_out} that cannot be read left out" if left_out else ""))


@store.command("shards")
@click.argument("count", type=click.IntRange(1, 256))
@click.option("--at", "place", required=True, metavar="URL", help="postgresql://…")
@click.option("--config", metavar="FILE", help="Its store section says how to reach the database: password, TLS.")
def change_store_shards(count: int, place: str, config: str | None) -> None:
    """Divide a database into COUNT shards: about four for each planned replica. No replica may run."""
    from shim.errors import StoreError

    where = _store_at(place, config)
    if not where.url:  # libpq would take the database that the environment names
        raise click.BadParameter("expected postgresql://…: only a database has shards", param_hint="--at")
    try:
        from shim.store.postgres.offline import change_shards

        before = change_shards(where, count)
    except ModuleNotFoundError as error:
        click.echo(f"store shards needs agent-shim[postgres]: {error.name} is not installed", err=True)
        sys.exit(2)
    except StoreError as error:
        click.echo(f"store shards: {error}", err=True)
        sys.exit(1)
    click.echo(f"{count} shards, {before} before")


def _store_at(place: str, config: str | None) -> Store:
    from shim.config.loader import load

    is_url = place.startswith(("postgresql://", "postgres://"))
    return load(config, os.environ, [f"store.url={place}"] if is_url else ["store.url=", f"store.path={place}"]).store
