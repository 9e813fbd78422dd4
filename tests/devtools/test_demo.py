"""The demo as people run it, and what its parts do when something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from devtools.demo import main as demo_main
from devtools.demo.console import Console, StepFailed
from devtools.demo.gateway_scenario import Service
from devtools.demo.postgres import PostgresServer, missing
from devtools.demo.processes import ChildFailed, ChildProcess
from devtools.demo.scenario import Scenario
from shim.clock import Clock

CONTROLLER = ["controller", "--listen", "127.0.0.1:0", "--token", "t"]


class Demo:
    """`agent-shim demo` as a process; its temporary files are under `folder`."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.lines: list[str] = []

    @classmethod
    async def start(cls, folder: Path, *args: str) -> Demo:
        environment = os.environ | {"TMPDIR": str(folder)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shim", "demo", *args),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
        )
        return cls(process, folder)

    async def line(self, text: str) -> str:
        """Read on to a line that holds `text`."""
        assert self.process.stdout is not None
        while found := (await self.process.stdout.readline()).decode():
            self.lines.append(found)
            if text in found:
                return found
        raise AssertionError(f"no line with {text!r}:\n{''.join(self.lines)}")

    async def end(self) -> tuple[int, str]:
        """Its exit code and everything it printed; nothing that it started is left."""
        assert self.process.stdout is not None
        rest = (await self.process.stdout.read()).decode()
        code = await self.process.wait()
        assert list(self.folder.iterdir()) == []
        return code, "".join(self.lines) + rest

    def child(self, name: str) -> int:
        """The pid of a child that has become ready."""
        (file,) = self.folder.glob(f"agent-shim-demo-*/{name}.ready.json")
        pid: int = json.loads(file.read_text())["pid"]
        return pid

    async def killed(self, name: str, pid: int, said: str) -> str:
        """Kill a child once its log contains `said`, and return the log's last line.

        The demo is paused meanwhile: it takes no further step. A process is ready before its log is on disk.
        """
        self.process.send_signal(signal.SIGSTOP)
        try:
            (log,) = self.folder.glob(f"agent-shim-demo-*/{name}.log")
            async with asyncio.timeout(60):
                while said not in log.read_text():  # noqa: ASYNC110 - another process writes the file
                    await asyncio.sleep(0.02)
            os.kill(pid, signal.SIGKILL)
            return log.read_text().splitlines()[-1]
        finally:
            self.process.send_signal(signal.SIGCONT)

    async def all_end_with_it(self, pids: list[int]) -> None:
        """Kill it, and wait until its children have ended."""
        assert all(map(alive, pids))
        self.process.kill()
        async with asyncio.timeout(120):
            while any(map(alive, pids)):  # noqa: ASYNC110 - the children of another process
                await asyncio.sleep(0.02)

    def database(self) -> int:
        """The pid of the demo's PostgreSQL server, which is ready."""
        (file,) = self.folder.glob("agent-shim-demo-*/postgresql/data/postmaster.pid")
        return int(file.read_text().split()[0])


