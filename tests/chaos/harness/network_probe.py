"""Print as JSON what each network fault does to a connection: `python -m tests.chaos.harness.network_probe`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tests.support import network

_ECHO = """
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
server = socketserver.ThreadingTCPServer(("", {port}), Echo)
server.daemon_threads = True
print("ready", flush=True)
server.serve_forever()
"""
PORT = 9
PATIENCE_S = 3.0
BULK_BYTES = 32_000


def round_trip(connection: socket.socket, size_bytes: int = 1) -> float:
    """Seconds until all that is sent has come back. Raises `OSError`."""
    began = time.monotonic()
    connection.sendall(bytes(size_bytes))
    while size_bytes > 0:
        data = connection.recv(65_536)
        if not data:
            raise EOFError
        size_bytes -= len(data)
    return time.monotonic() - began


def seen(fault: Callable[[], AbstractContextManager[None]], size_bytes: int = 1) -> str | float:
    """What a connection that was open before sees of it: seconds, or the name of the error."""
    with socket.create_connection((network.FAR_ADDRESS, PORT), timeout=PATIENCE_S) as connection:
        round_trip(connection)
        with fault():
            try:
                return round_trip(connection, size_bytes)
            except OSError as error:
                return type(error).__name__


def main() -> int:
    code = network.reenter("tests.chaos.harness.network_probe", ())
    if code is not None:
        return code
    hosts = network.TwoHosts()
    command = [*hosts.far.inside, sys.executable, "-c", _ECHO.format(port=PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        assert echo.stdout is not None
        echo.stdout.readline()
        found = {
            "cut": seen(lambda: hosts.cut(PORT)),
            "reset": seen(lambda: hosts.reset(PORT)),
            "latency": seen(lambda: hosts.latency(PORT, 50)),
            "narrow": seen(lambda: hosts.narrow(128), BULK_BYTES),
            "loss": seen(lambda: hosts.loss(PORT, 1.0)),
        }
        with socket.create_connection((network.FAR_ADDRESS, PORT), timeout=PATIENCE_S) as connection:
            found["healed"] = round_trip(connection, BULK_BYTES)
        echo.kill()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
