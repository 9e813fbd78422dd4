"""The compose file, really up: the agent behind the shim in the shim's network."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.test_pod import ASK
from tests.support.containers import CHECKOUT, DEVTOOLS_MOUNT, Engine
from tests.support.manifests import ROOT

TOKEN = "token-of-a-file"
PROJECT = "shimcompose"
CONTROLLER = "127.0.0.1:8900"

# No network but loopback; a stand-in for the agent's program; a controller in the same network.
OVERRIDE = """\
services:
  agent-shim:
    network_mode: none
  agent:
    entrypoint: []
    command: [python3, /agent/agent.py]
    volumes: ["./agent.py:/agent/agent.py:ro"]
  controller:
    image: ${SHIM_IMAGE}
    network_mode: service:agent-shim
    command: [controller, --listen, "127.0.0.1:8900", --token, token-of-a-file]
    environment: {PYTHONPATH: "${CHECKOUT}"}
    volumes: ["${DEVTOOLS}:${DEVTOOLS_MOUNT}:ro"]
"""


@pytest.fixture
def compose(engine: Engine, image: str, tmp_path: Path) -> Iterator[list[str | Path]]:
    """The command that drives the project; it is taken down after the test."""
    shutil.copy(ROOT / "config" / "compose" / "compose.yaml", tmp_path)
    shutil.copy(Path(__file__).parent / "agent.py", tmp_path)
    (tmp_path / "override.yaml").write_text(OVERRIDE)
    (tmp_path / "token").write_text(TOKEN)
    tmp_path.chmod(0o755)
    variables = {
        "SHIM_IMAGE": image,
        "AGENT_IMAGE": image,
        "PIPEOPS_TOKEN": TOKEN,
        "UPSTREAM_URL": f"http://{CONTROLLER}",
        "CHECKOUT": CHECKOUT,
        "DEVTOOLS": str(ROOT / "devtools"),
        "DEVTOOLS_MOUNT": DEVTOOLS_MOUNT,
    }
    set_ = ["env", "-C", tmp_path, *(f"{key}={value}" for key, value in variables.items())]
    command = [
        *set_,
        sys.executable,
        "-m",
        "podman_compose",
        "-p",
        PROJECT,
        "-f",
        "compose.yaml",
        "-f",
        "override.yaml",
    ]
    yield command
    engine.run(*command, "down", "-v", "-t", "5", check=False)


def test_an_agent_in_a_container_works_through_the_shim(engine: Engine, compose: list[str | Path]) -> None:
    engine.run(*compose, "up", "-d", timeout_s=120)
    shim, controller = (f"{PROJECT}_{name}_1" for name in ("agent-shim", "controller"))
    assert os.environ.get("PIPEOPS_TOKEN") is None

    def ask(method: str, path: str, body: object = None) -> dict:
        text = "" if body is None else json.dumps(body)
        url = f"http://{CONTROLLER}{path}"
        answer: dict = json.loads(engine.podman("exec", controller, "python3", "-c", ASK, method, url, "", text))
        return answer

    engine.podman("exec", shim, "agent-shim", "health", "--ready", "--wait", "20", "--url", "http://127.0.0.1:7090")
    # This podman does not wait for health: the agent may have been restarted until the shim was there.
    assert ask("GET", "/control/messages?type=register&direction=in&wait_s=20")["messages"]
    (command_id,) = ask("POST", "/control/commands", {"type": "deploy", "payload": {"n": 1}})["ids"]
    results = ask("GET", f"/control/commands/{command_id}?wait=result&timeout_s=60")["results"]
    assert results[0]["payload"]["output"] == "done: {'n': 1}"
    assert engine.inspect(shim)["HostConfig"]["ReadonlyRootfs"]
