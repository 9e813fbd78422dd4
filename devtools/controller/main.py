"""The controller as a process: files, signals and output."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
from pathlib import Path
from typing import Any

import click
import msgspec

from devtools.controller.active_faults import parse_fault
from devtools.controller.faults import AnyFault
from devtools.controller.history import Event
from devtools.controller.server import DevController, address
from devtools.controller.state import Options, TokenPlace
from shim.errors import OperatorError
from shim.protocol.rfc3339 import rfc3339

_ARROWS = {"in": "<-", "out": "->", "": "--"}


def run(given: dict[str, Any]) -> None:
    """Serve until SIGTERM or SIGINT. `given` holds the command's options by name. Raises `click.ClickException`."""
    tokens = [*given["tokens"], *(path.read_text().strip() for path in given["token_files"])]
    if not any(tokens) and not given["token_prefixes"]:
        raise click.UsageError("give at least one --token, --token-file or --token-prefix")
    faults = _fault_script(given["fault_file"])
    controller = DevController(tokens, port=given["listen"][1], options=_options(given))
    asyncio.run(_serve(controller, faults, ready_file=given["ready_file"], verbose=given["verbose"]))


def _options(given: dict[str, Any]) -> Options:
    return Options(
        host=given["listen"][0],
        base_path=given["base_path"].rstrip("/"),
        token_prefixes=given["token_prefixes"],
        token_place=TokenPlace(given["token_place"]),
        control=given["control"],
        control_token=given["control_token"],
        tls=_tls(given["cert_file"], given["key_file"]),
        ping_interval_s=given["ping_interval_s"],
        silent_after_s=given["silent_after_s"],
        strict_clusters=not given["lenient"],
        binary_frames=given["binary_frames"],
        decoy_token=given["decoy_token"],
        journal=given["journal"],
        state=given["state"],
    )


def _tls(cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext | None:
    if cert_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert_file, key_file)
    except (ssl.SSLError, OSError) as error:
        raise click.ClickException(f"cannot use the certificate: {error}") from None
    return context


def _fault_script(path: Path | None) -> list[AnyFault]:
    if path is None:
        return []
    try:
        script = json.loads(path.read_text())
        return [parse_fault(value) for value in (script if isinstance(script, list) else [script])]
    except (ValueError, OperatorError) as error:
        raise click.ClickException(f"--faults: {error}") from None


async def _serve(controller: DevController, faults: list[AnyFault], *, ready_file: Path | None, verbose: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await controller.start()
    except OSError as error:
        await controller.stop()
        raise click.ClickException(f"cannot serve: {error}") from None
    try:
        if verbose:
            controller.history.listeners.append(lambda event: click.echo(line(event)))
        for fault in faults:
            controller.set_fault(fault)
        if ready_file is not None:
            _write_ready(ready_file, controller)
        click.echo(f"controller: upstream.url is {controller.url}; control API at {controller.control_url}/control")
        await stop.wait()
    finally:
        await controller.stop()


def _write_ready(path: Path, controller: DevController) -> None:
    """Write the ready file atomically, so that a reader never sees half of it."""
    ready = {"listen": address(controller.listen), "control": address(controller.control), "pid": os.getpid()}
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(ready) + "\n")
    new.replace(path)


def line(event: Event) -> str:
    """Format an event for a terminal: `12:00:01.120 #3 <- register req_1 {"agent_id":…`, cut to one or two lines."""
    words = [rfc3339(event.wall_s)[11:23], f"#{event.connection}", _ARROWS[event.direction]]
    words += [event.type, event.request_id] if event.type else [event.kind.value]
    shown = msgspec.json.encode(event.payload if event.type else event.detail).decode()
    words.append(shown if len(shown) <= 160 else shown[:159] + "…")
    return " ".join(word for word in words if word)
