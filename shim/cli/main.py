"""Entry point of the command `agent-shim`.

Exit codes: 0 success, 1 a command failed or found a failure, 2 faults in the configuration or the command line, 70 an
internal error, 78 the store was written by a newer version. `rollout` has 0, 1, 2 for verdicts, and 64 for no verdict.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from shim.cli import run
from shim.errors import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_INTERNAL,
    EXIT_STORE_VERSION,
    ConfigError,
    StoreVersionError,
)

# Packages of the extras. They are imported where they are used, so that help needs none of them.
_OPTIONAL = {"rich": "tools", "ruamel": "tools", "psycopg": "postgres", "devtools": "devtools"}


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Execute the command line (default: that of the process) and exit with its code."""
    try:
        given = run.parse(sys.argv[1:] if args is None else args)
        if given is not None:
            run.start(*given)
        from shim.cli.commands import cli

        cli.main(args, prog_name="agent-shim")
    except KeyboardInterrupt:
        sys.exit(EXIT_FAILED)
    except Exception as error:  # noqa: BLE001 - the last resort: a defect has its own exit code
        from shim.cli.threads import is_interrupt

        if is_interrupt(error):
            sys.exit(EXIT_FAILED)
        _exit(error)


def _exit(error: Exception) -> NoReturn:
    """Print an error to stderr and exit with its code."""
    code, package = EXIT_CONFIG, (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ConfigError):
        plural = "s" if len(error.faults) > 1 else ""
        lines = [f"{len(error.faults)} fault{plural} in the configuration:", *(f"  {fault}" for fault in error.faults)]
    elif isinstance(error, StoreVersionError):
        code, lines = EXIT_STORE_VERSION, [f"store: {error}"]
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO):
        code = vars(error).get("exit_code", EXIT_FAILED)
        lines = [f"Error: the output cannot be written: {error.strerror}"]
        # At its end Python writes what is left in the buffer. If that fails, its exit code is 120.
        with open(os.devnull, "wb") as nothing, contextlib.suppress(OSError):  # noqa: PTH123 - a device
            os.dup2(nothing.fileno(), 1)
    elif isinstance(error, FileNotFoundError) and _directory_is_gone():
        code = vars(error).get("exit_code", EXIT_FAILED)
        lines = ["Error: the working directory was removed: change to one that exists"]
    elif isinstance(error, ModuleNotFoundError) and package in _OPTIONAL:
        lines = [f"Error: this needs {package}: pip install 'agent-shim[{_OPTIONAL[package]}]'"]
    else:
        from shim.redaction import Redaction

        code, lines = EXIT_INTERNAL, Redaction().text("".join(traceback.format_exception(error))).splitlines()
    with contextlib.suppress(OSError, AttributeError):  # without a descriptor 2, `sys.stderr` is None
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
    sys.exit(code)


def _directory_is_gone() -> bool:
    from pathlib import Path

    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False
