"""A PostgreSQL server of this machine's own packages, on loopback, that lives as long as the demo."""

from __future__ import annotations

import asyncio
import os
import pwd
import secrets
import shutil
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from devtools.demo.processes import ChildFailed, ChildProcess

# Debian keeps the server's programs off the PATH, in a directory for each version.
DEBIAN = Path("/usr/lib/postgresql")
_USER = "shim"
_ALL_MAY_PASS = 0o711


def missing(debian: Path = DEBIAN) -> str:
    """Say what several replicas need and this machine does not have, with what to do; "" if all is there."""
    if programs(debian) is None:
        return (
            "no PostgreSQL server is installed (initdb and postgres, on the PATH or in /usr/lib/postgresql). "
            "Debian and Ubuntu: apt-get install postgresql; macOS: brew install postgresql"
        )
    if find_spec("psycopg") is None:
        return "the extra agent-shim[postgres] is missing: pip install 'agent-shim[postgres]'"
    return ""


def programs(debian: Path = DEBIAN) -> Path | None:
    """Return the directory of the server's programs: that of the PATH, or Debian's newest."""
    versions = sorted(debian.glob("*/bin"), key=_version, reverse=True)
    on_path = (Path(each) for each in os.get_exec_path() if each)
    return next((each for each in (*on_path, *versions) if _has_programs(each)), None)


def _version(folder: Path) -> float:
    with suppress(ValueError):
        return float(folder.parent.name)
    return 0


def _has_programs(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in ("initdb", "postgres"))


class PostgresServer(ChildProcess):
    """The server as a process of the demo; its data are in `folder` and go with it."""

    # Fast shutdown: SIGTERM would wait for connections that nobody closes any more.
    _stop_signal = signal.SIGINT

    def __init__(self, folder: Path, programs: Path) -> None:
        super().__init__("postgresql", folder)
        self._folder = folder
        self._home = folder / "postgresql"
        self._programs = programs
        self._port = 0
        self.password_file = folder / "database-password"

    @property
    def url(self) -> str:
        """The value of `store.url`; the password is in `password_file`."""
        return f"postgresql://{_USER}@127.0.0.1:{self._port}/postgres"

    async def start(self, args: Sequence[str]) -> dict[str, str]:
        """Make the data directory, start the server, and return `{"url": …}` once it takes connections."""
        self._home.mkdir()
        self.password_file.touch(mode=0o600)
        self.password_file.write_text(secrets.token_hex(16))
        password = self._home / "password"
        password.touch(mode=0o600)
        password.write_text(self.password_file.read_text())
        if user := self._user():
            self._folder.chmod(_ALL_MAY_PASS)
            for path in (self._home, password):
                shutil.chown(path, user, user)
        await self._initdb(password)
        self._port = _free_port()
        return await super().start(args)

    def _command(self, args: Sequence[str]) -> Sequence[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
        }
        given = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return (str(self._programs / "postgres"), "-D", str(self._data), *given, *args)

    def _ready(self, pid: int) -> dict[str, str] | None:
        with suppress(OSError):
            lines = (self._data / "postmaster.pid").read_text().split()
            if lines[:1] == [str(pid)] and lines[-1] == "ready":
                return {"url": self.url}
        return None

    def _options(self) -> dict[str, Any]:
        user = self._user()
        return {"cwd": self._home} | ({"user": user, "group": user, "extra_groups": ()} if user else {})

    @property
    def _data(self) -> Path:
        return self._home / "data"

    async def _initdb(self, password: Path) -> None:
        options = ("-D", str(self._data), "-U", _USER, "--auth=scram-sha-256", f"--pwfile={password}")
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(str(self._programs / "initdb"), *options, "-E", "UTF8", "--no-locale", "-N"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._options(),
            )
        try:
            await asyncio.shield(process.wait())
        except asyncio.CancelledError:
            # It ends within seconds by itself; killed, it would leave a process that still writes to the directory.
            await process.wait()
            raise
        if process.returncode:
            raise ChildFailed(f"initdb ended with exit code {process.returncode}: {' '.join(self.tail()[-1:])}")

    @staticmethod
    def _user() -> str | None:
        """Return the user that runs the server where we are root, which PostgreSQL refuses; else `None`, ourselves."""
        if os.getuid() != 0:
            return None
        known = {each.pw_name for each in pwd.getpwall()}
        return next((each for each in ("postgres", "nobody") if each in known), None)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
