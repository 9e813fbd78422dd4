"""Texts that agents choose have a bound where they enter: cut where they only tell, refused where they identify."""

from __future__ import annotations

from typing import Any

import pytest

from shim.core.agent_calls import HeartbeatCall, RegisterCall
from shim.core.bounds import MAX_KEPT_BYTES, MAX_KEPT_VALUES, MAX_LABELS, MAX_NAME_CHARS, MAX_WORD_CHARS
from shim.errors import AgentError
from shim.protocol import dialects
from shim.protocol.dialects import Call

LONG = "x" * 1_000_000
BY_NAME = {dialect.NAME: dialect for dialect in dialects.load()}


def register(**fields: Any) -> RegisterCall:
    body = {"agent_id": "a", "name": "n"} | fields
    call = BY_NAME["clusters_agent"].parse("register", Call({}, body))
    assert isinstance(call, RegisterCall)
    return call


def heartbeat(**fields: Any) -> HeartbeatCall:
    call = BY_NAME["clusters_agent"].parse("heartbeat", Call({"cluster_id": "c"}, fields))
    assert isinstance(call, HeartbeatCall)
    return call


@pytest.mark.parametrize("field", ["k8s_version", "hostname", "agent_version", "version", "server_ip", "region"])
def test_what_tells_about_an_agent_is_cut(field: str) -> None:
    payload = register(**{field: LONG}).payload
    kept = payload["agent_version" if field == "version" else field]
    assert (len(kept), kept[-1]) == (MAX_WORD_CHARS, "…")
    known = heartbeat(metadata={field: LONG}).known
    assert [len(text) for text in known.values()] == [MAX_WORD_CHARS]


def test_labels_are_few_and_short() -> None:
    labels = register(labels={f"{number}{LONG}": LONG for number in range(MAX_LABELS + 9)}).payload["labels"]
    assert len(labels) == MAX_LABELS
    assert {len(text) for pair in labels.items() for text in pair} == {MAX_WORD_CHARS}


def test_statuses_are_cut() -> None:
    call = heartbeat(status=LONG, tunnel_status=LONG)
    assert [len(call.status), len(call.tunnel_status)] == [MAX_WORD_CHARS] * 2


@pytest.mark.parametrize("field", ["name", "cluster_name"])
def test_a_name_too_long_is_refused_by_its_key(field: str) -> None:
    for call in (register, heartbeat):
        with pytest.raises(AgentError, match="name or cluster_name may have 256 characters") as refused:
            call(**{field: "x" * (MAX_NAME_CHARS + 1)})
        assert refused.value.status == 400
        call(**{field: "x" * MAX_NAME_CHARS})


@pytest.mark.parametrize("field", ["agent_id", "cluster_id"])
def test_an_id_too_long_is_refused_by_its_key(field: str) -> None:
    with pytest.raises(AgentError, match=f"invalid {field}"):
        register(**{field: "x" * 257})


@pytest.mark.parametrize("operation", ["register", "heartbeat"])
@pytest.mark.parametrize("name", ["agents", "clusters", "clusters_agent"])
def test_what_is_kept_of_an_agent_is_bounded(name: str, operation: str) -> None:
    body, params = {"agent_id": "a", "name": "n"}, {"agent_id": "a", "cluster_id": "c"}
    BY_NAME[name].parse(operation, Call(params, body, size_bytes=MAX_KEPT_BYTES))
    with pytest.raises(AgentError) as refused:
        BY_NAME[name].parse(operation, Call(params, body, size_bytes=MAX_KEPT_BYTES + 1))
    assert refused.value.status == 413


@pytest.mark.parametrize("name", ["agents", "clusters", "clusters_agent"])
def test_a_heartbeat_of_many_small_values_is_refused_because_each_takes_more_memory_than_it_has_bytes(
    name: str,
) -> None:
    params = {"agent_id": "a", "cluster_id": "c"}
    body: dict[str, Any] = {"metadata": {"a": [[]] * MAX_KEPT_VALUES}}
    with pytest.raises(AgentError, match="2000 values") as refused:
        BY_NAME[name].parse("heartbeat", Call(params, body, size_bytes=3 * MAX_KEPT_VALUES))
    assert refused.value.status == 413
