"""The image as it is run: read-only, without rights, in 128 MiB, stopped by SIGTERM; nothing of a machine in it."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import pytest

from tests.support.containers import BASE, Engine
from tests.support.manifests import ROOT, Refused

HARDENED = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--memory=128m"),
    *("--network=none", "--no-healthcheck"),
)
HEALTH = ("agent-shim", "health", "--config", "/etc/agent-shim/config.yaml")


def start(engine: Engine, image: str, started: list[str], *options: str) -> str:
    """A container that serves."""
    name = f"shim-{uuid.uuid4().hex[:8]}"
    engine.podman("run", "-d", "--name", name, *HARDENED, *options, image)
    started.append(name)
    wait_ready(engine, name)
    return name


def wait_ready(engine: Engine, name: str) -> None:
    """As the kubelet does with a startup probe."""
    try:
        engine.podman("exec", name, *HEALTH, "--ready", "--wait", "20")
    except Refused as refused:
        pytest.fail(f"{name} does not serve: {refused} {engine.podman('logs', name)}")


def test_it_serves_hardened_and_stops_cleanly(engine: Engine, image: str, started: list[str]) -> None:
    name = start(engine, image, started)
    assert engine.podman("exec", name, *HEALTH) == '{"status": "ok"}\n'
    status = engine.podman("exec", name, "cat", "/proc/1/status")
    assert re.search(r"Uid:\t10001", status)
    assert re.search(r"CapEff:\t0+\n", status)
    resident_kib = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]
    assert resident_kib < 96 * 1024
    engine.podman("stop", "-t", "30", name)  # podman would kill it then, and the exit code be another
    assert engine.inspect(name)["State"]["ExitCode"] == 0
    assert '"event": "stopped"' in engine.podman("logs", name)


def test_its_health_check_says_when_nobody_answers(engine: Engine, image: str, started: list[str]) -> None:
    name = start(engine, image, started, "--env", "SHIM_ADMIN__PORT=7091")
    with pytest.raises(Refused, match=r"no answer from the admin port 127\.0\.0\.1:7099"):
        engine.podman("exec", "--env", "SHIM_ADMIN__PORT=7099", name, *HEALTH)


def test_the_store_survives_in_its_volume(engine: Engine, image: str, started: list[str]) -> None:
    name = start(engine, image, started)
    files = engine.podman("exec", name, "python3", "-c", "import os; print(sorted(os.listdir('.')))")
    assert "'agent-shim.db'" in files
    with pytest.raises(Refused, match="Read-only file system"):
        engine.podman("exec", name, "python3", "-c", "open('/opt/agent-shim/x', 'w')")


def test_every_command_is_there_without_a_shell(engine: Engine, image: str) -> None:
    shown = engine.podman("run", "--rm", *HARDENED, "--entrypoint", '["agent-shim"]', image, "--help")
    commands = set(re.findall(r"^  ([a-z-]+) ", shown, re.MULTILINE))
    assert {"run", "health", "inject", "doctor", "status"} <= commands
    assert not {"controller", "fleet", "demo"} & commands
    text = (ROOT / "tests/cli/inject/vendor/chart.yaml").read_text()
    injected = engine.podman("run", "--rm", "-i", *HARDENED, image, "inject", "--image", image, stdin=text)
    assert "agent-shim/sidecar: enabled" in injected


@pytest.mark.parametrize("command", ["controller", "fleet", "demo"])
def test_nothing_in_it_can_impersonate_a_controller_or_an_agent(engine: Engine, image: str, command: str) -> None:
    with pytest.raises(Refused, match=r"this needs devtools: pip install 'agent-shim\[devtools\]'") as refused:
        engine.podman("run", "--rm", *HARDENED, image, command, "--help")
    assert "exit code 2" in str(refused.value)
    find = "import importlib.util as u, importlib.metadata as m; "
    find += "print(u.find_spec('devtools'), [d.name for d in m.distributions() if 'devtools' in d.name])"
    found = engine.podman("run", "--rm", *HARDENED, "--entrypoint", '["/opt/agent-shim/bin/python"]', image, "-c", find)
    assert found == "None []\n"


def test_what_the_image_says_of_itself(engine: Engine, image: str) -> None:
    config = engine.inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["agent-shim"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert (labels["title"], labels["version"], labels["revision"]) == ("agent-shim", "ci", "abc")
    assert labels["licenses"] == "Apache-2.0"
    healthcheck = engine.inspect(image)["Healthcheck"]["Test"]
    assert healthcheck == ["CMD", *HEALTH]


def test_nothing_of_the_build_machine_is_in_it(engine: Engine, image: str) -> None:
    search = """
import os, sys
marks = [mark.encode() for mark in sys.argv[1:]]
for top in ("/opt", "/etc/agent-shim", "/var/lib/agent-shim", "/build", "/root"):
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                continue
            data = open(path, "rb").read()
            for mark in marks:
                if mark in data:
                    print(path, mark)
            of_build = b"/build/shim" in data or b"/build/backend" in data
            if name in ("direct_url.json", "pip.conf") or path.endswith(".pyc") and of_build:
                print("left behind:", path)
"""
    marks = (str(ROOT), str(Path.home() / ".cache"), str(engine.work))
    found = engine.podman(
        "run", "--rm", *HARDENED, "--user=0", "--entrypoint", '["python3"]', image, "-c", search, *marks
    )
    assert found == ""
    history = engine.podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert str(ROOT) not in history


def test_its_own_layers_are_small(engine: Engine, image: str) -> None:
    added_bytes = engine.inspect(image)["Size"] - engine.inspect(BASE)["Size"]
    # Nearly 30 MB of this are the driver of PostgreSQL and what makes the certificates of several replicas.
    assert added_bytes < 90e6
