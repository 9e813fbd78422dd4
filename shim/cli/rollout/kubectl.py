"""Clusters through kubectl: `kubectl exec … agent-shim status --json` in every pod with a shim, and nothing else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from shim.cli.inject.missing_sidecars import agents, listed
from shim.cli.inject.sidecar import CONFIG_DIR, NAME, InjectError
from shim.cli.rollout.cluster import Cluster, Status, StatusError, add_status, read_status
from shim.core.text import plural, printable

MAX_SHIMS = 50
ERROR_CHARS = 300
ALL = "all"


class KubectlError(Exception):
    """kubectl failed; the text is its own, or says why it was not run to its end."""


class Access(msgspec.Struct, frozen=True):
    """Access to one cluster: its name in the report, kubectl's and helm's options for it, the namespace to look in."""

    name: str
    options: tuple[str, ...]
    helm: tuple[str, ...]
    namespace: str
    timeout_s: float


def by_contexts(contexts: Iterable[str], namespace: str, timeout_s: float) -> list[Access]:
    """Return the access to each context; a context that is given twice is one."""
    return [
        Access(name, (f"--context={name}",), (f"--kube-context={name}",), namespace, timeout_s)
        for name in dict.fromkeys(contexts)
    ]


def by_kubeconfigs(pattern: str, namespace: str, timeout_s: float) -> list[Access]:
    """Return the access by the current context of each file that matches, named after the file."""
    whole = Path(pattern).expanduser().absolute()
    paths = sorted(Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))))
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    options = [(f"--kubeconfig={path}",) for path in paths]
    return [Access(name, option, option, namespace, timeout_s) for name, option in zip(names, options, strict=True)]


def cluster(access: Access) -> Cluster:
    """Return what the shims of one cluster report. Every failure is a gap of the row."""
    row = Cluster(name=access.name)
    for status in statuses(access, row):
        add_status(row, status)
    return row


def statuses(access: Access, row: Cluster) -> list[Status]:
    """Return the status of every shim of a cluster, and add agents' pods and failures to its row."""
    try:
        pods = _pods(access)
    except (KubectlError, InjectError) as error:
        row.gaps.append(str(error))
        return []
    found = agents(pods)
    row.agent_pods = len(found)
    row.sidecar_faults = [f"{pod.name} {pod.fault}" for pod in found if pod.fault]
    opted_out = sum(pod.opted_out for pod in found)
    if opted_out:
        row.notes.append(f"{plural(opted_out, 'agent')} opted out of the sidecar")
    shims = [pod for pod in pods if _has_shim(pod)]
    if not shims:
        row.gaps.append(f"no pod with a container {NAME} in {_where(access)}")
    if len(shims) > MAX_SHIMS:
        row.gaps.append(f"{len(shims) - MAX_SHIMS} more pods with a shim were not asked")
    answers = []
    for pod in shims[:MAX_SHIMS]:
        name = pod["metadata"]["name"]
        try:
            answers.append(_status(access, pod))
        except (KubectlError, StatusError) as error:
            row.gaps.append(f"{name}: {error}")
    return answers


def _where(access: Access) -> str:
    return "any namespace" if access.namespace == ALL else f"namespace {access.namespace}"


def _pods(access: Access) -> list[Mapping[str, Any]]:
    where = ("--all-namespaces",) if access.namespace == ALL else ("--namespace", access.namespace)
    return listed(_run(access, "get", "pods", *where, "--output", "json"))


def _has_shim(pod: Mapping[str, Any]) -> bool:
    spec, metadata = pod.get("spec") or {}, pod.get("metadata") or {}
    containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    running = (pod.get("status") or {}).get("phase", "Running") == "Running" and "deletionTimestamp" not in metadata
    return running and any(each.get("name") == NAME for each in containers)


def _status(access: Access, pod: Mapping[str, Any]) -> Status:
    """Return the status of the shim in a pod. Raises `KubectlError`, and `StatusError` for an answer that is none."""
    metadata = pod["metadata"]
    # The configuration says where the admin port is and which file holds its token: neither leaves the pod.
    command = (NAME, "status", "--config", f"{CONFIG_DIR}/config.yaml", "--json")
    where = ("--namespace", metadata.get("namespace") or access.namespace, metadata["name"], "--container", NAME)
    output = _run(access, "exec", *where, "--", *command)
    try:
        answer = json.loads(output)
    except ValueError:
        raise StatusError("the answer is no JSON: cut off, or not of a shim") from None
    return read_status(answer)


def _run(access: Access, verb: str, *arguments: str) -> str:
    command = ["kubectl", *access.options, f"--request-timeout={access.timeout_s:g}s", verb, *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=access.timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise KubectlError(f"kubectl {verb} did not end within {access.timeout_s:g} s") from None
    except OSError as error:
        raise KubectlError(f"kubectl cannot be run: {error.strerror}") from None
    if done.returncode:
        raise KubectlError(_reason(done.stderr.decode("utf-8", "replace")) or f"kubectl {verb}: {done.returncode}")
    return done.stdout.decode("utf-8", "replace")


def _reason(text: str) -> str:
    """Return the line of kubectl's error output that has the reason; warnings and exit codes stand around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "unable")) and "exit code" not in line]
    return printable((errors or lines or [""])[0])[:ERROR_CHARS]
