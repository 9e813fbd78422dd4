"""The process ends by itself after SIGTERM, whatever hangs; signals that come early or often do no harm.

What hangs here hangs for a minute or for ever: a process that waited for it would still be there. How long a stop takes
is a figure, measured by the fault harness, and no fact about somebody else's machine.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.chaos.harness.waiting import last
from tests.support.processes import STOP_S, TOKEN, Shim, world

NAME_SERVER = "127.0.0.77"


@asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A TCP server that takes connections and never says anything; its port, and an event for the first one."""
    taken = asyncio.Event()
    held: list[asyncio.StreamWriter] = []

    def take(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        taken.set()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], taken
    finally:
        server.close()
        for writer in held:
            writer.close()


def may_mount() -> bool:
    """True if a resolver configuration of the test's own can be put in place."""
    unshare = shutil.which("unshare")
    probe = [unshare or "false", "--mount", "mount", "--bind", "/etc/hosts", "/etc/resolv.conf"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not may_mount(), reason="mount namespaces are not permitted here")


@contextmanager
def silent_name_server(folder: Path) -> Iterator[tuple[Callable[[], Awaitable[bytes]], tuple[str, ...]]]:
    """A name server that answers nothing: a wait for its next question, and the words before a command that uses it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as name_server:
        name_server.bind((NAME_SERVER, 53))
        name_server.setblocking(False)
        resolver = folder / "resolv.conf"
        resolver.write_text(f"nameserver {NAME_SERVER}\nsearch a.test b.test c.test\noptions timeout:9 attempts:5\n")
        mount = f'mount --bind {resolver} /etc/resolv.conf && exec "$@"'

        async def asked() -> bytes:
            async with asyncio.timeout(STOP_S):
                return await asyncio.get_running_loop().sock_recv(name_server, 512)

        yield asked, ("unshare", "--mount", "sh", "-c", mount, "sh")


@needs_mounts
async def test_a_name_server_that_answers_nothing(tmp_path: Path) -> None:
    with silent_name_server(tmp_path) as (asked, before):
        async with Shim(tmp_path, {"upstream": {"url": "https://vendor.test", "token": "tok-abc"}}) as shim:
            shim.program = (*before, *shim.program)
            await shim.start()
            await asked()
            assert await shim.stop() == 0
            assert shim.events("stopped")


@needs_mounts
async def test_a_name_server_that_answers_nothing_about_our_own_address(tmp_path: Path) -> None:
    """The event loop waited for the answer, so that no signal was taken."""
    with silent_name_server(tmp_path) as (asked, before):
        async with Shim(tmp_path, {"admin": {"host": "shim.test"}, "upstream": {"token": "tok-abc"}}) as shim:
            shim.program = (*before, *shim.program)
            await shim.launch()
            await asked()
            assert await shim.stop() == 0


@needs_mounts
@pytest.mark.parametrize(
    "command",
    [
        ("doctor", "--set=upstream.url=https://vendor.test", "--set=upstream.token=t", "--set=admin.port=1"),
        ("status", "--url=http://shim.test:7090"),
        ("health", "--url=http://shim.test:7090"),
    ],
    ids=lambda command: command[0],
)
async def test_no_command_waits_for_a_name_server_that_answers_nothing(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """The resolver would go on for three minutes."""
    with silent_name_server(tmp_path) as (_, before):
        words = (*before, sys.executable, "-m", "shim", *command)
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path
        )
        try:
            async with asyncio.timeout(100):
                told, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 1
        assert b"no answer" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_proxy_that_accepts_and_says_nothing(number: signal.Signals, tmp_path: Path) -> None:
    async with silent_server() as (port, taken):
        upstream = {"url": "https://vendor.test", "token": "tok-abc", "proxy": f"http://127.0.0.1:{port}"}
        async with Shim(tmp_path, {"upstream": {**upstream, "connect_timeout_s": 60}}) as shim:
            await shim.start()
            async with asyncio.timeout(STOP_S):
                await taken.wait()
            assert await shim.stop(number) == 0


async def test_a_controller_that_accepts_and_says_nothing(tmp_path: Path) -> None:
    async with silent_server() as (port, taken):
        upstream = {"url": f"http://127.0.0.1:{port}", "token": "tok-abc", "connect_timeout_s": 60}
        async with Shim(tmp_path, {"upstream": upstream}) as shim:
            await shim.start()
            async with asyncio.timeout(STOP_S):
                await taken.wait()
            assert await shim.stop() == 0


@pytest.mark.parametrize("step", ["open", "close"])
async def test_a_store_on_a_disk_that_hangs(step: str, tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        shim.program = (sys.executable, "-m", "tests.support.stalled_shim", step)
        shim.environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        await shim.launch()
        if step == "open":
            await shim.output("stalled: open")
        else:
            await shim.event("serving")
        await shim.stop()
        assert shim.events("stopped")
        if step == "close":
            assert [failed["error"] for failed in shim.events("stop_failed")] == ["TimeoutError"]


def waiting_bytes(read_fd: int) -> int:
    """How much is in the pipe."""
    return int.from_bytes(fcntl.ioctl(read_fd, termios.FIONREAD, b"\0" * 4), sys.byteorder)


async def test_a_log_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """Agents are answered as ever, and the process ends."""
    ready = tmp_path / "ready.json"
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    sets = {
        "listen.port": 0,
        "admin.port": 0,
        "log.level": "debug",
        "upstream.reconnect.initial_s": 0.01,  # each attempt is logged
        "upstream.reconnect.max_s": 0.01,
        "store.path": tmp_path / "db",
        "upstream.url": "http://127.0.0.1:1",
        "upstream.token": "tok-abc",
    }
    options = [f"--set={key}={value}" for key, value in sets.items()]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shim", "run", "--ready-file", str(ready), *options), stderr=write_fd
    )
    os.close(write_fd)
    try:
        async with asyncio.timeout(STOP_S):
            while not ready.exists() or waiting_bytes(read_fd) < 4096 - 512:
                await last(0.05)
        url = f"http://{json.loads(ready.read_text())['listen']}"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=STOP_S)) as session:
            for number in range(20):
                async with session.get(f"{url}/nowhere/{number}") as response:
                    assert response.status == 404
            async with session.get(f"{url}/api/v1/health") as response:
                assert response.status == 200
        process.terminate()
        async with asyncio.timeout(STOP_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(read_fd)


async def test_signals_that_come_early_or_often(tmp_path: Path) -> None:
    async with world(tmp_path, {"poll": {"hold": "off"}}) as (shim, _):
        # at once, as PID 1 it would be lost: before the event loop runs the process just ends
        await shim.launch()
        assert await shim.stop() in (0, -signal.SIGTERM)
        # SIGHUP during the start is no end, and the configuration is read again at most once for it
        await shim.launch()
        await shim.event("serving", len(shim.lines))
        for _ in range(100):
            shim.send(signal.SIGHUP)
        await shim.event("config_reloaded")
        assert await shim.stop() == 0


async def test_sighup_during_the_start_is_taken(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        shim.program = (sys.executable, "-m", "tests.support.stalled_shim", "open")
        shim.environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        await shim.launch()
        await shim.output("stalled: open")
        shim.send(signal.SIGHUP)
        shim.send(signal.SIGHUP)
        await shim.stop()
        assert shim.events("stopped")


async def test_sighup_beside_a_changed_file_reloads_once(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    async with world(tmp_path, {"upstream": {"token": "", "token_file": str(token)}}) as (shim, _):
        await shim.start()
        shim.write({"poll": {"frequency_s": 7}})
        shim.send(signal.SIGHUP)
        await shim.event("config_reloaded")
        # Both files are looked at together: what follows from this one comes after all that follows from the other.
        token.write_text("tok-another")
        await shim.event("token_changed")
        assert len(shim.events("config_reloaded")) == 1
