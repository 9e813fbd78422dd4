"""Clusters through kubectl: `kubectl exec … agent-shim status --json` in every pod with a shim, and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from shim.cli.inject.missing_sidecars import agents, listed
from shim.cli.inject.sidecar import CONFIG_DIR, NAME, InjectError
from shim.cli.rollout.cluster import Cluster, Status, StatusError, add_status, read_status
from shim.core.text import plural, printable

MAX_SHIMS = 50
ERROR_CHARS = 300
ALL = "all"
LOOK_S = 0.5
"""Seconds between two looks for Ctrl-C while a kubectl runs."""
_LOG_LINE = re.compile(r"[EWIF]\d{4} ")


class KubectlError(Exception):
    """kubectl failed; the text is its own, or says why it was not run to its end."""


class Terms(NamedTuple):
    """Conditions that hold for every cluster: the namespace to look in, and when to end a kubectl."""

    namespace: str
    timeout_s: float
    interrupted: Event


class Access(NamedTuple):
    """Access to one cluster: its name in the report, and kubectl's and helm's options that select it."""

    name: str
    options: tuple[str, ...]
    helm: tuple[str, ...]
    terms: Terms


def by_contexts(contexts: Iterable[str], terms: Terms) -> list[Access]:
    """Return the access to each context; a context that is given twice is one."""
    return [
        Access(name, (f"--context={name}",), (f"--kube-context={name}",), terms) for name in dict.fromkeys(contexts)
    ]


def by_kubeconfigs(pattern: str, terms: Terms) -> list[Access]:
    """Return the access by the current context of each file that matches, named after the file."""
    whole = Path(pattern).expanduser().absolute()
    paths = sorted(Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))))
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    options = [(f"--kubeconfig={path}",) for path in paths]
    return [Access(name, option, option, terms) for name, option in zip(names, options, strict=True)]


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
    return "any namespace" if access.terms.namespace == ALL else f"namespace {access.terms.namespace}"


def _pods(access: Access) -> list[Mapping[str, Any]]:
    where = ("--all-namespaces",) if access.terms.namespace == ALL else ("--namespace", access.terms.namespace)
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
    where = ("--namespace", metadata.get("namespace") or access.terms.namespace, metadata["name"], "--container", NAME)
    output = _run(access, "exec", *where, "--", *command)
    try:
        answer = json.loads(output)
    except ValueError:
        raise StatusError("the answer is no JSON: cut off, or not of a shim") from None
    return read_status(answer)


def _run(access: Access, verb: str, *arguments: str) -> str:
    command = ["kubectl", *access.options, f"--request-timeout={access.terms.timeout_s:g}s", verb, *arguments]
    try:
        # A session of its own, so that a login program which kubectl has started ends with it.
        process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise KubectlError(f"kubectl cannot be run: {error.strerror}") from None
    with process:
        output, errors = _communicate(process, access.terms, verb)
    if process.returncode:
        raise KubectlError(_reason(errors.decode("utf-8", "replace")) or f"kubectl {verb}: {process.returncode}")
    return output.decode("utf-8", "replace")


def _communicate(process: subprocess.Popen[bytes], terms: Terms, verb: str) -> tuple[bytes, bytes]:
    """Return standard output and standard error. Kills the process when its time is over, or on Ctrl-C."""
    left_s = terms.timeout_s
    while left_s > 0 and not terms.interrupted.is_set():
        try:
            return process.communicate(timeout=min(left_s, LOOK_S))
        except subprocess.TimeoutExpired:
            left_s -= LOOK_S
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    raise KubectlError(f"kubectl {verb} did not end within {terms.timeout_s:g} s")


def _reason(text: str) -> str:
    """Return the line of kubectl's error output that has the reason; log lines and exit codes stand around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not _LOG_LINE.match(line) and "exit code" not in line]
    errors = [line for line in told if line.lower().startswith(("error", "unable", "the connection"))]
    return printable((errors or told[-1:] or lines[-1:] or [""])[0])[:ERROR_CHARS]
