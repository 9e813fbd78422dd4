"""Keeps the shim and the controller running as an orchestrator does, and turns what they say into events."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from devtools.controller.client import ControlClient, ControlError
from shim.protocol.rfc3339 import parse_rfc3339
from tests.chaos.harness import events as ev
from tests.chaos.harness.waiting import last, true_within, waited_for_cpu_s
from tests.support.network import Host
from tests.support.processes import Shim, _Child, free_port

TOKEN = "tok-of-the-harness"
RESTART_S = 0.3
START_S = 60.0
SOUND = (sys.executable, "-m", "shim")
DOUBTFUL = (sys.executable, "-m", "tests.chaos.harness.faulty_shim")
EXIT_STORE = 70
EXIT_STORE_VERSION = 78

# Errors that the faults explain; anything else that is said at this level, and any traceback, is a defect.
_EXPLAINED = frozenset(
    {
        "token_refused",
        "link_contended",
        "command_not_stored",
        "offer_not_stored",
        "store_moved_aside",
        "store_version",
        "store_rows_quarantined",
        "stopped_by_fault",
        "shard_not_opened",
    }
)

# Steps of a stop are given up after some seconds. A store that cannot be used explains that, and so does a machine
# that leaves the shim without a processor for so long within the stop.
_EXPLAINED_IN_A_STOP = frozenset({"stop_failed", "stop_forced"})
STARVED_S = 0.5

Note = Callable[[ev.AnyEvent], None]


class ShimKeeper:
    """Keep the shim running. A life that has seen its store `in_trouble` may have refused to start."""

    def __init__(
        self,
        shim: KeptShim,
        config: Path,
        note: Note,
        inside: tuple[str, ...] = (),
        waited_s: Callable[[int], float] = waited_for_cpu_s,
    ) -> None:
        """`inside`: the command prefix that starts it on another host."""
        self.serving = asyncio.Event()
        self.url = ""
        self.admin = ""
        self.deaths = 0
        self._shim = shim
        self._config = config
        self._note = note
        self._inside = inside
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._held = 0
        self._armed: tuple[str, ...] = ()
        self._within: tuple[str, ...] = ()
        self._troubles: Counter[int] = Counter()
        self._explained: set[int] = set()
        self._expected = ""
        self.was_paused = False
        self._waited_s = waited_s
        self._waited_before_s = 0.0
        self._gone = asyncio.Event()
        shim.on_line = self._on_line

    @property
    def pid(self) -> int:
        return self._shim.pid

    async def run(self) -> None:
        """Start it, and start it again whenever it ends, until cancelled."""
        while True:
            await self._may_run.wait()
            (options, self._armed), (within, self._within) = (self._armed, ()), (self._within, ())
            armed = " ".join(options) or ("a limit of memory" if within else "")
            self._shim.program = (*self._inside, *within, *((*DOUBTFUL, *options) if options else SOUND))
            self._expected = ""
            self._explained = set(+self._troubles)
            self.was_paused = False
            self._gone.clear()
            self._note(ev.Life(time.monotonic(), "shim", born=True, detail=armed))
            code = await self._shim.live("run", "--config", str(self._config))
            self.serving.clear()
            self.deaths += 1
            self._note(ev.Life(time.monotonic(), "shim", born=False, detail=self._fate(code, armed)))
            self._gone.set()
            await last(RESTART_S)

    def _fate(self, code: int, armed: str) -> str:
        if code == -signal.SIGKILL and (self._expected == "killed" or armed):
            return self._expected or f"died of {armed}"
        if code == 0 and self._expected == "stopped":
            return self._expected
        if code in self._explained:
            return f"could not use its store ({code})"
        self._note(ev.Defect(time.monotonic(), f"the shim ended with {code} ({self._expected or 'by itself'})"))
        return f"ended with {code}"

    async def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        await self._end("killed", signal.SIGKILL)

    async def stop(self) -> None:
        """SIGTERM, and wait until it is gone."""
        await self._end("stopped", signal.SIGTERM)

    async def _end(self, how: str, number: signal.Signals) -> None:
        """A life that has just begun is let alone until it serves, or ends by itself."""
        await true_within(START_S, lambda: self._gone.is_set() or self.serving.is_set())
        if self._gone.is_set():
            return
        self._expected = how
        began = time.monotonic()
        with suppress(OSError):
            self._waited_before_s = self._waited_s(self.pid)
        with suppress(ProcessLookupError):
            self._shim.send(number)
        await self._gone.wait()
        if number is signal.SIGTERM:
            self._note(ev.Stopped(time.monotonic(), time.monotonic() - began))

    def _is_explained(self, name: str) -> bool:
        """Return whether an error that the shim logs now follows from a fault, or from the machine."""
        if name in _EXPLAINED_IN_A_STOP:
            return bool(self._explained) or self._starved()
        return name in _EXPLAINED

    def _starved(self) -> bool:
        """Return whether the machine took much of the time of the stop that is under way."""
        with suppress(OSError):
            return self._expected == "stopped" and self._waited_s(self.pid) - self._waited_before_s > STARVED_S
        return False

    def arm(self, *options: str, within: tuple[str, ...] = ()) -> None:
        """Start the next life as one of `faulty_shim` with these options, or by the command prefix `within`."""
        self._armed, self._within = options, within

    async def gone(self) -> None:
        """Wait until the present life has ended by itself. Nothing may start it meanwhile: use `down`."""
        await self._gone.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process without its knowledge while the block lasts. Its life may end meanwhile."""
        with suppress(ProcessLookupError):
            self._shim.send(signal.SIGSTOP)
        self.was_paused = True
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                self._shim.send(signal.SIGCONT)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Prevent the process from being started while the block lasts."""
        self._held += 1
        self._may_run.clear()
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._may_run.set()

    @contextmanager
    def in_trouble(self, code: int = EXIT_STORE) -> Iterator[None]:
        """Its store cannot be used while the block lasts: a life may end with this exit code."""
        self._troubles[code] += 1
        self._explained.add(code)
        try:
            yield
        finally:
            self._troubles[code] -= 1

    def _on_line(self, line: str) -> None:
        at = time.monotonic()
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            self._note(ev.Defect(at, f"the shim said: {line[:200]}"))
            return
        name, command = entry.get("event", ""), entry.get("command", "")
        match name:
            case "serving":
                self.url, self.admin = f"http://{entry['listen']}", f"http://{entry['admin']}"
                self.serving.set()
            case "command_queued":
                self._note(ev.Queued(at, command))
            case "command_offered":
                offer = entry["attempt"], entry["reason"], entry["recorded"]
                self._note(ev.Offered(at, command, *offer, by=str(self._config)))
            case "command_requeued":
                self._note(ev.Requeued(at, command, entry["attempt"]))
            case "command_delivered":
                self._note(ev.Delivered(at, command, entry["evidence"]))
            case "link_state":
                self._note(ev.Link(at, entry["state"], entry["was"]))
            case "link_broken":
                self._note(ev.Condemned(at, entry["reason"]))
            case "store_moved_aside":
                self._note(ev.StoreLost(at))
        unexplained = entry.get("level") in ("error", "critical") and not self._is_explained(name)
        if unexplained or "exception" in entry or name == "illegal_transition":
            self._note(ev.Defect(at, f"the shim said: {line[:1000]}"))


class KeptShim(Shim):
    """A `Shim` whose whole life is awaited."""

    async def live(self, *args: str) -> int:
        """Start it and wait for its end; the exit code."""
        await self._spawn(*args)
        assert self._process is not None
        assert self._reader is not None
        await self._reader
        return await self._process.wait()


class ControllerKeeper(_Child):
    """The controller with its journal, its registrations and a control API on a port that network faults spare."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession, note: Note, host: Host) -> None:
        super().__init__()
        self.program = (*host.inside, *self.program)
        self.port = free_port()
        self.url = f"http://{host.address}:{self.port}"
        control = free_port()
        self.control_url = f"http://{host.address}:{control}"
        self.api = ControlClient(session, self.control_url)
        self.journal = folder / "controller.journal"
        self.state = folder / "controller.state"
        self._session = session
        self._note = note
        self._args = (
            *("controller", "--listen", f"{host.address}:{self.port}", "--control", f"{host.address}:{control}"),
            *("--token", TOKEN, "--journal", str(self.journal), "--state", str(self.state)),
        )

    async def start(self) -> None:
        """Start it and wait until it listens."""
        after = len(self.lines)
        await self._spawn(*self._args)
        await self._line(lambda line: line.startswith("controller: upstream.url"), after)
        self._note(ev.Life(time.monotonic(), "controller", born=True))

    async def end(self, number: signal.Signals) -> None:
        """Send it a signal and wait until it is gone."""
        self.send(number)
        await self.wait()
        self._note(ev.Life(time.monotonic(), "controller", born=False, detail=number.name))

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        """One call of the control API; `None` where it is not there to answer."""
        timeout = aiohttp.ClientTimeout(total=5)
        try:
            async with self._session.request(method, self.control_url + path, json=body, timeout=timeout) as response:
                answer = await response.json()
                assert response.status < 500, answer
                return answer
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def push(self, spec: dict[str, Any]) -> bool:
        """Push a command; False where the controller cannot now."""
        try:
            await self.api.push(spec)
        except ControlError:
            return False
        return True


