"""The pod that injection makes, really run: an agent that knows nothing of it does its job against a controller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from shim.tools.inject.documents import Options, inject, remove
from tests.image.test_image import wait_ready
from tests.support.containers import Engine
from tests.support.manifests import container, documents, one, pod_of, vendor_text
from tests.support.podman_pod import playable

TOKEN = "token-of-the-vendors-secret"
CONTROLLER = "127.0.0.1:8900"
AGENT = (Path(__file__).parent / "agent.py").read_text()

ASK = """
import json, sys, urllib.request
method, path, body = sys.argv[1:]
request = urllib.request.Request(path, body.encode() or None, method=method)
print(urllib.request.urlopen(request, timeout=20).read().decode())
"""


def vendor_manifest() -> str:
    """The vendor's manifest as a user filled it in."""
    text = vendor_text("manifest").replace("your-token-here", TOKEN)
    return text.replace("https://api.pipeops.sh", f"http://{CONTROLLER}")


def stand_in(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The pod of a manifest with a stand-in for the agent's program and a controller beside it; its ConfigMaps."""
    pod = pod_of(text)
    pod["metadata"]["name"] = "pipeops-agent"
    agent = container(pod, "agent")
    del agent["args"]
    agent["command"] = ["python3", "/agent/agent.py"]
    agent["volumeMounts"].append({"name": "program", "mountPath": "/agent"})
    pod["spec"]["volumes"].append({"name": "program", "configMap": {"name": "program"}})
    controller = {"name": "controller", "args": ["controller", "--listen", CONTROLLER, "--token", TOKEN]}
    pod["spec"]["containers"].append(controller)
    program = {"kind": "ConfigMap", "metadata": {"name": "program"}, "data": {"agent.py": AGENT}}
    return pod, [each for each in documents(text) if each["kind"] == "ConfigMap"] + [program]


class Pod:
    """A pod of this name under podman; its containers are started one by one, as a kubelet does."""

    def __init__(self, engine: Engine, text: str, image: str) -> None:
        self.engine = engine
        pod, config_maps = stand_in(text)
        secrets = [each for each in documents(text) if each["kind"] == "Secret"]
        played = yaml.safe_dump_all(playable(pod, config_maps, secrets, image))
        engine.podman("play", "kube", "--network=none", "--start=false", "-", stdin=played)

    def start(self, name: str) -> str:
        full = f"pipeops-agent-{name}"
        self.engine.podman("start", full)
        return full

    def ask(self, method: str, url: str, body: Any = None) -> str:
        """An HTTP request from inside the pod, whose loopback all containers share."""
        text = "" if body is None else json.dumps(body)
        return self.engine.podman("exec", "pipeops-agent-controller", "python3", "-c", ASK, method, url, text)

    def push(self, **command: Any) -> str:
        command_id: str = json.loads(self.ask("POST", f"http://{CONTROLLER}/control/commands", command))["ids"][0]
        return command_id

    def result(self, command_id: str) -> dict[str, Any]:
        query = "?wait=result&timeout_s=10"
        answer = json.loads(self.ask("GET", f"http://{CONTROLLER}/control/commands/{command_id}{query}"))
        found: dict[str, Any] = answer["results"][0]["payload"]
        return found

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "http://127.0.0.1:7090/metrics").splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_the_injected_pod_does_the_main_job_and_is_taken_apart_without_a_loss(
    engine: Engine, image: str, started: list[str]
) -> None:
    text = inject(vendor_manifest(), Options(image))
    started.append("pod:pipeops-agent")
    pod = Pod(engine, text, image)
    pod.start("controller")
    shim = pod.start("agent-shim")
    wait_ready(engine, shim)
    agent = pod.start("agent")

    known = engine.inspect(shim)
    assert known["HostConfig"]["ReadonlyRootfs"]
    assert known["HostConfig"]["Memory"] == 128 * 1024 * 1024
    assert known["EffectiveCaps"] in (None, [])
    assert known["Config"]["User"] == "10001:10001"

    # Registered through the sidecar before anything else: its first registration would have ended the agent.
    query = "?type=register&direction=in&wait_s=10"
    assert json.loads(pod.ask("GET", f"http://{CONTROLLER}/control/messages{query}"))["messages"]
    done = pod.result(pod.push(type="deploy", payload={"app": "web"}))
    assert done["success"]
    assert done["output"] == "done: {'app': 'web'}"
    assert "registered" in engine.podman("logs", agent)
    assert "http://127.0.0.1:7080" in engine.podman("logs", agent)
    listing = "import os; print(os.listdir('/var/run/secrets/kubernetes.io/serviceaccount'))"
    assert engine.podman("exec", shim, "python3", "-c", listing) == "[]\n"
    for name in (shim, agent):
        assert TOKEN not in engine.podman("logs", name)

    # A command for an agent that is away waits, through a crash of the sidecar, too.
    engine.podman("stop", "-t", "1", agent)
    waiting = pod.push(type="restart", payload={})
    pod.ask("GET", f"http://{CONTROLLER}/control/commands/{waiting}?wait=sent&timeout_s=10")
    engine.podman("kill", "--signal", "KILL", shim)
    engine.podman("wait", shim)
    engine.podman("start", shim)
    wait_ready(engine, shim)
    assert pod.metric('agent_shim_commands_queued{state="queued"}') == 1
    engine.podman("start", agent)
    assert pod.result(waiting)["success"]

    # Removal: nothing waits, the sidecar stops, the manifest is the vendor's again.
    assert pod.metric("agent_shim_commands_queued") == 0
    engine.podman("stop", "-t", "10", shim)
    assert engine.inspect(shim)["State"]["ExitCode"] == 0
    assert remove(text) == vendor_manifest()
    assert "agent-shim" not in str(one(documents(remove(text)), "Deployment"))
