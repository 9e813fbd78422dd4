"""Print as JSON what each network fault does to a connection or a look-up.

`python -m tests.chaos.harness.network_probe`
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tests.support import network
from tests.support.name_server import NameServer

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
    """Return the effect on a connection that was open before: seconds, or the name of the error."""
    with socket.create_connection((network.FAR_ADDRESS, PORT), timeout=PATIENCE_S) as connection:
        round_trip(connection)
        with fault():
            try:
                return round_trip(connection, size_bytes)
            except OSError as error:
                return type(error).__name__


async def looked_up() -> list[str]:
    """Return what a look-up yields: an address, then an error because nobody answers, then the address again."""
    names, found = NameServer(network.FAR_ADDRESS), []
    with tempfile.TemporaryDirectory() as folder:
        await names.start(Path(folder) / "resolv.conf", timeout_s=1)
        for names.hangs in (False, True, False):
            try:
                answers = await asyncio.get_running_loop().getaddrinfo(
                    "controller.test", PORT, proto=socket.IPPROTO_TCP
                )
                found.append(str(answers[0][4][0]))
            except socket.gaierror as error:
                found.append(type(error).__name__)
        names.close()
    return found


def main() -> int:
    code = network.reenter("tests.chaos.harness.network_probe", ())
    if code is not None:
        return code
    hosts = network.TwoHosts()
    names = asyncio.run(looked_up())
    command = [*hosts.far.inside, sys.executable, "-c", _ECHO.format(port=PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        assert echo.stdout is not None
        echo.stdout.readline()
        found = {
            "names": names,
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
