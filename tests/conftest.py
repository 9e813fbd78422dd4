"""Conditions of every test: the tools it needs, an event loop that must not be blocked, settings of hypothesis."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import trustme
from hypothesis.internal.conjecture import providers

BLOCKED_S = 1.5
SLOW = (
    "properties",
    "store",
    "cluster",
    "security",
    "e2e",
    "chaos",
    "bench",
    "browser",
    "image",
    "docs",
    "monitoring",
    "packaging",
    "helm",
)
"""Folders with tests of real processes and tools, the longest first."""
NODE_MODULES = Path(__file__).parent / "clients" / "node_modules"

# Examples are bounded in number; a shared machine must not fail them for being slow.
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
# A gate gives the same answer for the same commit; new examples are searched for where people work.
# It does not shrink: that may take longer than a test may, and then nobody sees what failed.
hypothesis.settings.register_profile(
    "gate",
    deadline=None,
    print_blob=True,
    derandomize=True,
    database=None,
    phases=[phase for phase in hypothesis.Phase if phase != hypothesis.Phase.shrink],
)
hypothesis.settings.load_profile("gate" if os.environ.get("CI") else "search")
if os.environ.get("CI"):
    # Hypothesis mixes numbers and texts of every imported module of ours into what it draws: the examples would depend
    # on the tests that this process ran before. There is no setting for it; test_conftest.py notices if this ends.
    providers._get_local_constants = providers.Constants


def _is_there(tool: str) -> bool:
    if tool == "postgresql":
        return find_spec("psycopg") is not None and any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    kind, _, name = tool.rpartition(":")
    return (NODE_MODULES / name).is_dir() if kind == "npm" else shutil.which(name) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `needs(...)` without its tools; with AGENT_SHIM_REQUIRE_TOOLS=1 their absence is a failure."""
    wanted = [tool for marker in item.iter_markers("needs") for tool in marker.args]
    missing = ", ".join(tool for tool in wanted if not _is_there(tool))
    if not missing:
        return
    if os.environ.get("AGENT_SHIM_REQUIRE_TOOLS") == "1":
        pytest.fail(f"needs {missing}, and AGENT_SHIM_REQUIRE_TOOLS=1 says that it must be there", pytrace=False)
    pytest.skip(f"needs {missing}")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority that the machine does not trust."""
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    """The path of the authority's certificate."""
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def _waited_for_cpu_s() -> float:
    """Seconds this thread was ready to run and had no processor; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


class _LoopWatch:
    """Times each callback of every event loop of asyncio's own kind by standing in front of `asyncio.Handle._run`.

    asyncio's debug mode would tell the same, at many times the cost of a callback.
    """

    def __init__(self) -> None:
        self.blocked: list[str] = []
        self._waited_s = 0.0
        self._run: Callable[[asyncio.Handle], Any] = asyncio.Handle._run

    def install(self) -> None:
        run, clock = self._run, time.perf_counter

        def timed(handle: asyncio.Handle) -> None:
            start = clock()
            run(handle)
            took_s = clock() - start
            if took_s > BLOCKED_S:
                self._slow(handle, took_s)

        asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]

    def uninstall(self) -> None:
        asyncio.Handle._run = self._run  # type: ignore[method-assign, assignment]

    def start_test(self) -> None:
        self.blocked.clear()
        self._waited_s = _waited_for_cpu_s()

    def _slow(self, handle: asyncio.Handle, took_s: float) -> None:
        # All waiting since the test's start is forgiven: at most too much, so a busy machine fails no test.
        if took_s - (_waited_for_cpu_s() - self._waited_s) > BLOCKED_S:
            self.blocked.append(f"{handle!r} for {took_s:.2f} s")


_watch = _LoopWatch()


def pytest_configure() -> None:
    _watch.install()
    # A job in the background of a script ignores Ctrl-C, and so would every process that a test ends by it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what UTF-8 cannot express in captured output: a report goes from a process of pytest-xdist to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector what is collected: it all stays, and searching it takes a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests, those of real processes, where several processes share the tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(SLOW)}
        here = Path(__file__).parent
        items.sort(key=lambda item: places.get(item.path.relative_to(here).parts[0], len(SLOW)))


def pytest_unconfigure() -> None:
    _watch.uninstall()


@pytest.fixture(autouse=True)
def _event_loop_never_blocked() -> Iterator[None]:
    """Fail the test during which an event loop was blocked."""
    _watch.start_test()
    yield
    if _watch.blocked:
        pytest.fail("the event loop was blocked: " + "; ".join(_watch.blocked), pytrace=False)


def _logging_state() -> tuple[int, list[logging.Handler], list[logging.Handler]]:
    ours = logging.getLogger("shim")
    return ours.level, [*ours.handlers], [*logging.getLogger().handlers]


@pytest.fixture(autouse=True)
def _logging_left_as_it_was() -> Iterator[None]:
    """Fail the test that leaves its level or handlers behind: tests after it would miss records that they expect."""
    before = _logging_state()
    yield
    after = _logging_state()
    if after != before:
        level, logging.getLogger("shim").handlers[:], logging.getLogger().handlers[:] = before
        logging.getLogger("shim").setLevel(level)
        pytest.fail(f"logging was left changed: {before} became {after}", pytrace=False)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server for all tests that do nothing to it (marked `needs("postgresql")`)."""
    from tests.support.postgres import running  # noqa: PLC0415 - the driver is an extra

    with running("fsync = off") as server:
        yield server


@pytest.fixture
def pg_url(postgres: Any) -> str:
    """The URL of a database of the test's own."""
    url: str = postgres.create()
    return url
