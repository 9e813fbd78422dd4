"""The process of a shim: what is done before the composition root is imported, and after it has stopped.

Parsing needs libraries that serving does not. They are imported first and removed, before most of the memory is used.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import ssl
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from shim.config import loader
from shim.config.files import FileWatcher
from shim.config.settings import Settings
from shim.config.warnings import find_warnings
from shim.errors import EXIT_INTERNAL
from shim.log import Logs, capture_stray_output, get
from shim.log import setup as set_up_log
from shim.process import (
    check_ready_file,
    disable_core_dumps,
    loop_factory,
    occupy_standard_streams,
    raise_fd_limit,
    tune_gc,
)

if TYPE_CHECKING:
    from shim.app import App

log = get(__name__)

FORCED_STOP_S = 4.2
FORCED_FLUSH_S = 0.3


def import_app() -> type[App]:
    """Import the composition root and return `App`.

    Two things that aiohttp loads when it is imported are left out. It makes a TLS context that trusts the system's
    certificates, 2 MB and a tenth of the start. The shim never uses it, because each of its TLS connections has a
    context of its own; here this one trusts nobody. And a list in C++, which is hardly used, is replaced by the same in
    Python, because the library of C++ takes 1 MB.
    """
    make, variable = ssl.create_default_context, "FROZENLIST_NO_EXTENSIONS"
    before = os.environ.get(variable)
    ssl.create_default_context = lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # type: ignore[assignment, misc]
    os.environ[variable] = "1"
    try:
        found: type[App] = importlib.import_module("shim.app").App
    finally:
        ssl.create_default_context = make
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
    return found


def main(
    config_path: str | None,
    sets: tuple[str, ...],
    ready_file: str | None,
    kind: Callable[[], type[App]] = import_app,
) -> NoReturn:
    """Run the shim until SIGTERM or SIGINT, then exit the process with code 0, 2, 70 or 78.

    `kind` returns `App` or a subclass of it. Raises `ConfigError` before anything was started.
    """

    def load() -> Settings:
        """Load the configuration again from the same sources. Raises `ConfigError`."""
        try:
            return loader.load(config_path, os.environ, sets, reload=True)
        finally:
            loader.forget_yaml()

    tune_gc()  # what is imported by now is kept: the collection below need not search it
    files = FileWatcher()
    files.changed({"config": config_path})  # called before the file is read, so that no later change is missed
    occupy_standard_streams()
    private = disable_core_dumps()
    settings = loader.load(config_path, os.environ, sets)
    check_ready_file(ready_file)
    logging = set_up_log(settings.log.level, settings.log.format)
    capture_stray_output()
    connections = settings.listen.max_connections + settings.upstream.max_links
    if raise_fd_limit(connections) < connections:
        log.warning("few_open_files", hint="Raise the limit of open files: it is below listen.max_connections.")
    if not private:
        log.warning("memory_not_private", hint="The kernel keeps core dumps enabled; they would contain tokens.")
    for warning in find_warnings(settings, os.environ, config_path):
        log.warning("config_doubtful", warning=warning)
    loader.forget_yaml()
    gc.collect()  # frees its memory, which what is imported next uses
    app = kind()(settings, load, logging, config_path, ready_file, files)
    app.stop_began = partial(_end_in_time, logging)
    tune_gc()
    try:
        code = asyncio.Runner(loop_factory=loop_factory()).run(app.run())
    except BaseException:
        log.exception("stopped_by_fault")
        code = EXIT_INTERNAL
    logging.close()
    # Everything durable is closed. A normal exit would wait for threads that cannot be cancelled: `getaddrinfo` takes
    # many seconds if the name server does not answer.
    os._exit(code)


def _end_in_time(logging: Logs) -> None:
    """Start a thread that ends the process if the event loop does not: a disk that hangs may block the loop."""

    def end() -> None:
        """End the process with the exit code of an internal error."""
        log.error("stop_forced", hint="A part did not stop in time. Everything that was acknowledged is on disk.")
        logging.flush(FORCED_FLUSH_S)
        os._exit(EXIT_INTERNAL)

    timer = threading.Timer(FORCED_STOP_S, end)
    timer.daemon = True
    timer.start()
