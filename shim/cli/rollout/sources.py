"""Sources of the report: contexts, kubeconfig files, one Prometheus, or a file of admin ports."""

from __future__ import annotations

import glob
import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import click

from shim.cli import kubectl
from shim.cli.admin_client import TIMEOUT_S, AdminPort, given
from shim.cli.inject.missing_sidecars import agents
from shim.cli.inject.sidecar import CONFIG_DIR, NAME
from shim.cli.kubectl import Terms
from shim.cli.rollout import placement
from shim.cli.rollout.cluster import Cluster, Status, add_status, read_status
from shim.cli.rollout.placement import Place
from shim.cli.rollout.prometheus import Prometheus, clusters
from shim.cli.threads import DaemonThreads, Interruption
from shim.clock import Clock
from shim.config.loader import read_secret
from shim.config.settings import Rollout
from shim.core.text import plural
from shim.errors import ConfigError

MAX_SHIMS = 50


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
    path = os.path.expanduser(pattern)  # noqa: PTH111 - an unknown user is an error for `Path`
    found = glob.glob(path, recursive=True, include_hidden=True)  # noqa: PTH207 - many patterns are errors for `Path`
    paths = sorted(Path(each).absolute() for each in found)
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    options = [(f"--kubeconfig={path}",) for path in paths]
    return [Access(name, option, option, terms) for name, option in zip(names, options, strict=True)]


def cluster_of_context(access: Access) -> Cluster:
    """Return what the shims of one cluster report. Every failure is a gap of the row."""
    row = Cluster(name=access.name)
    for status in statuses(access, row):
        add_status(row, status, Clock().wall_s())
    return row


def statuses(access: Access, row: Cluster) -> list[Status]:
    """Return the status of every shim of a cluster, and add agents' pods and failures to its row."""
    try:
        pods = kubectl.pods(access.terms, access.options)
    except click.ClickException as error:
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
        row.gaps.append(f"no pod with a container {NAME} in {access.terms.where}")
    if len(shims) > MAX_SHIMS:
        row.gaps.append(f"{len(shims) - MAX_SHIMS} more pods with a shim were not asked")
    answers = []
    for pod in shims[:MAX_SHIMS]:
        name = pod["metadata"]["name"]
        try:
            answers.append(_status_in(access, pod))
        except click.ClickException as error:
            row.gaps.append(f"{name}: {error}")
    return answers


def _has_shim(pod: Mapping[str, Any]) -> bool:
    spec, metadata = pod.get("spec") or {}, pod.get("metadata") or {}
    containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    running = (pod.get("status") or {}).get("phase", "Running") == "Running" and "deletionTimestamp" not in metadata
    return running and any(each.get("name") == NAME for each in containers)


def _status_in(access: Access, pod: Mapping[str, Any]) -> Status:
    """Return the status of the shim in a pod. Raises click's error."""
    metadata = pod["metadata"]
    # The configuration says where the admin port is and which file holds its token: neither leaves the pod.
    command = (NAME, "status", "--config", f"{CONFIG_DIR}/config.yaml", "--json")
    where = ("--namespace", metadata.get("namespace") or access.terms.namespace, metadata["name"], "--container", NAME)
    output = kubectl.run(access.terms, access.options, "exec", *where, "--", *command)
    try:
        answer = json.loads(output)
    except ValueError:
        raise click.ClickException("the answer is no JSON: cut off, or not of a shim") from None
    return read_status(answer)


# --- all sources ------------------------------------------------------------------------------------------------------

PARALLEL = 8
TOKEN_VARIABLE = "SHIM_ADMIN__TOKEN_FILE"  # noqa: S105 - the name of a variable
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*", re.ASCII)
_T = TypeVar("_T")
_R = TypeVar("_R")


