"""Starts `bench.load` and reads what it found."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from bench.load import Found, Plan
from bench.servers import OTHER_CORES, end, spawn


def run(plan: Plan) -> Found:
    """Carry a plan out."""
    with start(plan) as process:
        return found(process)


@contextmanager
def start(plan: Plan) -> Iterator[subprocess.Popen[bytes]]:
    """A plan that is being carried out; it ends with the block."""
    process = spawn(["-m", "bench.load"], OTHER_CORES, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(plan) + b"\n")
        process.stdin.flush()
        yield process
    finally:
        end(process)
        process.stdout.close()


def held(process: subprocess.Popen[bytes]) -> int:
    """Wait until all requests of a plan in the mode `held` or `polling` are out; how many."""
    assert process.stdout is not None
    return int(json.loads(process.stdout.readline())["held"])


def found(process: subprocess.Popen[bytes]) -> Found:
    """Wait for the end of a plan; what it found. Raises `RuntimeError` if it failed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the load generator failed")
    return msgspec.json.decode(line, type=Found)
