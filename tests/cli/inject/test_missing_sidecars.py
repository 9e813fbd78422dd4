"""The gap detector on what kubectl says of pods."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from shim.cli.inject import missing_sidecars
from shim.cli.inject.documents import Options, inject
from shim.cli.inject.sidecar import InjectError
from tests.support.manifests import SHAPES, container, pod_of, vendor_text

OPTIONS = Options("example/agent-shim:v9")


def running(shape: str = "manifest", injected: bool = True) -> dict[str, Any]:
    text = vendor_text(shape)
    pod = pod_of(inject(text, OPTIONS) if injected else text)
    pod["metadata"] |= {"name": "pipeops-agent-1", "namespace": "pipeops-system"}
    return {**pod, "status": {"phase": "Running"}}


def fault(pod: dict[str, Any]) -> str:
    (found,) = missing_sidecars.agents([pod])
    return found.fault


@pytest.mark.parametrize("shape", SHAPES)
def test_with_and_without(shape: str) -> None:
    assert fault(running(shape)) == ""
    assert "has no sidecar" in fault(running(shape, injected=False))


def test_what_can_be_wrong() -> None:
    host = running()
    host["spec"]["hostNetwork"] = True
    assert "uses hostNetwork" in fault(host)
    elsewhere = running()
    container(elsewhere, "agent")["env"][0]["value"] = "https://api.pipeops.sh"
    assert "does not lead there" in fault(elsewhere)
    alone = running()
    del alone["spec"]["initContainers"]
    assert "there is no sidecar" in fault(alone)


def test_what_is_no_gap() -> None:
    finished = running(injected=False) | {"status": {"phase": "Succeeded"}}
    stranger = {"metadata": {"name": "web"}, "spec": {"containers": [{"name": "agent", "image": "datadog"}]}}
    assert missing_sidecars.agents([finished, stranger, {}]) == []
    to_gateway = running(injected=False)
    url = "http://agent-shim.pipeops-system.svc:7080"
    container(to_gateway, "agent")["env"].insert(0, {"name": "PIPEOPS_API_URL", "value": url})
    assert fault(to_gateway) == ""
    out = running(injected=False)
    out["metadata"]["labels"]["agent-shim/inject"] = "disabled"
    assert missing_sidecars.agents([out]) == [
        missing_sidecars.Pod("pipeops-system", "pipeops-agent-1", "", opted_out=True)
    ]


def check(stdin: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shim", "inject", "--check"]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_the_command() -> None:
    pods = [running(), running(injected=False)]
    done = check(json.dumps({"kind": "List", "items": pods}))
    assert done.returncode == 1
    assert [line.partition(":")[2].split()[0] for line in done.stdout.splitlines()] == ["ok", "has"]
    assert check(json.dumps({"kind": "PodList", "items": pods[:1]})).returncode == 0
    assert check(json.dumps(pods[0])).stdout == "pipeops-system/pipeops-agent-1: ok\n"
    assert check('{"kind": "List", "items": []}').stdout == "no agent is running here\n"
    for text in ("pods", "[]"):
        wrong = check(text)
        assert wrong.returncode == 1
        assert "not what `kubectl get pods" in wrong.stderr


def test_all_namespaces_without_a_name() -> None:
    with pytest.raises(InjectError):
        missing_sidecars.listed("{")
