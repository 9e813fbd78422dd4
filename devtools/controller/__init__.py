"""`agent-shim controller`: the vendor's WebSocket API for demonstrations, staging tests and this project's tests.

Only the command is defined here. It loads `devtools.controller.server.DevController` when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_FILE = click.Path(dir_okay=False, path_type=Path)
_READABLE = click.Path(exists=True, dir_okay=False, path_type=Path)
_INTERVAL = click.FloatRange(min=0.01, max=86_400)


def _address(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, int] | None:
    if value is None:
        return None
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise click.BadParameter("expected HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


@click.command("controller")
@click.option(
    "--listen",
    callback=_address,
    default="127.0.0.1:8900",
    show_default=True,
    metavar="HOST:PORT",
    help="Where agents connect; port 0 takes any free one.",
)
@click.option("--token", "tokens", multiple=True, metavar="T", help="A token to accept; may be repeated.")
@click.option("--token-file", "token_files", multiple=True, type=_READABLE, help="A file that holds one.")
@click.option("--token-prefix", "token_prefixes", multiple=True, metavar="P", help="Accept all that begin with P.")
@click.option(
    "--token-place",
    type=click.Choice(["either", "query", "header"]),
    default="either",
    show_default=True,
    help="Where the handshake may carry the token.",
)
@click.option("--control", callback=_address, metavar="HOST:PORT", help="A listener for the control API alone.")
@click.option("--control-token", default="", metavar="T", help="The Bearer token of the control API.")
@click.option("--base-path", default="", metavar="PATH", help="A path before that of the WebSocket API.")
@click.option("--cert-file", type=_READABLE, help="Serve TLS with this certificate chain (PEM).")
@click.option("--key-file", type=_READABLE, help="The key of the certificate (PEM).")
@click.option("--ping-interval-s", type=_INTERVAL, default=30, show_default=True, help="WebSocket pings.")
@click.option("--silent-after-s", type=_INTERVAL, default=60, show_default=True, help="Drop what was silent so long.")
@click.option("--lenient", is_flag=True, help="Take heartbeats and results of unregistered clusters.")
@click.option("--binary-frames", is_flag=True, help="Send JSON in binary frames.")
@click.option(
    "--decoy-token", is_flag=True, help="Put a token that opens nothing into register_success; agents may store it."
)
@click.option("--faults", "fault_file", type=_READABLE, help="A JSON list of faults to set at the start.")
@click.option("--state", type=_FILE, help="A file in which registrations survive a restart.")
@click.option("--journal", type=_FILE, help="A file to which every event is appended as a JSON line.")
@click.option("--ready-file", type=_FILE, help="Written when it listens: addresses and pid, as JSON.")
@click.option("--verbose", "-v", is_flag=True, help="Print every event.")
def command(**given: Any) -> None:
    """Run a development controller: the vendor's WebSocket API, and a control API under /control."""
    from devtools.controller.main import run

    run(given)
