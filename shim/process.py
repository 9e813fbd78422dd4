"""Settings of this process: core dumps, file descriptors, garbage collection, event-loop lag, and the ready file."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from shim.clock import Clock
from shim.config.settings import Settings
from shim.errors import ConfigError, Fault, StartError
from shim.log import get
from shim.metrics import Metrics
from shim.ports import Timers

log = get(__name__)

_PR_SET_DUMPABLE = 4
_OTHER_FILES = 256  # the store, the admin port, listeners, the event loop
SAMPLE_S = 0.1
IDLE_SAMPLE_S = 5.0
NOTICEABLE_S = 0.05  # an idle virtual machine may be 25 ms late by itself
WORKING_SHARE = 0.02

# Requests leave no reference cycles behind; only errors do. But the interpreter searches young objects for cycles
# whenever their number has grown, and with 10,000 sessions nearly all that it finds are alive: held polls and the
# agents' newest heartbeats. So it searches a few of them at a time, and the older ones only when `GarbageSearch` does.
_YOUNG, _NEVER = 1_000, 1_000_000
SEARCH_S = 60.0
SEARCH_SHARE = 0.0001
# CPU time that a search takes at least for each block of memory that objects have.
SEARCH_BLOCK_S = 0.25e-6


def occupy_standard_streams() -> None:
    """Open stdin, stdout and stderr as /dev/null if they are closed.

    Otherwise the database or a socket would get the number 2, and messages to stderr would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def disable_core_dumps() -> bool:
    """Disable core dumps and debuggers of the same user, because tokens are in memory. Returns False if that failed.

    The limit alone is not enough: the kernel ignores it if `core_pattern` is a pipe. A process that is not dumpable is
    never dumped. Other processes of the same user, for example in a pod with a shared process namespace, can then read
    neither its memory nor its environment. Root with CAP_SYS_PTRACE still can.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sys.platform.startswith("linux"):
        return True
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0


def raise_fd_limit(count: int) -> int:
    """Raise the limit of open files for `count` connections and the other files. Returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


def security_warnings(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (event, hint) for each setting that lowers the security."""
    listen, upstream = settings.listen, settings.upstream
    if not listen.on_loopback and not listen.tls.cert_file:
        yield "listen_without_tls", "Set listen.tls: others can read agents' tokens and commands on the network."
    if upstream.allow_insecure:
        yield "upstream_allow_insecure", "Tokens may be sent without encryption."


def tune_gc() -> None:
    """Make garbage collection shorter.

    Objects that exist now, such as modules and classes, are never searched again. They are not searched now either: of
    what importing leaves, the collections during it have found nearly all.
    """
    gc.freeze()
    gc.set_threshold(_YOUNG, _NEVER, _NEVER)


class GarbageSearch:
    """Search of all objects for reference cycles that became garbage, at most each minute.

    No agent is answered meanwhile: a few milliseconds with a few agents, most of a second with 10,000. So a search
    waits until all of them together take a ten-thousandth of the time at most. That includes the first one: agents
    arrive in the first minute, and commands with them.
    """

    def __init__(self, timers: Timers, clock: Clock) -> None:
        self._timers = timers
        self._clock = clock
        self._searched_s = clock.monotonic_s()
        self._blocks = sys.getallocatedblocks()  # of objects that `tune_gc` has left out of every search
        self._block_s = SEARCH_BLOCK_S

    def start(self, wait_s: float = SEARCH_S) -> None:
        """Search for as long as the loop runs, the first time after about `wait_s`."""
        self._timers.call_later(self._clock.until_tick_s(wait_s), self._search_if_due)

    def _search_if_due(self) -> None:
        blocks = max(1, sys.getallocatedblocks() - self._blocks)  # a count of objects would take a sixth of a search
        due_s = self._searched_s + blocks * self._block_s / SEARCH_SHARE
        rest_s = due_s - self._clock.monotonic_s()
        if rest_s > 0:
            self.start(max(SEARCH_S, rest_s))
            return
        began_s = self._clock.cpu_s()
        gc.collect()
        self._block_s = max(SEARCH_BLOCK_S, (self._clock.cpu_s() - began_s) / blocks)
        self._searched_s = self._clock.monotonic_s()
        self.start()


def trim_heap() -> None:
    """Return memory freed after start-up to the OS (glibc only)."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def report_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that no task handles, as the loop does by default, except one of uvloop's that means nothing.

    If a TLS connection is lost while its data are being decrypted, uvloop tries to answer on the closed socket, and
    reports that as a fatal error. The connection is gone, and its protocol was notified.
    """
    error = context.get("exception")
    if isinstance(error, RuntimeError) and "the handler is closed" in str(error) and "protocol" in context:
        log.debug("tls_connection_gone")
        return
    loop.default_exception_handler(context)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the factory of the fastest installed event loop; `None` stands for asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 - optional dependency
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


class LoopLagMeter:
    """Meter of the event loop's lag: how late a timer fires. A block may have been longer, by up to the interval.

    The interval is `SAMPLE_S` while the loop works, else about `IDLE_SAMPLE_S`: a loop with nothing to do delays
    nobody, and ten samples a second would be nearly all that an idle shim costs. It works if its thread uses the CPU,
    or if the last sample was late.
    """

    def __init__(self, timers: Timers, clock: Clock, metrics: Metrics) -> None:
        self._timers = timers
        self._clock = clock
        self._metrics = metrics
        self._longest_s = 0.0

    def start(self, every_s: float = SAMPLE_S) -> None:
        """Take samples for as long as the loop runs, the first one after `every_s`."""
        began = (self._clock.monotonic_s(), self._clock.cpu_s())
        self._timers.call_later(every_s, partial(self._sample, every_s, *began))

    def _sample(self, every_s: float, began_s: float, cpu_s: float) -> None:
        passed_s = self._clock.monotonic_s() - began_s
        late_s = max(0.0, passed_s - every_s)
        self._metrics.loop_lag_seconds.observe(late_s)
        if late_s > self._longest_s:
            self._longest_s = late_s
            self._metrics.loop_lag_max_seconds.set(late_s)
        works = late_s > NOTICEABLE_S or self._clock.cpu_s() - cpu_s > WORKING_SHARE * passed_s
        self.start(SAMPLE_S if works else self._clock.until_tick_s(IDLE_SAMPLE_S))


def check_ready_file(path: str | None) -> None:
    """Raise `ConfigError` if the ready file cannot be written, before anything is started."""
    if path is None:
        return
    directory = Path(path).absolute().parent
    if not directory.is_dir():
        raise ConfigError([Fault("--ready-file", f"{path}: the directory {directory} does not exist: make it first")])
    if Path(path).exists() and not Path(path).is_file():  # the file is replaced, which would delete a device
        raise ConfigError([Fault("--ready-file", f"{path} is not a regular file: name another one")])
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError([Fault("--ready-file", f"{path} cannot be written by this user: name another file")])


def write_ready_file(path: str, content: dict[str, Any]) -> None:
    """Write the ready file in one step, so that no process reads a part of it. Raises `StartError`."""
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StartError(f"--ready-file {path} cannot be written: {error.strerror}") from None
