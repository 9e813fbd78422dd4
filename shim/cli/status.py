"""`agent-shim status`: the state of a running shim, once or live in the terminal."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from threading import Event
from types import ModuleType
from typing import Any

import click

from shim.cli.admin_client import AdminError, AdminPort, admin_options, port_of
from shim.cli.status_view import View, plain, view

EVERY_S = 1.0


@click.command("status")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print /status.json; with --watch one line a second.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, once a second.")
def command(as_json: bool, watch: bool, **where: Any) -> None:
    """Show the state of a running shim: links, agents, commands, and if it can be removed."""
    port = port_of(**where)
    with suppress(KeyboardInterrupt):
        if as_json:
            _print_json(port, watch)
            return
        shown, screen = _look(port), _screen()
        if screen is not None:
            screen.watch(shown, lambda: _look_again(port), EVERY_S) if watch else screen.show(shown)
            return
        click.echo(plain(shown))
        while watch:
            Event().wait(EVERY_S)
            click.echo("\n" + plain(_look_again(port)))


def _print_json(port: AdminPort, watch: bool) -> None:
    click.echo(json.dumps(port.ask("GET", "/status.json"), indent=None if watch else 2))
    while watch:
        Event().wait(EVERY_S)
        click.echo(json.dumps(port.ask("GET", "/status.json")))


def _look(port: AdminPort) -> View:
    return view(port.ask("GET", "/status.json"))


def _look_again(port: AdminPort) -> View:
    """Query the status; return an error as a view, because the shim may restart while it is watched."""
    try:
        return _look(port)
    except AdminError as error:
        return View("bad", error.message, [], [], [], "")


def _screen() -> ModuleType | None:
    """Return the rendering with colours, for a terminal and if rich is installed."""
    if not sys.stdout.isatty():
        return None
    try:
        return importlib.import_module("shim.cli.status_rich")
    except ModuleNotFoundError:
        return None
