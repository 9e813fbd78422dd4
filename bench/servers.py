"""The processes that are measured: each started on a core of its own, watched through /proc, ended with its block."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import yaml

TOKEN = "tok-bench"  # noqa: S105
START_S = 120.0
STOP_S = 30.0
ROOT = Path(__file__).absolute().parent.parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE = {CORES[0]}
OTHER_CORES = set(CORES[1:]) or SERVER_CORE


@dataclass(slots=True)
class Server:
    """A running server process. `host` and `port` are where agents call; `start_s` is the time from exec to serving.

    `log` is what it writes to stderr.
    """

    process: subprocess.Popen[Any]
    host: str
    port: int
    start_s: float
    ready: dict[str, Any] = field(default_factory=dict)
    log: Path = Path(os.devnull)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def cpu_s(self) -> float:
        """CPU seconds that its threads have used so far, to the nanosecond."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def ask(self, job: Any) -> Any:
        """Have a controller do a job; returns its answer when it is over."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(job) + b"\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"the controller could not do it: {answer['error']}")
        return answer

    def buckets(self, name: str) -> Counter[float]:
        """A histogram's cumulative counts by upper bound, over all labels; from the admin port."""
        with urllib.request.urlopen(f"http://{self.ready['admin']}/metrics", timeout=10) as response:
            text = response.read().decode()
        buckets: Counter[float] = Counter()
        for bound, value in re.findall(rf'^{name}_bucket{{[^}}]*le="([^"]+)"[^}}]*}} (\S+)$', text, re.MULTILINE):
            buckets[float(bound)] += int(float(value))
        return buckets

    def status(self) -> dict[str, Any]:
        """Return the status that a shim's admin port shows."""
        with urllib.request.urlopen(f"http://{self.ready['admin']}/status.json", timeout=30) as response:
            found: dict[str, Any] = json.load(response)
            return found

    def rss_bytes(self) -> int:
        """Resident memory now."""
        return _in_status(Path(f"/proc/{self.process.pid}/status"), "VmRSS") * 1024

    def wake_ups(self) -> int:
        """Return how often its threads have waited so far: each wait ends with a wake-up."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/status")
        return sum(_in_status(task, "voluntary_ctxt_switches") for task in tasks)


def _in_status(status: Path, key: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"the kernel does not tell {key}")


def allow_files() -> int:
    """Raise the limit of open files as far as it goes, for this process and its children; returns it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def spawn(args: list[str], cores: set[int], root: Path = ROOT, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python program of this checkout, or of what is installed in `root`, on these cores."""

    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [sys.executable, *args],
        cwd=root,
        env=environment,
        stdout=options.get("stdout", subprocess.DEVNULL),
        stderr=options.get("stderr", subprocess.DEVNULL),
        stdin=options.get("stdin", subprocess.DEVNULL),
    )
    os.sched_setaffinity(process.pid, cores)
    return process


@contextmanager
def serving(
    args: list[str], cores: set[int], folder: Path, *, jobs: bool = False, root: Path = ROOT
) -> Iterator[Server]:
    """A program that writes `{"listen": "host:port"}` to its `--ready-file` when it serves; SIGTERM at the end.

    `jobs`: it takes lines on stdin and answers on stdout. `root`: as in `spawn`.
    """
    pipe = subprocess.PIPE if jobs else subprocess.DEVNULL
    ready_file = Path(tempfile.mkdtemp(dir=folder)) / "ready.json"
    log = ready_file.with_name("stderr")
    started_s = time.monotonic()
    with log.open("wb") as stderr:
        process = spawn([*args, "--ready-file", str(ready_file)], cores, root, stderr=stderr, stdin=pipe, stdout=pipe)
    try:
        while not ready_file.exists():
            if process.poll() is not None or time.monotonic() - started_s > START_S:
                raise RuntimeError(f"{args} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.002)
        start_s = time.monotonic() - started_s
        ready = json.loads(ready_file.read_text())
        host, port = ready["listen"].rsplit(":", 1)
        yield Server(process, host, int(port), start_s, ready, log)
    finally:
        end(process)
        if process.stdout is not None:
            process.stdout.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """No more jobs, SIGTERM, and SIGKILL for those that do not go."""
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


T = TypeVar("T")


class Bench:
    """The processes of one run of the bench. All of them end with its block, in reverse.

    `quick`: as little of everything as shows that it works. `root`: where shims and bare servers are imported from.
    """

    def __init__(self, *, quick: bool = False) -> None:
        self._quick = quick
        self._stack = ExitStack()
        self.root = ROOT
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-shim-bench-")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def pick(self, full: T, quick: T) -> T:
        """Return the number to use, by the size of the run."""
        return quick if self._quick else full

    def install(self) -> None:
        """Start shims and bare servers from a wheel with bytecode, as users have it, instead of the checkout."""
        self.root = Path(tempfile.mkdtemp(dir=self.folder))
        offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        run = [sys.executable, "-m", "pip", "install", *offline, "--target", str(self.root), str(ROOT)]
        subprocess.run(run, check=True, timeout=START_S)
        baseline = self.root / "bench"
        baseline.mkdir()
        for name in ("__init__.py", "bare.py"):
            shutil.copy(ROOT / "bench" / name, baseline)
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(baseline)], check=True, timeout=START_S)

    def controller(self) -> Server:
        """`bench.controller`, which takes its jobs by `Server.ask`. It is not measured."""
        return self._stack.enter_context(serving(["-m", "bench.controller"], OTHER_CORES, self.folder, jobs=True))

    def dev_controller(self) -> Server:
        """`agent-shim controller`, for `fleet`."""
        args = ["-m", "shim", "controller", "--listen", "127.0.0.1:0", "--token", TOKEN]
        return self._stack.enter_context(serving(args, OTHER_CORES, self.folder))

    def shim(self, controller: Server, cores: set[int] = SERVER_CORE, **sections: dict[str, Any]) -> Server:
        """`agent-shim run` with these sections over what the bench needs."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        config: dict[str, dict[str, Any]] = {
            "listen": {"port": 0, "max_connections": 20_000},
            "admin": {"port": 0},
            "upstream": {"url": controller.url, "token": TOKEN},
            "store": {"path": str(folder / "agent-shim.db")},
        }
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values}
        path = folder / "agent-shim.yaml"
        path.write_text(yaml.safe_dump(config))
        args = ["-m", "shim", "run", "--config", str(path)]
        return self._stack.enter_context(serving(args, cores, self.folder, root=self.root))

    def bare(self, kind: str = "server", cores: set[int] = SERVER_CORE) -> Server:
        """`bench.bare`: aiohttp and nothing else."""
        return self._stack.enter_context(serving(["-m", "bench.bare", kind], cores, self.folder, root=self.root))

    def naive(self, upstream: Server, cores: set[int] = SERVER_CORE) -> Server:
        """`bench.naive`: what one would write in an afternoon."""
        args = ["-m", "bench.naive", "--upstream", upstream.url, "--token", TOKEN]
        return self._stack.enter_context(serving(args, cores, self.folder))
