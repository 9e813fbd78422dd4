"""A second host for tests: a network namespace behind a veth pair, and what may go wrong on the way to it.

Everything here needs a network and mount namespace of one's own (`unshare --net --mount`): `reenter` gets one, and all
of it is gone with the process. `TwoHosts` then makes the far host; faults are about one TCP port there.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FAR = "far"
NEAR_ADDRESS = "10.213.0.1"
FAR_ADDRESS = "10.213.0.2"
INSIDE = "AGENT_SHIM_TEST_NAMESPACE"
TOOLS = ("unshare", "ip", "iptables", "tc")
_QUEUE = 7
_DELAY = Path(__file__).with_name("nfq_delay.py")


@dataclass(frozen=True, slots=True)
class Host:
    """The place of a server of the test: its address, and the command prefix that starts a program there."""

    address: str = "127.0.0.1"
    inside: tuple[str, ...] = ()


def permitted() -> str:
    """Why network namespaces cannot be had here; empty if they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    probe = "ip link set lo up && iptables -L -n && ip netns list && ip link add type veth"
    done = subprocess.run(["unshare", "--net", "--mount", "sh", "-c", probe], capture_output=True, check=False)
    return "" if done.returncode == 0 else "network namespaces are not permitted here"


def found_by(module: str, timeout_s: float) -> Any:
    """Run a module that calls `reenter`: the JSON that it prints. Skip the test where that is not permitted."""
    reason = permitted()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def reenter(module: str, args: Sequence[str]) -> int | None:
    """Run `python -m module args` in namespaces of its own: its exit code, `None` if we are in them already."""
    if os.environ.get(INSIDE):
        return None
    command = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, "-m", module, *args]
    return subprocess.run(command, env=os.environ | {INSIDE: "1"}, check=False).returncode


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def wait_half_closed(port: int) -> None:
    """Wait until this host has closed its half of the connection to a far port, and the far kernel has acknowledged."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for line in Path("/proc/thread-self/net/tcp").read_text().splitlines():
            _, _, there, state, *_ = line.split()
            if there.endswith(f":{port:04X}") and state == "05":
                return
        time.sleep(0.02)
    raise TimeoutError


class TwoHosts:
    """This host and a far one. Each fault lasts as long as its block; they must not overlap."""

    def __init__(self) -> None:
        """Must run inside `reenter`."""
        assert os.environ.get(INSIDE), "in somebody else's network"
        Path("/run/netns").mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "none", "/run/netns")  # names that nobody else sees
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "netns", "add", FAR)
        _run("ip", "link", "add", "near", "type", "veth", "peer", "name", "veth0", "netns", FAR)
        _run("ip", "address", "add", f"{NEAR_ADDRESS}/24", "dev", "near")
        _run("ip", "link", "set", "near", "up")
        _run("ip", "-n", FAR, "address", "add", f"{FAR_ADDRESS}/24", "dev", "veth0")
        _run("ip", "-n", FAR, "link", "set", "veth0", "up")
        _run("ip", "-n", FAR, "link", "set", "lo", "up")
        self.far = Host(FAR_ADDRESS, ("ip", "netns", "exec", FAR))

    @contextmanager
    def _rules(self, port: int, *target: str, each: Sequence[str] = (), answers: bool = True) -> Iterator[None]:
        """Send the traffic to the port to `target` for a block, and with `answers` also the traffic from it."""
        rules = [("OUTPUT", "-p", "tcp", "--dport", str(port), *each, *target)]
        rules += [("INPUT", "-p", "tcp", "--sport", str(port), *each, *target)] * answers
        for rule in rules:
            _run("iptables", "-w", "-A", *rule)
        try:
            yield
        finally:
            for rule in rules:
                _run("iptables", "-w", "-D", *rule)

    @contextmanager
    def cut(self, port: int) -> Iterator[None]:
        """No packet passes, and nobody is told."""
        with self._rules(port, "-j", "DROP"):
            yield

    async def dropped(self, port: int, packets: int) -> None:
        """Wait until this host has sent so many packets in vain, during `cut`."""
        async with asyncio.timeout(60):
            while True:
                rules = await asyncio.to_thread(_run, "iptables", "-w", "-L", "OUTPUT", "-n", "-v", "-x")
                sent = [int(line.split()[0]) for line in rules.splitlines() if line.endswith(f"dpt:{port}")]
                if sent and sent[0] >= packets:
                    return
                await asyncio.sleep(0.1)

    @contextmanager
    def reset(self, port: int) -> Iterator[None]:
        """Every packet that is sent is answered with a reset."""
        with self._rules(port, "-j", "REJECT", "--reject-with", "tcp-reset", answers=False):
            yield

    @contextmanager
    def loss(self, port: int, share: float) -> Iterator[None]:
        """This share of the packets is lost, each way."""
        some = ("-m", "statistic", "--mode", "random", "--probability", f"{share:.3f}")
        with self._rules(port, "-j", "DROP", each=some):
            yield

    @contextmanager
    def latency(self, port: int, one_way_ms: float) -> Iterator[None]:
        """Every packet comes later, each way."""
        command = [sys.executable, str(_DELAY), str(_QUEUE), str(one_way_ms)]
        delayer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert delayer.stdout is not None
            if delayer.stdout.readline().strip() != "ready":
                raise OSError("packets cannot be queued here")
            with self._rules(port, "-j", "NFQUEUE", "--queue-num", str(_QUEUE), "--queue-bypass"):
                yield
        finally:
            delayer.kill()
            delayer.communicate()

    @contextmanager
    def narrow(self, kbit_per_s: int) -> Iterator[None]:
        """The whole line between the hosts carries no more than this, each way."""
        shape = ("root", "tbf", "rate", f"{kbit_per_s}kbit", "burst", "8kb", "latency", "2s")
        _run("tc", "qdisc", "add", "dev", "near", *shape)
        _run("ip", "netns", "exec", FAR, "tc", "qdisc", "add", "dev", "veth0", *shape)
        try:
            yield
        finally:
            _run("tc", "qdisc", "del", "dev", "near", "root")
            _run("ip", "netns", "exec", FAR, "tc", "qdisc", "del", "dev", "veth0", "root")


class ManyHosts:
    """This host and others around it, each behind a cable of its own; this one forwards what they say to each other."""

    def __init__(self, *names: str) -> None:
        """Must run inside `reenter`."""
        assert os.environ.get(INSIDE), "in somebody else's network"
        Path("/run/netns").mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "none", "/run/netns")  # names that nobody else sees
        _run("ip", "link", "set", "lo", "up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
        self.hosts: dict[str, Host] = {}
        for number, name in enumerate(names):
            near, far = f"10.214.{number}.1", f"10.214.{number}.2"
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", f"near{number}", "type", "veth", "peer", "name", "veth0", "netns", name)
            _run("ip", "address", "add", f"{near}/24", "dev", f"near{number}")
            _run("ip", "link", "set", f"near{number}", "up")
            _run("ip", "-n", name, "address", "add", f"{far}/24", "dev", "veth0")
            _run("ip", "-n", name, "link", "set", "veth0", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "route", "add", "default", "via", near)
            self.hosts[name] = Host(far, ("ip", "netns", "exec", name))

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """No packet comes to a host or from it, and nobody is told."""
        rules = [("INPUT", "-i", "veth0"), ("OUTPUT", "-o", "veth0")]
        for rule in rules:
            _run(*self.hosts[name].inside, "iptables", "-w", "-A", *rule, "-j", "DROP")
        try:
            yield
        finally:
            for rule in rules:
                _run(*self.hosts[name].inside, "iptables", "-w", "-D", *rule, "-j", "DROP")
