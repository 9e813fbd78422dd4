"""The command `run`: its plain form, and the start of the shim."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from shim.errors import EXIT_OK


def parse(args: Sequence[str]) -> tuple[str | None, tuple[str, ...], str | None] | None:
    """Return `--config`, all `--set` and `--ready-file` of `run`, or None if click must parse the command line.

    This is the command of every pod, and serving needs nothing of click, which would take 1 MB for as long as the shim
    runs: the references to it in caches of `typing` keep it in memory. All but the plainest form is left to click.
    """
    given: dict[str, list[str]] = {"--config": [], "--set": [], "--ready-file": []}
    if args[:1] != ["run"] or len(args) % 2 == 0:
        return None
    for name, value in zip(args[1::2], args[2::2], strict=True):
        if name not in given or value.startswith("-"):
            return None
        given[name].append(value)
    config, ready_file = (given[name][-1] if given[name] else None for name in ("--config", "--ready-file"))
    return config, tuple(given["--set"]), ready_file


def start(config: str | None, sets: tuple[str, ...], ready_file: str | None) -> NoReturn:
    """Run the shim. Raises `ConfigError` before anything was started."""
    # Before the event loop handles signals, PID 1 would ignore SIGTERM and SIGINT, and SIGHUP would end the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(EXIT_OK))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from shim import launch

    launch.main(config, sets, ready_file)
