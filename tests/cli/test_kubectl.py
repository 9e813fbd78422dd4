"""kubectl, as a stand-in on the path that a script plays."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from shim.cli.inject.missing_sidecars import agents
from shim.cli.kubectl import ALL, Terms, pods, run
from shim.cli.threads import Interruption


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "kubectl"


def play(kubectl: Path, script: str) -> None:
    kubectl.write_text(f"#!/bin/sh\n{script}\n")
    kubectl.chmod(0o755)


def terms(namespace: str = "pipeops-system") -> Terms:
    return Terms(namespace, 120, Interruption())


@pytest.mark.parametrize(
    "namespace,where", [("pipeops-system", "--namespace pipeops-system"), (ALL, "--all-namespaces")]
)
def test_kubectl_is_asked_for_the_pods(kubectl: Path, namespace: str, where: str) -> None:
    shown = kubectl.with_name("pods.json")
    agent = {"metadata": {"name": "a", "namespace": "prod"}, "spec": {"containers": [{"name": "pipeops-agent"}]}}
    shown.write_text(json.dumps({"kind": "List", "items": [agent]}))
    wanted = f"--context=a --request-timeout=120s get pods {where} --output json"
    play(kubectl, f'[ "$*" = "{wanted}" ] && exec /bin/cat {shown}')
    (found,) = agents(pods(terms(namespace), ("--context=a",)))
    assert (found.namespace, found.name) == ("prod", "a")


def test_a_kubectl_that_fails_or_is_missing_says_why(kubectl: Path) -> None:
    play(kubectl, 'echo "E0101 a log line" >&2; echo "error: no such context" >&2; exit 1')
    with pytest.raises(click.ClickException, match=r"^error: no such context$"):
        pods(terms())
    play(kubectl, "exit 3")
    with pytest.raises(click.ClickException, match="kubectl get: 3"):
        pods(terms())
    kubectl.unlink()
    with pytest.raises(click.ClickException, match="kubectl cannot be run: No such file or directory"):
        pods(terms())


def test_a_program_that_kubectl_has_started_ends_with_it(kubectl: Path) -> None:
    """A program for the login may wait for somebody at a browser, and holds kubectl's output open."""
    login = kubectl.with_name("login")
    os.mkfifo(login)
    play(kubectl, f"(echo started; exec /bin/sleep 1000) > {login} &\nwait")
    asked = terms()
    with ThreadPoolExecutor() as pool:
        outcome = pool.submit(run, asked, (), "get", "pods")
        with login.open() as started:
            assert started.readline() == "started\n"
            asked.interruption.came = True
            with pytest.raises(click.ClickException, match="did not end"):
                outcome.result()
            assert started.read() == "", "the end of the file: nobody holds it any more"