def alive(pid: int) -> bool:
    """Return True if a process runs. One that nobody has waited for after its end does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.timeout(400)
async def test_once_shows_every_step_and_ends_with_0(tmp_path: Path) -> None:
    demo = await Demo.start(tmp_path, "--once")
    code, out = await demo.end()
    assert code == 0, out
    assert "\x1b" not in out
    assert "✗" not in out
    for step in (
        "agent registered .* HTTP 200, cluster id ",
        r"heartbeats coalesced .* 6 from the agent \(HTTP 204\), 1 upstream",
        "in the agent's hand .* ms ",
        "result back at the controller .* ms ",
        "the agent notices nothing .* 3 heartbeats and the result answered, HTTP 204 and 204",
        "registration replayed by the shim ",
        "the kept result arrives ",
        "the command survived .*; 0 new registrations",
        "and so did its result ",
    ):
        assert re.search(f"✓  {step}", out), step


@pytest.mark.timeout(400)
async def test_it_stays_until_ctrl_c_and_its_commands_work(tmp_path: Path) -> None:
    demo = await Demo.start(tmp_path)
    push = await demo.line("/control/commands")
    url, body = re.search(r"curl -s (\S+) -d '(.*)'", push).groups()  # type: ignore[union-attr]
    await demo.line("Ctrl-C ends it")
    pids = [demo.child("controller"), demo.child("shim")]
    async with aiohttp.ClientSession() as session:
        async with session.post(url, data=body) as response:
            ident = (await response.json())["ids"][0]
        assert f"hello, {ident}" in await demo.line("command in the agent's hand")
        await demo.line("result posted")
        async with session.post(url.replace("commands", "drop")) as response:
            assert response.status == 200
        await demo.line("link closed")
    demo.process.send_signal(signal.SIGINT)
    code, out = await demo.end()
    assert code == 0, out
    assert not any(map(alive, pids))


async def test_a_shim_that_dies_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    demo = await Demo.start(tmp_path, "--once")
    await demo.line("shim serves")
    last_words = await demo.killed("shim", demo.child("shim"), '"event": "serving"')
    code, out = await demo.end()
    assert code == 1
    assert "The demo failed: the shim ended with exit code -9" in out
    assert last_words in out


class DyingScenario(Scenario):
    """A step that fails at once when a child process dies, before the loop has learned of the end."""

    async def tell(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        await self._start_controller("127.0.0.1:0")
        os.kill(self._controller._process.pid, signal.SIGKILL)
        raise StepFailed("no answer")

    def show_commands(self) -> None:
        raise AssertionError("a failed scenario has nothing to try")


async def test_the_end_of_a_child_is_the_cause_of_a_step_that_failed_with_it(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    stage = Console(out, clock, colour=False)
    story = DyingScenario(stage, clock, [ChildProcess("controller", tmp_path)])
    assert await demo_main.perform(story, stage, once=True) == 1
    assert "The demo failed: the controller ended with exit code -9\n" in out.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.timeout(400)
async def test_what_it_started_ends_when_it_is_killed(tmp_path: Path) -> None:
    demo = await Demo.start(tmp_path)
    await demo.line("Ctrl-C ends it")
    await demo.all_end_with_it([demo.child("controller"), demo.child("shim")])


async def test_ctrl_c_before_the_end_is_130(tmp_path: Path) -> None:
    demo = await Demo.start(tmp_path)
    await demo.line("development controller listens")
    pid = demo.child("controller")
    demo.process.send_signal(signal.SIGTERM)
    code, out = await demo.end()
    assert code == 130
    assert "Stopping." in out
    assert not alive(pid)


# --- several replicas


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A directory that the server's user may enter; pytest's are for their owner alone."""
    folder = Path(tempfile.mkdtemp(prefix="agent-shim-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(400)
async def test_gateway_once_kills_the_owner_and_what_waited_arrives_once(open_folder: Path) -> None:
    demo = await Demo.start(open_folder, "--gateway", "--once")
    code, out = await demo.end()
    assert code == 0, out
    assert "✗" not in out
    for step in (
        "PostgreSQL takes connections .* postgresql://shim@127.0.0.1:",
        "shards shared out .* north 8, south 8",
        r"the first agent calls the other .* (\w+) owns its shard, (?!\1)\w+ answers and forwards \([1-9]",
        "in the agent's hand .* since the controller sent it",
        "5 more commands are kept .* committed in PostgreSQL, then acknowledged",
        r"replica (north|south) killed \(kill -9\)",
        r"has its links +[0-9.]+ s  since the kill; registration replayed, 0 by the agent",
        "what waited arrives, in order .* 6 commands, (each once|again with a reason)",
        "and so do the results .* 6 at the controller",
        "shards shared out anew .* north 8, south 8",
        "every link is up ",
    ):
        assert re.search(f"✓  .*{step}", out), (step, out)


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(400)
async def test_gateway_ends_all_it_started_on_ctrl_c(open_folder: Path) -> None:
    demo = await Demo.start(open_folder, "--gateway")
    await demo.line("shards shared out")
    pids = [demo.database(), *(demo.child(name) for name in ("controller", "north", "south"))]
    assert all(map(alive, pids))
    demo.process.send_signal(signal.SIGINT)
    code, out = await demo.end()
    assert code == 130, out
    assert not any(map(alive, pids))


@pytest.mark.needs("postgresql")
@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.timeout(400)
async def test_what_gateway_started_ends_when_it_is_killed(open_folder: Path) -> None:
    demo = await Demo.start(open_folder, "--gateway")
    await demo.line("shards shared out")
    await demo.all_end_with_it([demo.database(), *(demo.child(name) for name in ("controller", "north", "south"))])


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(400)
async def test_gateway_whose_database_dies_is_a_failure_with_its_last_words(open_folder: Path) -> None:
    demo = await Demo.start(open_folder, "--gateway", "--once")
    await demo.line("replica north serves")
    north = demo.child("north")
    last_words = await demo.killed("postgresql", demo.database(), "database system is ready to accept connections")
    code, out = await demo.end()
    assert code == 1, out
    assert "The demo failed: the postgresql ended with exit code -9" in out
    assert last_words in out
    assert not alive(north)


@pytest.mark.needs("postgresql")
def test_gateway_without_the_extra_says_so_in_one_line() -> None:
    code = "import sys; sys.modules['psycopg'] = None; from shim.cli.main import main; main(['demo', '--gateway'])"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert "pip install 'agent-shim[postgres]'" in done.stderr


def test_gateway_without_a_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = missing(debian=tmp_path)
    assert "apt-get install postgresql" in said
    assert "\n" not in said


async def test_a_database_that_cannot_be_made_is_named(open_folder: Path) -> None:
    programs = open_folder / "bin"
    programs.mkdir()
    (programs / "initdb").symlink_to("/bin/false")
    server = PostgresServer(open_folder, programs)
    with pytest.raises(ChildFailed, match="initdb ended with exit code 1"):
        await server.start([])
    await server.stop()


async def test_the_service_of_the_demo_goes_to_whoever_takes_connections() -> None:
    async with contextlib.AsyncExitStack() as stack:
        replicas = {}
        for name in ("west", "north", "south"):

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                writer.write(f"{name}\n".encode())
                await reader.read()
                writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            stack.callback(server.close)
            replicas[name] = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            if name == "west":
                server.close()
                await server.wait_closed()
        service = Service(replicas)
        port = int((await service.listen()).rpartition(":")[2])
        stack.callback(service.close)
        service.prefer("south")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.readline(), service.reached) == (b"south\n", "south")
        service.prefer("west")
        assert await reader.read() == b"", "what was open ends"
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.readline(), service.reached) == (b"north\n", "north")
        writer.close()
        await writer.wait_closed()
        # The handlers of both sides end with their connections; a loop that ended before them would warn.
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))


