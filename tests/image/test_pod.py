"""The pod that injection makes, really run: an agent that knows nothing of it does its job against a controller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.image.test_image import wait_ready
from tests.support.containers import CHECKOUT, DEVTOOLS_MOUNT, Engine
from tests.support.manifests import NAMESPACE, ROOT, container, documents, one, pod_of, rendered, vendor_text
from tests.support.podman_pod import playable
from tests.support.policy import admit

TOKEN = "token-of-the-vendors-secret"
CONTROLLER = "127.0.0.1:8900"
AGENT = (Path(__file__).parent / "agent.py").read_text()

ADMIN_TOKEN = "token-of-whoever-drains"
CHART = ("injection.admissionPolicy.enabled=true", "admin.tokenSecret=shim-admin")

ASK = """
import json, sys, urllib.request
method, path, token, body = sys.argv[1:]
request = urllib.request.Request(path, body.encode() or None, {"Authorization": "Bearer " + token}, method=method)
print(urllib.request.urlopen(request, timeout=90).read().decode())
"""


def vendor_manifest() -> str:
    """The vendor's manifest as a user filled it in."""
    text = vendor_text("manifest").replace("your-token-here", TOKEN)
    return text.replace("https://api.pipeops.sh", f"http://{CONTROLLER}")


def stand_in(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod with a stand-in for the agent's program, and a controller beside it."""
    pod["metadata"]["name"] = "pipeops-agent"
    agent = container(pod, "agent")
    del agent["args"]
    agent["command"] = ["python3", "/agent/agent.py"]
    agent["volumeMounts"].append({"name": "program", "mountPath": "/agent"})
    pod["spec"]["volumes"].append({"name": "program", "configMap": {"name": "program"}})
    controller = {
        "name": "controller",
        "args": ["controller", "--listen", CONTROLLER, "--token", TOKEN],
        "env": [{"name": "PYTHONPATH", "value": CHECKOUT}],
        "volumeMounts": [{"name": "devtools", "mountPath": DEVTOOLS_MOUNT, "readOnly": True}],
    }
    pod["spec"]["containers"].append(controller)
    devtools = {"path": str(ROOT / "devtools"), "type": "Directory"}
    pod["spec"]["volumes"].append({"name": "devtools", "hostPath": devtools})
    return pod


class Pod:
    """The pod that the chart's policy makes of the vendor's, under podman; started one by one, as a kubelet does."""

    def __init__(self, engine: Engine, image: str) -> None:
        self.engine = engine
        chart, vendors = rendered(*CHART), documents(vendor_manifest())
        pod = stand_in(admit(one(chart, "MutatingAdmissionPolicy"), pod_of(vendor_manifest()), NAMESPACE))
        program = {"kind": "ConfigMap", "metadata": {"name": "program"}, "data": {"agent.py": AGENT}}
        config_maps = [each for each in (*chart, *vendors, program) if each["kind"] == "ConfigMap"]
        admin = {"kind": "Secret", "metadata": {"name": "shim-admin"}, "stringData": {"token": ADMIN_TOKEN}}
        secrets = [each for each in (*vendors, admin) if each["kind"] == "Secret"]
        # A run that was killed leaves its pod in the tests' own storage, under this name.
        engine.podman("pod", "rm", "-f", "-t", "1", "pipeops-agent", check=False)
        played = playable(pod, config_maps, secrets, image)
        # A pod's ConfigMaps and directories stay behind as volumes, and would be taken for those of the next.
        left = [each["metadata"]["name"] for each in played] + [each["name"] for each in pod["spec"]["volumes"]]
        for name in left:
            engine.podman("volume", "rm", "-f", name, check=False)
        engine.podman("play", "kube", "--network=none", "--start=false", "-", stdin=yaml.safe_dump_all(played))

    def start(self, name: str) -> str:
        full = f"pipeops-agent-{name}"
        self.engine.podman("start", full)
        return full

    def ask(self, method: str, url: str, body: Any = None, token: str = "") -> str:
        """An HTTP request from inside the pod, whose loopback all containers share."""
        text = "" if body is None else json.dumps(body)
        return self.engine.podman("exec", "pipeops-agent-controller", "python3", "-c", ASK, method, url, token, text)

    def push(self, **command: Any) -> str:
        command_id: str = json.loads(self.ask("POST", f"http://{CONTROLLER}/control/commands", command))["ids"][0]
        return command_id

    def result(self, command_id: str) -> dict[str, Any]:
        query = "?wait=result&timeout_s=60"
        answer = json.loads(self.ask("GET", f"http://{CONTROLLER}/control/commands/{command_id}{query}"))
        found: dict[str, Any] = answer["results"][0]["payload"]
        return found

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "http://127.0.0.1:7090/metrics").splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.needs("helm4")
def test_the_injected_pod_does_the_main_job_and_is_taken_apart_without_a_loss(
    engine: Engine, image: str, started: list[str]
) -> None:
    started.append("pod:pipeops-agent")
    pod = Pod(engine, image)
    pod.start("controller")
    shim = pod.start("agent-shim")
    wait_ready(engine, shim)
    agent = pod.start("agent")
    the_chart_s_limits_hold(engine, shim)
    commands_come_and_results_go(pod, shim, agent)
    a_command_waits_through_a_crash(pod, shim, agent)
    a_drain_leaves_nothing_behind(pod, agent)
    engine.podman("stop", "-t", "10", shim)
    assert engine.inspect(shim)["State"]["ExitCode"] == 0


