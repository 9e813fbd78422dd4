"""`agent-shim health`: exit codes and texts."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest


class Admin(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        well = self.path == "/healthz"
        body = b'{"status": "ok"}' if well else b'{"reasons": ["no store"]}'
        self.send_response(200 if well else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Admin) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def health(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shim", "health", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_shim_that_lives(port: int) -> None:
    done = health("--url", f"http://127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (0, '{"status": "ok"}\n')


def test_a_shim_that_is_not_ready(port: int) -> None:
    done = health("--url", f"http://127.0.0.1:{port}", "--ready")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == '503 {"reasons": ["no store"]}\n'


def test_the_configuration_says_where_and_a_wildcard_is_asked_on_loopback(port: int, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"admin: {{host: 0.0.0.0, port: {port}}}\n")
    assert health("--config", str(config)).returncode == 0
    assert health("--config", str(config), "--set", "admin.host=127.0.0.1").returncode == 0


def test_nobody_there(port: int) -> None:
    taken = port
    with HTTPServer(("127.0.0.1", 0), Admin) as unused:
        free = unused.server_port
    assert free != taken
    done = health("--url", f"http://127.0.0.1:{free}", "--timeout", "0.5")
    assert done.returncode == 1
    assert f"no answer from the admin port 127.0.0.1:{free}" in done.stderr


@pytest.mark.parametrize(
    "args", [("--url", "tcp://x"), ("--url", "http://x:port"), ("--set", "admin.port=0"), ("--set", "a=b")]
)
def test_wrong_uses(args: tuple[str, ...]) -> None:
    assert health(*args).returncode == 2


def test_waiting_for_a_shim_that_starts() -> None:
    with HTTPServer(("127.0.0.1", 0), Admin, bind_and_activate=False) as server:
        server.server_bind()
        command = [
            sys.executable,
            "-m",
            "shim",
            "health",
            "--url",
            f"http://127.0.0.1:{server.server_port}",
            "--wait",
            "30",
        ]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # Bound and not listening, it refuses; only then does it begin to answer.
        with pytest.raises(ConnectionRefusedError), socket.create_connection(server.server_address):
            pass
        server.server_activate()
        server.handle_request()
        assert waiting.communicate(timeout=120)[0] == '{"status": "ok"}\n'
        assert waiting.returncode == 0
