"""A test run that is killed leaves no PostgreSQL server and none of its files behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("postgresql")
ROOT = Path(__file__).parents[1]
TIMEOUT_S = 60.0
RUN = """
import signal, sys
from tests.support import postgres

with postgres.running() as server:
    if sys.argv[1] == "paused":
        server.pause()
    print(server.directory, postgres._template().directory, server.port, flush=True)
    signal.pause()
"""


def until(gone: Callable[[], bool]) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    while not gone():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("state", ["running", "paused"])
def test_servers_of_a_run_that_is_killed_end_and_their_files_go(state: str) -> None:
    with subprocess.Popen([sys.executable, "-c", RUN, state], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        directory, template, port = run.stdout.readline().split()
        assert Path(directory, "data").exists()
        assert not refuses(int(port))
        run.kill()
    until(lambda: refuses(int(port)) and not any(map(os.path.exists, (directory, template))))
