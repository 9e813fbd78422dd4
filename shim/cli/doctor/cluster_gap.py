"""Findings on agents of the cluster that run without the shim; needs kubectl and its access."""

from __future__ import annotations

from shim.cli.doctor.report import Finding, failed, passed, warned
from shim.cli.inject.missing_sidecars import agents, in_cluster
from shim.cli.inject.sidecar import InjectError

_NAMED = 5


def examine(namespace: str) -> list[Finding]:
    """Return one finding for all agents with a sidecar and one for each without; `all` selects every namespace."""
    try:
        pods = agents(in_cluster("" if namespace == "all" else namespace))
    except InjectError as error:
        return [failed("cluster", str(error), "doctor needs kubectl, and the right to list pods")]
    where = "the cluster" if namespace == "all" else f"namespace {namespace}"
    if not pods:
        return [warned("cluster", f"no agent's pod in {where}", "is it the namespace that the agent runs in?")]
    wrong = [pod for pod in pods if pod.fault]
    found = [
        failed("cluster", f"{p.namespace}/{p.name} {p.fault}", "docs/how-to/kubernetes.md") for p in wrong[:_NAMED]
    ]
    if len(wrong) > _NAMED:
        found.append(failed("cluster", f"and {len(wrong) - _NAMED} more", "`agent-shim inject --check` lists them all"))
    if not wrong:
        out = sum(pod.opted_out for pod in pods)
        found.append(passed("cluster", f"{len(pods) - out} agents in {where} have the shim, {out} opted out"))
    return found
