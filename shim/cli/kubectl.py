"""kubectl, run for commands that look at clusters: bounded in time, together with the programs that it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import click

from shim.cli.inject.missing_sidecars import listed
from shim.cli.threads import Interruption
from shim.core.text import printable

ERROR_CHARS = 300
ALL = "all"
LOOK_S = 0.5
"""Seconds between two looks for Ctrl-C while a kubectl runs."""
_LOG_LINE = re.compile(r"[EWIF]\d{4} ")


class Terms(NamedTuple):
    """Conditions that hold for every cluster: the namespace to look in, or `ALL`, and when to end a kubectl."""

    namespace: str
    timeout_s: float
    interruption: Interruption

    @property
    def where(self) -> str:
        """The namespace in words."""
        return "any namespace" if self.namespace == ALL else f"namespace {self.namespace}"


def pods(terms: Terms, options: Sequence[str] = ()) -> list[Mapping[str, Any]]:
    """Return the pods that kubectl shows. `options` select a cluster. Raises click's error."""
    where = ("--all-namespaces",) if terms.namespace == ALL else ("--namespace", terms.namespace)
    return listed(run(terms, options, "get", "pods", *where, "--output", "json"))


def run(terms: Terms, options: Sequence[str], verb: str, *arguments: str) -> str:
    """Return the output of one kubectl. `options` select a cluster.

    Raises click's error with kubectl's own text, or with the reason why it was not run to its end.
    """
    command = ["kubectl", *options, f"--request-timeout={terms.timeout_s:g}s", verb, *arguments]
    try:
        # A session of its own, so that a login program which kubectl has started ends with it.
        process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise click.ClickException(f"kubectl cannot be run: {error.strerror}") from None
    with process:
        output, errors = _communicate(process, terms, verb)
    if process.returncode:
        raise click.ClickException(
            _reason(errors.decode("utf-8", "replace")) or f"kubectl {verb}: {process.returncode}"
        )
    return output.decode("utf-8", "replace")


def _communicate(process: subprocess.Popen[bytes], terms: Terms, verb: str) -> tuple[bytes, bytes]:
    """Return standard output and standard error. Kills the process when its time is over, or on Ctrl-C."""
    left_s = terms.timeout_s
    try:
        while left_s > 0 and not terms.interruption.came:
            try:
                return process.communicate(timeout=min(left_s, LOOK_S))
            except subprocess.TimeoutExpired:
                left_s -= LOOK_S
        raise click.ClickException(f"kubectl {verb} did not end within {terms.timeout_s:g} s")
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _reason(text: str) -> str:
    """Return the line of kubectl's error output that has the reason; log lines and exit codes stand around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not _LOG_LINE.match(line) and "exit code" not in line]
    errors = [line for line in told if line.lower().startswith(("error", "unable", "the connection"))]
    return printable((errors or told[-1:] or lines[-1:] or [""])[0])[:ERROR_CHARS]
