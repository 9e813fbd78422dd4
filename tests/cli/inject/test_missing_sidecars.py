"""The gap detector on what kubectl says of pods."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
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


def test_kubectl_is_asked(tmp_path: Path) -> None:
    """A stand-in for kubectl on the path, in a process of its own."""
    kubectl = tmp_path / "kubectl"
    code = "from shim.cli.inject import missing_sidecars as m; print(m.agents(m.in_cluster('pipeops-system')))"
    env = {**os.environ, "PATH": str(tmp_path)}

    def asked(script: str) -> subprocess.CompletedProcess[str]:
        kubectl.write_text(f"#!/bin/sh\n{script}\n")
        kubectl.chmod(0o755)
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)

    (tmp_path / "pods.json").write_text(json.dumps({"kind": "List", "items": [copy.deepcopy(running())]}))
    wanted = "get pods --namespace pipeops-system --output json --request-timeout=20s"
    shown = asked(f'[ "$*" = "{wanted}" ] && exec /bin/cat {tmp_path}/pods.json')
    assert "fault='', opted_out=False" in shown.stdout, shown.stderr
    assert "kubectl cannot show pods: no" in asked("echo no >&2; exit 1").stderr
    kubectl.unlink()
    command = [sys.executable, "-c", code]
    missing = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert "kubectl cannot be asked: FileNotFoundError" in missing.stderr


def test_all_namespaces_without_a_name() -> None:
    with pytest.raises(InjectError):
        missing_sidecars.listed("{")