def the_chart_s_limits_hold(engine: Engine, shim: str) -> None:
    known = engine.inspect(shim)
    assert known["HostConfig"]["ReadonlyRootfs"]
    assert known["HostConfig"]["Memory"] == 128 * 1024 * 1024
    assert known["EffectiveCaps"] in (None, [])
    assert known["Config"]["User"] == "10001:10001"
    listing = "import os; print(os.listdir('/var/run/secrets/kubernetes.io/serviceaccount'))"
    assert engine.podman("exec", shim, "python3", "-c", listing) == "[]\n"


def commands_come_and_results_go(pod: Pod, shim: str, agent: str) -> None:
    # Registered through the sidecar before anything else: a first registration that fails ends the agent.
    query = "?type=register&direction=in&wait_s=10"
    assert json.loads(pod.ask("GET", f"http://{CONTROLLER}/control/messages{query}"))["messages"]
    done = pod.result(pod.push(type="deploy", payload={"app": "web"}))
    assert (done["success"], done["output"]) == (True, "done: {'app': 'web'}")
    assert "at http://127.0.0.1:7080" in pod.engine.podman("logs", agent)
    for name in (shim, agent):
        logs = pod.engine.podman("logs", name)
        assert TOKEN not in logs
        assert ADMIN_TOKEN not in logs


def push_to_nobody(pod: Pod, agent: str, **payload: int) -> str:
    """The id of a command that the shim has and no agent fetches."""
    pod.engine.podman("stop", "-t", "1", agent)
    command_id = pod.push(type="restart", payload=payload)
    pod.ask("GET", f"http://{CONTROLLER}/control/commands/{command_id}?wait=sent&timeout_s=60")
    return command_id


def a_command_waits_through_a_crash(pod: Pod, shim: str, agent: str) -> None:
    waiting = push_to_nobody(pod, agent, n=1)
    pod.engine.podman("kill", "--signal", "KILL", shim)
    pod.engine.podman("wait", shim)
    pod.engine.podman("start", shim)
    wait_ready(pod.engine, shim)
    assert pod.metric('agent_shim_commands_queued{state="queued"}') == 1
    pod.engine.podman("start", agent)
    assert pod.result(waiting)["success"]


def a_drain_leaves_nothing_behind(pod: Pod, agent: str) -> None:
    """docs/how-to/kubernetes.md, Removal: what waits when it begins is delivered, what comes later is refused."""
    last = push_to_nobody(pod, agent, n=2)
    drain = json.loads(pod.ask("POST", "http://127.0.0.1:7090/drain", token=ADMIN_TOKEN))["drain"]
    assert (drain["state"], drain["commands"]) == ("draining", 1)
    late = pod.result(pod.push(type="restart", payload={"n": 3}))
    assert not late["success"]
    pod.engine.podman("start", agent)
    assert pod.result(last)["success"]
    assert pod.metric("agent_shim_commands_queued") == 0
