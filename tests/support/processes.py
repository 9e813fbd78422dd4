"""The real shim and the real development controller as processes, watched by what they say."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml

from devtools.controller.client import ControlClient

TOKEN = "tok-of-the-cluster"
START_S = 60.0
STOP_S = 40.0
GRACE_S = 10.0
UNMEASURED = {"COVERAGE_PROCESS_CONFIG": ""}
"""Environment of a process whose coverage adds nothing: what it runs of the package is measured by tests of its own."""


def free_port() -> int:
    """A port that nobody uses now: for a process that must come back on the same one.

    It is none of those that the kernel gives to connections: while the process is down, somebody else's connection
    (even an agent's own one to this very port) would get it, and the process could not come back. Until this process
    ends, no other test process is given the same port: an abstract socket with the port's number stands for it.
    """
    kernel = Path("/proc/sys/net/ipv4/ip_local_port_range")
    below = int(kernel.read_text().split()[0]) if kernel.exists() else 32_768
    candidates = range(min(10_000, below - 1_000), below)
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.SystemRandom().choice(candidates)
            probe.bind(("", port))
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0agent-shim-test-port-{port}")
            except OSError:
                claim.close()
                continue
            claim.detach()  # kept open until this process ends
            return port


@contextmanager
def refusing_port() -> Iterator[int]:
    """A port on which nobody listens, and which nobody else can take meanwhile."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield int(unused.getsockname()[1])


class _Child:
    """A child process whose output lines can be awaited. It is killed when its block is left.

    `program` and `environment` (what is added to ours) may be changed before a start; `on_line` is told each line.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.program: tuple[str, ...] = (sys.executable, "-m", "shim")
        self.environment: dict[str, str] = {}
        self.on_line: Callable[[str], None] = lambda line: None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._grown = asyncio.Condition()

    async def _spawn(self, *args: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(*self.program, *args),
            env=os.environ | self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**24,
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self.lines.append(line.decode(errors="replace").rstrip("\n"))
            self.on_line(self.lines[-1])
            async with self._grown:
                self._grown.notify_all()
        async with self._grown:
            self._grown.notify_all()

    async def _line(self, found: Callable[[str], bool], after: int = 0, timeout_s: float = START_S) -> int:
        """Wait for a line; its index."""
        reader = self._reader
        assert reader is not None
        async with asyncio.timeout(timeout_s), self._grown:
            at = after
            while True:
                for index in range(at, len(self.lines)):
                    if found(self.lines[index]):
                        return index
                at = len(self.lines)
                assert not reader.done(), "the process ended:\n" + "\n".join(self.lines[-30:])
                await self._grown.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal, and after SIGSTOP wait until all threads stand still: a busy machine lets some run on.

        `subprocess` would collect the exit code of a process that has just ended, and asyncio would never get it.
        Raises `ProcessLookupError` if the process is known to have ended.
        """
        assert self._process is not None
        if self._process.returncode is not None:
            raise ProcessLookupError
        os.kill(self._process.pid, number)
        if number is signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    async def wait(self) -> int:
        """Wait for the end; the exit code."""
        assert self._process is not None
        assert self._reader is not None
        async with asyncio.timeout(STOP_S):
            await self._reader
            return await self._process.wait()

    async def kill(self) -> None:
        """Kill the process, as a crash does."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self.wait()

    async def __aexit__(self, *exc: object) -> None:
        """End it in an orderly way where it can still do so: a process that is killed tells no coverage."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(GRACE_S):
                    await process.wait()
            except TimeoutError:
                await self.kill()
        if self._reader is not None:
            async with asyncio.timeout(STOP_S):
                await self._reader


class Shim(_Child):
    """`agent-shim run`; `config` is written to a file and may be changed with `write`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__()
        self._path = folder / "agent-shim.yaml"
        self.config = {
            "listen": {"port": 0},
            "admin": {"port": 0},
            "store": {"path": str(folder / "agent-shim.db")},
        } | config
        self.write(self.config)
        self.url = ""
        self.admin = ""

    def write(self, config: dict[str, Any]) -> None:
        """Replace the configuration file in one step, as an editor or a ConfigMap does."""
        temporary = self._path.with_suffix(".new")
        temporary.write_text(yaml.safe_dump(self.config | config))
        temporary.replace(self._path)

    async def start(self, *args: str) -> Shim:
        """Start it and wait until it serves."""
        after = len(self.lines)
        await self.launch(*args)
        serving = await self.event("serving", after)
        self.url, self.admin = f"http://{serving['listen']}", f"http://{serving['admin']}"
        return self

    async def launch(self, *args: str) -> None:
        """Start it without expecting that it will serve."""
        await self._spawn("run", "--config", str(self._path), *args)

    async def output(self, text: str, after: int = 0) -> None:
        """Wait for a line with this text."""
        await self._line(lambda line: text in line, after)

    async def event(self, name: str, after: int = 0, **fields: Any) -> dict[str, Any]:
        """Wait for a log event with these fields."""

        def found(line: str) -> bool:
            entry = _entry(line)
            return entry.get("event") == name and all(entry.get(key) == value for key, value in fields.items())

        return _entry(self.lines[await self._line(found, after)])

    async def line(self, part: str) -> None:
        """Wait for a log line that contains this text."""
        await self._line(lambda line: part in line)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log events of this name so far."""
        return [entry for entry in map(_entry, self.lines) if entry.get("event") == name]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal; the exit code."""
        self.send(number)
        return await self.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__()
        if error is not None:
            print(*self.lines[-60:], sep="\n")


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


class Controller(_Child):
    """`agent-shim controller` on a port that stays the same when it is killed and started again."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession, *options: str) -> None:
        super().__init__()
        # Half of its start was measuring it, and reading the system's authorities, which aiohttp does at once: it calls
        # nobody.
        self.environment = UNMEASURED | {"SSL_CERT_FILE": os.devnull}
        self._options = ("--state", str(folder / "controller.json"), "--token", TOKEN, *options)
        self._session = session
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        self.api = ControlClient(session, self.url)

    async def start(self) -> Controller:
        """Start it and wait until it listens."""
        after = len(self.lines)
        await self._spawn("controller", "--listen", self.address, *self._options)
        await self._line(lambda line: self.address in line, after)
        return self

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        """One call of the control API."""
        data = None if body is None else io.BytesIO(json.dumps(body).encode())  # a large one in pieces
        async with self._session.request(method, self.url + path, data=data) as response:
            assert response.status < 300, await response.text()
            return await response.json()

    async def until(self, count: int = 1, after: int = 0, **filters: str) -> list[dict[str, Any]]:
        """Wait for so many events of the history that pass the filters (`type`, `kind`, `direction`)."""
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(START_S):
            while len(found) < count:
                events, after = await self.api.events(after, 10, **filters)
                found += events
        return found

    async def __aenter__(self) -> Self:
        return self


@asynccontextmanager
async def world(
    folder: Path, config: dict[str, Any] | None = None, *options: str
) -> AsyncIterator[tuple[Shim, Controller]]:
    """A controller that serves and a shim that is configured for it with the controller's token, not yet started."""
    async with aiohttp.ClientSession() as session, Controller(folder, session, *options) as controller:
        await controller.start()
        upstream = {"url": controller.url, "token": TOKEN}
        given = dict(config or {})
        upstream |= given.pop("upstream", {})
        async with Shim(folder, {"upstream": upstream, **given}) as shim:
            yield shim, controller