class Source(NamedTuple):
    """Source of the rows: one reader for each cluster, or one Prometheus for all.

    `access` maps clusters to helm's options, as far as kubectl reaches them. Clusters in `expected` get a row in any
    case. Names in `doubles` were given more than once.
    """

    terms: Terms
    parallel: int
    expected: tuple[str, ...]
    readers: Mapping[str, Callable[[], Cluster]] = MappingProxyType({})
    prometheus: Prometheus | None = None
    access: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    doubles: tuple[str, ...] = ()


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select the clusters; `source_of` turns them into a `Source`."""
    for option in (
        click.option(
            "--timeout", "timeout_s", type=click.FloatRange(1, 600), default=30, show_default=True, metavar="S"
        ),
        click.option("--parallel", type=click.IntRange(1, 64), default=PARALLEL, show_default=True, metavar="N"),
        click.option(
            "--namespace", default="pipeops-system", show_default=True, help="Of the agents; `all`: every one."
        ),
        click.option("--cluster-label", default="cluster", show_default=True, help="With --prometheus."),
        click.option("--token-file", metavar="FILE", help="Bearer token of the admin ports, or of Prometheus."),
        click.option("--expect", metavar="FILE", help="Names that must have a row, one a line; - is standard input."),
        click.option("--urls", metavar="FILE", help="Lines of NAME URL [TOKEN-FILE]: admin ports."),
        click.option("--prometheus", "prometheus_url", metavar="URL", help="One Prometheus that scrapes all shims."),
        click.option("--kubeconfig-glob", metavar="GLOB", help="Files of kubectl, each with one cluster."),
        click.option("--contexts", metavar="A,B", help="Contexts of kubectl."),
    ):
        command = option(command)
    return command


def source_of(  # noqa: PLR0913 - one for each option
    *,
    contexts: str | None,
    kubeconfig_glob: str | None,
    prometheus_url: str | None,
    urls: str | None,
    expect: str | None,
    token_file: str | None,
    cluster_label: str,
    namespace: str,
    parallel: int,
    timeout_s: float,
) -> Source:
    """Return the source that the options name. Raises click's errors."""
    if sum(map(bool, (contexts, kubeconfig_glob, prometheus_url, urls))) != 1:
        raise click.UsageError("give one of --contexts, --kubeconfig-glob, --prometheus, --urls")
    expected = tuple(dict.fromkeys(placement.read_cluster_names(expect))) if expect else ()
    if expect and not expected:  # a list whose making failed must not count as one that every report fulfils
        raise click.ClickException(f"{expect} names no cluster")
    source = Source(Terms(namespace, timeout_s, Interruption()), parallel, expected)
    if prometheus_url:
        return source._replace(prometheus=_prometheus(prometheus_url, token_file, cluster_label, timeout_s))
    if urls:
        token_file = token_file or os.environ.get(TOKEN_VARIABLE, "")
        found = read_lines(placement.read_names(urls), token_file)
        readers = {name: partial(cluster_of_ports, name, ports, source.terms) for name, ports in found.items()}
        return source._replace(readers=_some(readers, urls))
    accesses = _access(contexts, kubeconfig_glob, source.terms)
    return source._replace(
        readers=_some({each.name: partial(cluster_of_context, each) for each in accesses}, contexts or kubeconfig_glob),
        access={each.name: each.helm for each in accesses},
        doubles=_doubles(split(contexts)) if contexts else (),
    )


def collect(source: Source) -> tuple[list[Cluster], list[str]]:
    """Return a row for each cluster, and the failures of the source itself."""
    rows: list[Cluster] = []
    faults: list[str] = []
    if source.prometheus is not None:
        try:
            rows = clusters(source.prometheus, Clock().wall_s())
        except click.ClickException as error:
            faults.append(str(error))
        else:
            faults += [f"Prometheus warns: {each}" for each in sorted(source.prometheus.warnings)]
            if not rows:
                faults.append("this Prometheus has no series of a shim: agent_shim_build_info, in the last 24 h")
    else:
        rows = in_parallel(list(source.readers.items()), source.parallel, _read, source.terms.interruption)
        _find_same_shims(rows)
    names = {each.name for each in rows}
    rows += [Cluster(name=name, gaps=["expected, and not seen"]) for name in source.expected if name not in names]
    for row in rows:
        if row.name in source.doubles:
            row.notes.append("given more than once, asked once")
    return rows, faults


def _find_same_shims(rows: Iterable[Cluster]) -> None:
    """Add a gap to each row in which a shim of an earlier row answered: the cluster of its name was not seen.

    A shim is recognised by the time of its start, which has microseconds; its address may be written in several ways.
    """
    names: dict[float, str] = {}
    for row in rows:
        for started_at in row.started:
            first = names.setdefault(started_at, row.name)
            if first != row.name:
                row.gaps.append(f"the shim that answered is that of {first}: give each shim once")


def _read(each: tuple[str, Callable[[], Cluster]]) -> Cluster:
    name, read = each
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - a defect in reading one cluster must not hide all the others
        return Cluster(name=name, gaps=[f"the answer cannot be read: {type(error).__name__}: {error}"])


def contexts_places(
    contexts: str, namespace: str, timeout_s: float, percents: Sequence[float], lists: Rollout
) -> list[Place]:
    """Return the places of all agents that the shims in these contexts know, and a row for each that does not answer.

    A context's name is not the cluster's name, which only the agent has.
    """

    def ask(access: Access) -> list[Place]:
        """Return the places of the agents in one context, and a row without a place for each problem."""
        row = Cluster(name=access.name)
        found = statuses(access, row)
        names = [place.name for status in found for place in status.rollout.agents.items]
        hidden = sum(status.rollout.agents.total - len(status.rollout.agents.items) for status in found)
        problems = [*row.gaps, *([f"{hidden} more agents are not listed"] if hidden else [])]
        if not names and not problems:
            problems = ["no agent has called: its name is not known yet"]
        places = [placement.place(name, percents, lists, context=access.name) for name in dict.fromkeys(names)]
        unknown = [Place("", None, "", {}, context=access.name, problem=problem) for problem in problems]
        return places + unknown

    terms = Terms(namespace, timeout_s, Interruption())
    found = by_contexts(split(contexts), terms)
    return [place for places in in_parallel(found, PARALLEL, ask, terms.interruption) for place in places]


