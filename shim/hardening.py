"""What a process with secrets in its memory does at its start, and what its configuration leaves open."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator

from shim.settings import Settings

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
