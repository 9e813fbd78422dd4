"""Settings of this process: core dumps, file descriptors, garbage collection, and how late the event loop is."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator

from shim.config.settings import Settings
from shim.metrics import Metrics
from shim.ports import Clock

_PR_SET_DUMPABLE = 4
_OTHER_FILES = 256  # the store, the admin port, listeners, the event loop


def occupy_standard_streams() -> None:
    """Open what is closed of stdin, stdout and stderr as /dev/null.

    Otherwise the database or a socket would get the number 2, and what is printed to stderr would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def disable_core_dumps() -> bool:
    """No core dump of this process, and no debugger of its own user: tokens are in its memory. False if refused.

    The limit alone is not enough: the kernel ignores it where `core_pattern` is a pipe. A process that is not dumpable
    is not dumped at all, and another process of the same user, in a pod with a shared process namespace say, can read
    neither its memory nor its environment. Root with CAP_SYS_PTRACE still can.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sys.platform.startswith("linux"):
        return True
    import ctypes  # noqa: PLC0415 - for one call, on Linux

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0


def raise_fd_limit(count: int) -> int:
    """Raise the limit of open files to what so many connections need. Returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


def security_warnings(settings: Settings) -> Iterator[tuple[str, str]]:
    """What the configuration allows and a person should know of: (event, hint)."""
    listen, upstream = settings.listen, settings.upstream
    if not listen.on_loopback and not listen.tls.cert_file:
        yield "listen_without_tls", "agents' tokens and commands can be read on the way: set listen.tls"
    if upstream.allow_insecure:
        yield "upstream_allow_insecure", "tokens may be sent in the clear"


# With 10,000 sessions a search for garbage through everything takes most of a second, in which no agent is answered,
# and by default it comes whenever a quarter more is alive than before: with every wave of held polls. What is garbage
# is nearly always young: the young are searched, and all only after tens of millions of objects.
_YOUNG, _MIDDLE, _ALL = 10_000, 20, 200


def tune_gc() -> None:
    """Spare this process's event loop long searches. What is alive now, modules and classes, is left out of all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _ALL)


def trim_heap() -> None:
    """Return to the system what the start has needed and freed; elsewhere than on glibc nothing is done."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


SAMPLE_S = 0.1


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The fastest event loop that is installed; `None` is asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 - not installed everywhere
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


async def watch_loop(clock: Clock, metrics: Metrics, stop: asyncio.Event) -> None:
    """Measure until `stop` how late a timer comes. A block may have lasted up to `SAMPLE_S` longer than is seen."""
    longest_s = 0.0
    while not stop.is_set():
        before = clock.monotonic_s()
        await asyncio.sleep(SAMPLE_S)
        late_s = max(0.0, clock.monotonic_s() - before - SAMPLE_S)
        metrics.loop_lag_seconds.observe(late_s)
        if late_s > longest_s:
            longest_s = late_s
            metrics.loop_lag_max_seconds.set(late_s)