class JournalReader:
    """Reads what the controller has written since the last time, as events. Numbers of connections differ by life."""

    def __init__(self, path: Path, session_of: Callable[[dict[str, Any]], str], *, owners: bool = False) -> None:
        """`session_of` finds the harness's name for what a message's payload names. `owners`: tell who speaks, too."""
        self._watches_owners = owners
        self._path = path
        self._session_of = session_of
        self._offset = 0
        self._life = 0
        self._owners: dict[str, str] = {}
        self.cluster_names: dict[str, str] = {}
        self.latest_ids: dict[str, str] = {}

    async def follow(self, note: Callable[[ev.AnyEvent], None]) -> None:
        """Note all events as they come."""
        while True:
            for event in self.read():
                note(event)
            await last(0.1)

    def read(self) -> Iterator[ev.AnyEvent]:
        """The new events."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            yield from self._events(entry)

    def _events(self, entry: dict[str, Any]) -> Iterator[ev.AnyEvent]:
        kind, at = entry["kind"], entry["monotonic_s"]
        connection = f"{self._life}/{entry['connection']}"
        if kind == "started":
            self._life += 1
        elif kind == "opened":
            self._owners[connection] = entry.get("owner", "")
            yield ev.Opened(at, connection)
            uuid = entry.get("query", {}).get("cluster_uuid", "")
            if uuid in self.cluster_names:
                yield ev.Introduced(at, connection, self.cluster_names[uuid])
        elif kind in ("sent", "received", "discarded"):
            if self._watches_owners and kind != "sent":
                sent = parse_rfc3339(entry.get("timestamp")) or 0.0
                yield ev.Spoke(at, self._owners.get(connection, ""), connection, sent)
            yield from self._message(entry, kind, at, connection)

    def _message(self, entry: dict[str, Any], kind: str, at: float, connection: str) -> Iterator[ev.AnyEvent]:
        payload = entry["payload"]
        match kind, entry["type"]:
            case "sent", "register_success":
                for ident in (payload["cluster_id"], payload["cluster_uuid"]):
                    self.cluster_names[ident] = payload["name"]
                self.latest_ids[payload["name"]] = payload["cluster_id"]
                yield ev.Introduced(at, connection, payload["name"])
            case "sent", "command":
                command = str(payload.get("command_id", ""))
                yield ev.Pushed(at, command, command.rpartition(".")[0], once=payload.get("type") == "once")
            case (("received" | "discarded"), "register"):
                yield ev.Introduced(at, connection, str(payload.get("name")))
            case "received", "command_ack":
                yield ev.Acked(at, str(payload.get("command_id")))
            case "received", "command_result":
                code = str(payload.get("code", ""))
                yield ev.Reported(at, str(payload.get("command_id")), payload.get("success") is True, code)
            case "received", "heartbeat":
                sent = parse_rfc3339(entry.get("timestamp")) or 0.0
                yield ev.Beat(at, connection, self._session(payload), sent)

    def _session(self, payload: dict[str, Any]) -> str:
        known = self.cluster_names.get(str(payload.get("cluster_id")))
        return known or self._session_of(payload)
