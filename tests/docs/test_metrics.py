"""docs/reference/metrics.md names every metric with its type, labels and label values, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

from shim.admin.gauges import StatusCollector
from shim.management.status_builder import StatusBuilder
from shim.management.subject import Subject
from shim.metrics import COMMAND_EVENTS, ClusterMetrics, Labelled, Metrics, Registry, RequestCounts
from tests.support.virtual import run_virtual
from tests.support.world import World

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "reference" / "metrics.md").read_text()
OPEN = "…"


@dataclass(frozen=True)
class Described:
    """A metric: what the page says, or what the code has. Labels: name and values, sorted; `…` for open ones."""

    kind: str
    labels: tuple[tuple[str, tuple[str, ...]], ...]


def documented() -> dict[str, Described]:
    rows = re.findall(r"^\| `(agent_shim_\w+)` \| (\w+) \|([^|]*)\| \S[^|]* \|[^|]*\|$", DOCS, re.MULTILINE)
    assert len(rows) == len({name for name, _, _ in rows})
    found = {}
    for name, kind, labels in rows:
        pairs = re.findall(r"`(\w+)`: ([^;]+)", labels)
        found[name] = Described(kind, tuple((label, tuple(sorted(v.split(", ")))) for label, v in strip(pairs)))
    return found


def strip(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted((label, values.strip()) for label, values in pairs)


def own() -> Iterator[tuple[str, Described]]:
    """The metrics that the shim counts itself."""
    metrics = Metrics(Registry())
    yield from described(metrics)
    yield from described(ClusterMetrics(metrics))


def described(holder: Metrics | ClusterMetrics) -> Iterator[tuple[str, Described]]:
    """The metrics that are attributes of an object."""
    for held in vars(holder).values():
        if isinstance(held, Labelled):
            name, kind, values_of = held.metric._name, held.metric._type, held.values_of
        elif isinstance(held, Counter | Gauge | Histogram):
            name, kind, values_of = held._name, held._type, {}
        elif isinstance(held, RequestCounts):
            for family in held.collect():
                labels = [(label, (OPEN,)) for label in sorted(family._labelnames)]
                yield family.name, Described(family.type, tuple(labels))
            continue
        else:
            continue
        labels = sorted(
            (label, (OPEN,) if values is None else tuple(sorted(set(values) - {"other"})))
            for label, values in values_of.items()
        )
        yield name, Described(kind, tuple(labels))


async def collected() -> dict[str, Described]:
    """The gauges that are read from the bridge, of one with an agent that polls."""
    world = World()
    world.start()
    await world.settle()
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    await agent.poll()
    found = {}
    subject = Subject.of(world.bridge)
    builder = StatusBuilder(subject, {})
    for metric in StatusCollector(lambda: builder.take([])).collect():
        names = sorted({label for sample in metric.samples for label in sample.labels})
        values = {name: {sample.labels[name] for sample in metric.samples} for name in names}
        found[metric.name] = Described(metric.type, tuple((name, tuple(sorted(values[name]))) for name in names))
    await world.stop()
    return found


def test_every_metric_is_documented_as_it_is() -> None:
    page = documented()
    for name, described in own():
        expected = described
        if name == "agent_shim_upstream_messages":  # its types are a table of their own in the protocol
            expected = Described("counter", (("direction", (OPEN,)), ("type", (OPEN,))))
        assert page.pop(name) == expected, name
    for name, described in run_virtual(collected()).items():
        on_page = page.pop(name)
        assert on_page.kind == described.kind, name
        assert [label for label, _ in on_page.labels] == [label for label, _ in described.labels], name
        for (label, values), (_, seen) in zip(on_page.labels, described.labels, strict=True):
            known = {"true", "false"} if label == "fresh" else set(seen)
            assert values == (OPEN,) or set(values) == known, (name, label)
    assert page == {}, "documented, and not there"


def test_every_name_in_the_text_exists() -> None:
    named = set(re.findall(r"`(agent_shim_[a-z_]+)`", DOCS))
    assert named == set(documented())


def literals(name: str, node: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == name:
            yield call, ast.unparse(call.func.value)


def words(argument: ast.expr) -> list[str]:
    """The texts that an argument may be, as far as it is written down there."""
    if isinstance(argument, ast.IfExp):
        return [*words(argument.body), *words(argument.orelse)]
    return [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []


def test_label_values_in_the_code_are_declared() -> None:
    """What is not would be counted as `other`."""
    metrics = Metrics(Registry())
    seen = 0
    for path in (ROOT / "shim").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for call, of in literals("labels", tree):
            held = getattr(metrics, of.rpartition("metrics.")[2], None) if "metrics." in of else None
            if not isinstance(held, Labelled):
                continue
            assert len(call.args) == len(held.values_of), (path, call.lineno)
            for argument, (label, allowed) in zip(call.args, held.values_of.items(), strict=True):
                for word in words(argument):
                    assert allowed is None or word in allowed, (path, call.lineno, label, word)
                    seen += 1
        if path.parent.name == "bridge":
            events = [(call, call.args[0]) for call, _ in literals("count", tree) if call.args]
            events += [(call, call.args[3]) for call, _ in literals("mark", tree) if len(call.args) > 3]
            for call, argument in events:
                for word in words(argument):
                    assert word in COMMAND_EVENTS, (path, call.lineno, word)
                    seen += 1
    assert seen > 20


def test_an_unknown_label_value_counts_as_other_and_their_number_is_bounded() -> None:
    registry = Registry()
    metrics = Metrics(registry)
    metrics.commands.labels("invented").inc()
    assert registry.get_sample_value("agent_shim_commands_total", {"event": "other"}) == 1
    for number in range(5000):
        metrics.requests.count(None, number, 0.0)
    (family,) = [metric for metric in registry.collect() if metric.name == "agent_shim_requests"]
    assert len(family.samples) <= 1100
    assert sum(sample.value for sample in family.samples) == 5000


def test_closed_labels_exist_from_the_start_and_nothing_is_shown_twice() -> None:
    registry = Registry()
    Metrics(registry)
    assert registry.get_sample_value("agent_shim_commands_total", {"event": "dead"}) == 0
    assert not [s.name for metric in registry.collect() for s in metric.samples if s.name.endswith("_created")]