# --- parts


async def test_a_child_that_cannot_start_is_named(tmp_path: Path) -> None:
    child = ChildProcess("controller", tmp_path)
    assert (child.fate, child.tail()) == ("was never started", [])
    with pytest.raises(ChildFailed, match="the controller ended with exit code 2"):
        await child.start(["controller", "--listen", "nonsense"])
    assert any("HOST:PORT" in line for line in child.tail())


async def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    child = ChildProcess("controller", tmp_path, stop_s=0.05)
    ready: dict[str, Any] = await child.start(CONTROLLER)
    assert child.fate == "is running"
    os.kill(ready["pid"], signal.SIGSTOP)
    await child.stop()
    assert child.fate == "ended with exit code -9"
    await child.stop()
    await child.guard()


async def test_a_guard_tells_of_a_death_that_nobody_ordered(tmp_path: Path) -> None:
    child = ChildProcess("controller", tmp_path)
    ready: dict[str, Any] = await child.start(CONTROLLER)
    async with asyncio.TaskGroup() as group:
        guard = group.create_task(_outcome(child))
        os.kill(ready["pid"], signal.SIGKILL)
    assert guard.result() == "the controller ended with exit code -9"


async def _outcome(child: ChildProcess) -> str:
    try:
        await child.guard()
    except ChildFailed as error:
        return str(error)
    return ""


class Screen(io.StringIO):
    """A stream that may be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


async def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = {}
    for terminal in (True, False):
        for colour in (True, False):
            screen = Screen(terminal)
            async with Console(screen, Clock(), colour=colour).step("a step") as step:
                step.detail, step.took_s = "went well", 0.5
            shown[terminal, colour] = screen.getvalue()
    assert {key for key, text in shown.items() if "\x1b[32m✓" in text} == {(True, True)}
    assert all(re.search(r"✓.*a step +.*500 ms.*went well", text) for text in shown.values())
    assert "…" not in shown[False, True]
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(terminal=True)
    Console(screen, Clock(), colour=True).headline("x")
    assert screen.getvalue() == "\nx\n"


async def test_a_step_that_fails_or_takes_too_long_says_so() -> None:
    screen = Screen(terminal=False)
    stage = Console(screen, Clock(), colour=False)
    with pytest.raises(StepFailed, match=r"waits: nothing happened within 0.01 s"):
        async with stage.step("waits", 0.01):
            await asyncio.Event().wait()
    with pytest.raises(StepFailed, match="breaks: KeyError"):
        async with stage.step("breaks"):
            raise KeyError
    assert len(re.findall("✗", screen.getvalue())) == 2
