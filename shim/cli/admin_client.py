"""Client of a running shim's admin port, with the standard library only."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

import click

from shim.cli.threads import within
from shim.config.loader import load, read_secret
from shim.config.settings import Admin
from shim.errors import ConfigError

TIMEOUT_S = 5.0
WHOLE_S = 30.0
MAX_BYTES = 64 * 1_048_576


@dataclass(frozen=True, slots=True)
class AdminPort:
    """Address of the admin port and its token (`""` if there is none).

    `timeout_s` bounds the connection, `piece_s` each piece of a response (`None`: as `timeout_s`), and `whole_s` the
    whole of it, however small the pieces. `remedy` says what to do if nobody answers, `login_remedy` if a token is
    asked for: the options differ between commands.
    """

    host: str
    port: int
    token: str = field(default="", repr=False)
    timeout_s: float = TIMEOUT_S
    whole_s: float = WHOLE_S
    piece_s: float | None = None
    remedy: str = "start the shim, or name its admin port with --url or its configuration with --config"
    login_remedy: str = "give --token-file, or --config with the shim's configuration"

    def exchange(
        self, method: str, path: str, body: str | None = None, limit_bytes: int = MAX_BYTES
    ) -> tuple[int, str]:
        """Send one request; return the status and the first bytes of the response's body as text.

        Raises `OSError`, `HTTPException`.
        """
        connection = HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        late = threading.Event()
        watch = threading.Timer(self.whole_s, lambda: _cut(sock, late))
        watch.daemon = True
        try:
            within(self.timeout_s, connection.connect)
            # Kept apart: the connection forgets a socket that the other side closes after its response.
            sock = connection.sock
            sock.settimeout(self.piece_s or self.timeout_s)
            watch.start()
            connection.request(method, path, body, {"Authorization": f"Bearer {self.token}"} if self.token else {})
            response = connection.getresponse()
            status, text = response.status, response.read(limit_bytes).decode("utf-8", "replace")
        except (OSError, HTTPException):
            if not late.is_set():
                raise
        else:
            if not late.is_set():
                return status, text
        finally:
            watch.cancel()
            connection.close()
        # The end of the stream was made here, and must not be blamed on the other side.
        raise TimeoutError(f"timed out after {self.whole_s:g} s")

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one request and return the JSON object of the response. Raises click's error with a remedy."""
        try:
            status, text = self.exchange(method, path, None if body is None else json.dumps(body))
        except (OSError, HTTPException) as error:
            why = getattr(error, "strerror", "") or str(error) or type(error).__name__
            raise click.ClickException(
                f"no answer from the admin port {self.host}:{self.port} ({why}): {self.remedy}"
            ) from None
        answer = _object(text)
        if status != 200:
            raise click.ClickException(self._refusal(status, answer or {}))
        if answer is None:
            raise click.ClickException(
                f"{self.host}:{self.port} answers no JSON object: cut off, or not a shim's admin port"
            )
        return answer

    def _refusal(self, status: int, answer: dict[str, Any]) -> str:
        said = answer.get("error") or f"the port answers {status}, which is not what a shim's admin port says"
        if status != 401:
            return str(said)
        return f"{said}; {self.login_remedy}"


def _cut(sock: socket.socket, late: threading.Event) -> None:
    """End a response that does not end by itself: the reading thread then gets the end of the stream."""
    late.set()
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _object(text: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def admin_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select a running shim; `port_of` turns them into an `AdminPort`."""
    for option in (
        click.option("--token-file", metavar="FILE", help="Holds the admin token; default: admin.token_file."),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As given to `run`."),
        click.option("--config", metavar="FILE", help="The shim's configuration: it says where its admin port is."),
        click.option("--url", metavar="URL", help="The admin port, http://host:port; default: as configured."),
    ):
        command = option(command)
    return command


def port_of(url: str | None, config: str | None, sets: tuple[str, ...], token_file: str | None) -> AdminPort:
    """Return the admin port that the options select. Raises click's errors, `ConfigError`."""
    admin = load(config, os.environ, sets).admin
    host, port = given(url) if url else configured(admin)
    path = token_file or admin.token_file
    try:
        return AdminPort(host, port, read_secret(path, f"the token file {path}") if path else "")
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


_UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - addresses to listen on


_PAGES = ("", "/", "/healthz", "/readyz", "/status.json", "/metrics")


def given(url: str) -> tuple[str, int]:
    """Return host and port of `--url`. Raises click's error for anything but http://host:port.

    A page of the admin port may stand behind that. Another path would be left out: behind a proxy that selects the shim
    by it, another shim would answer.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.path in _PAGES and not parts.query:
            return parts.hostname, parts.port or 80
    except ValueError:
        pass
    raise click.BadParameter("expected http://host:port", param_hint="--url")


def configured(admin: Admin) -> tuple[str, int]:
    """Return the address of a shim with these settings, as seen from here. Raises click's error if it is unknown."""
    if not admin.port:
        raise click.UsageError("admin.port is 0, any free port: give --url")
    return reachable(admin.hosts[0]), admin.port


def reachable(host: str) -> str:
    """Return the address to call for a server that listens on `host`."""
    return _UNSPECIFIED.get(host, host)
