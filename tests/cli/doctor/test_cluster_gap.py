"""doctor --cluster: agents that run without the shim, as a stand-in for kubectl shows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOLD = "1 agent with the shim in namespace pipeops-system, 0 opted out"
SIDECAR = {"name": "agent-shim", "image": "x", "restartPolicy": "Always"}


def pod(name: str, *, injected: bool, **labels: str) -> dict[str, Any]:
    env = [{"name": "PIPEOPS_API_URL", "value": "http://127.0.0.1:7080"}] if injected else []
    return {
        "metadata": {"name": name, "namespace": "pipeops-system", "labels": {"app": "pipeops-agent", **labels}},
        "status": {"phase": "Running"},
        "spec": {
            "containers": [{"name": "agent", "image": "ghcr.io/pipeopshq/pipeops-k8-agent:main", "env": env}],
            "initContainers": [SIDECAR] if injected else [],
        },
    }


def doctor(folder: Path, pods: list[dict[str, Any]] | None, namespace: str = "all") -> list[dict[str, Any]]:
    (folder / "pods.json").write_text(json.dumps({"kind": "List", "items": pods or []}))
    kubectl = folder / "kubectl"
    script = f"cat {folder}/pods.json" if pods is not None else "echo forbidden >&2; exit 1"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n{script}\n')
    kubectl.chmod(0o755)
    command = [sys.executable, "-m", "shim", "doctor", "--json", "--cluster", namespace]
    command += ["--set", "upstream.url=http://127.0.0.1:9", "--set", f"store.path={folder}/s.db"]
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    findings = json.loads(done.stdout)["findings"]
    return [finding for finding in findings if finding["check"] == "cluster"]


def test_all_have_it(tmp_path: Path) -> None:
    (found,) = doctor(tmp_path, [pod("a", injected=True)], "pipeops-system")
    assert (found["status"], found["text"]) == ("PASS", TOLD)
    assert "--namespace pipeops-system" in (tmp_path / "asked").read_text()


def test_each_that_has_not_is_named_up_to_a_few(tmp_path: Path) -> None:
    found = doctor(tmp_path, [pod(f"agent-{n}", injected=False) for n in range(7)])
    assert [finding["status"] for finding in found] == ["FAIL"] * 6
    assert found[0]["text"].startswith("pipeops-system/agent-0 has no sidecar")
    assert found[-1]["text"] == "and 2 more"
    assert "--all-namespaces" in (tmp_path / "asked").read_text()


def test_no_agent_and_no_access(tmp_path: Path) -> None:
    assert [finding["status"] for finding in doctor(tmp_path, [])] == ["WARN"]
    assert [finding["status"] for finding in doctor(tmp_path, None)] == ["FAIL"]