def in_parallel(
    items: Sequence[_T], parallel: int, function: Callable[[_T], _R], interruption: Interruption
) -> list[_R]:
    """Return the results in the order of the items, computed in at most `parallel` threads.

    Ctrl-C and SIGTERM set `interruption`, so that running functions can end early, and raise `KeyboardInterrupt` when
    they have ended. Without SIGTERM, a pipeline that ends this process would leave its kubectls behind.
    """

    def interrupt(*_: object) -> None:
        """Set the flag. An exception here could leave a lock of the pool taken, and the pool would never end."""
        interruption.came = True

    def call(item: _T) -> _R:
        """Call the function, unless the user has interrupted it."""
        if interruption.came:
            raise KeyboardInterrupt
        return function(item)

    before = [(number, signal.signal(number, interrupt)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with ThreadPoolExecutor(max_workers=parallel) as pool:
            futures = [pool.submit(call, item) for item in items]
            # A signal that arrives just before this thread begins to wait is handled only when the wait ends.
            while wait(futures, timeout=kubectl.LOOK_S).not_done:
                pass
            results = [future.result() for future in futures]
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    if interruption.came:
        raise KeyboardInterrupt
    return results


def split(text: str) -> list[str]:
    """Return the names in a list with commas; spaces around them and empty ones are left out."""
    return [name for each in text.split(",") if (name := each.strip())]


def _doubles(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(names) if names.count(name) > 1)


def _some(readers: Mapping[str, Callable[[], Cluster]], given: str | None) -> Mapping[str, Callable[[], Cluster]]:
    if not readers:
        raise click.ClickException(f"{given} names no cluster")
    return readers


def _access(contexts: str | None, pattern: str | None, terms: Terms) -> list[Access]:
    if contexts is not None:
        return by_contexts(split(contexts), terms)
    return by_kubeconfigs(pattern or "", terms)


def _prometheus(url: str, token_file: str | None, label: str, timeout_s: float) -> Prometheus:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise click.BadParameter("expected http(s)://HOST[:PORT][/PATH]", param_hint="--prometheus")
    if not _LABEL.fullmatch(label):
        raise click.BadParameter(f"{label!r} is no label's name", param_hint="--cluster-label")
    try:
        token = read_secret(token_file, f"--token-file {token_file}") if token_file else ""
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    return Prometheus(url, token, label, timeout_s)


_Port = tuple[str, str, str]
"""An admin port by its line: URL, token file, and the reason why it cannot be asked, or an empty text."""


def read_lines(lines: Iterable[str], token_file: str) -> dict[str, list[_Port]]:
    """Return the admin ports of each cluster that the lines name. Lines with the same name are shims of one cluster.

    A line may be a URL alone; its host and port are the name then.
    """
    found: dict[str, dict[_Port, None]] = {}
    for line in lines:
        words = line.split()
        if len(words) == 1:
            words = [(line.partition("://")[2] or line).rpartition("@")[2], line]
        url, file = words[1], words[2] if len(words) == 3 else token_file
        reason = "" if len(words) <= 3 else f"not `NAME URL [TOKEN-FILE]` but {len(words)} words"
        if "@" in url:
            # The text of the line is shown nowhere: it may hold a password.
            url, reason = "", "the URL has a user: an admin port takes a token, from TOKEN-FILE or --token-file"
        found.setdefault(words[0], {})[url, file, reason] = None
    return {name: list(ports) for name, ports in found.items()}


def cluster_of_ports(name: str, ports: Iterable[_Port], terms: Terms) -> Cluster:
    """Return what the shims of one cluster report. Every failure is a gap of the row."""
    row = Cluster(name=name)
    for url, token_file, reason in ports:
        if terms.interruption.came:
            break
        try:
            if reason:
                raise click.ClickException(reason)
            add_status(row, _status_at(url, token_file, terms), Clock().wall_s())
        except (click.ClickException, ConfigError) as error:
            text = str(error)
            row.gaps.append(f"{url}: {text}" if url and url not in text else text)
    return row


def _status_at(url: str, token_file: str, terms: Terms) -> Status:
    host, port = given(url)
    token = read_secret(token_file, f"the token file {token_file}") if token_file else ""
    admin_port = AdminPort(
        host,
        port,
        token,
        min(TIMEOUT_S, terms.timeout_s),
        whole_s=terms.timeout_s,
        piece_s=terms.timeout_s,
        remedy="start the shim, or mend its line",
        login_remedy="name its file in the line, or give --token-file",
    )
    # Ctrl-C must not wait for a port that does not answer.
    asked = DaemonThreads().submit(admin_port.ask, "GET", "/status.json")
    while not wait([asked], timeout=kubectl.LOOK_S).done:
        if terms.interruption.came:
            raise click.ClickException("interrupted")
    return read_status(asked.result())
