"""The vendor's manifests, our chart, and the tools that work with them."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "agent-shim"
VENDOR = ROOT / "tests" / "cli" / "inject" / "vendor"
SHAPES = {"manifest": "manifest", "installer": "manifest", "chart": "chart"}
"""The vendor's ways to install the agent → what our chart and components call them."""
NAMESPACE = "pipeops-system"
HELMS = ("helm3", "helm4")
REGISTRY = "registry.example"


class Refused(Exception):
    """A tool ended with an error; the text is what it said."""


def run(*command: str | Path, stdin: str = "", env: dict[str, str] | None = None) -> str:
    """Run a program and return its output. Raises `Refused` with its error output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        raise Refused(done.stderr or done.stdout)
    return done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    """Return the manifests of a stream."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def assert_valid(manifest: dict[str, Any], version: str) -> None:
    """Hold a manifest to the schema of a Kubernetes version, in which no unknown field is allowed."""
    import kubernetes_validate  # noqa: PLC0415 - takes a second, which most processes of pytest-xdist need not spend

    kubernetes_validate.validate(manifest, version, strict=True)


def template(*sets: str, helm: str = "helm4", values: str | Path | None = None, kube: str = "1.36") -> str:
    """Render the chart as the release `agent-shim`; `sets` are `key=value`. Without `values` a registry is set."""
    if values is None:
        sets = (f"image.registry={REGISTRY}", *sets)
    more = [part for pair in sets for part in ("--set", pair)]
    if values is not None:
        more += ["--values", str(values)]
    return run(helm, "template", "agent-shim", CHART, "--namespace", NAMESPACE, "--kube-version", kube, *more)


def rendered(*sets: str, **how: Any) -> list[dict[str, Any]]:
    """The objects of the chart; see `template`."""
    return documents(template(*sets, **how))


def one(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """The only object of this kind, or that of this name."""
    (found,) = [each for each in objects if each["kind"] == kind and (not name or each["metadata"]["name"] == name)]
    return found


def vendor_text(shape: str) -> str:
    """A manifest as the vendor ships it."""
    return (VENDOR / f"{shape}.yaml").read_text()


def pod_of(text: str) -> dict[str, Any]:
    """The pod that the agent's Deployment in a stream makes."""
    made = copy.deepcopy(one(documents(text), "Deployment", "pipeops-agent")["spec"]["template"])
    return {"apiVersion": "v1", "kind": "Pod", **made}


def container(pod: dict[str, Any], name: str) -> dict[str, Any]:
    """A container or init container of a pod by its name."""
    spec = pod["spec"]
    (found,) = [each for each in [*spec["containers"], *spec.get("initContainers", [])] if each["name"] == name]
    return found


def env_of(found: dict[str, Any]) -> dict[str, Any]:
    """Name → value or source of a container's variables."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in found.get("env", [])}
