"""The answers without a socket: whatever an agent sends, the controller stays sane."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from devtools.controller.active_faults import ActiveFaults
from devtools.controller.commands import CommandLog
from devtools.controller.faults import Endpoint
from devtools.controller.history import EventKind, History
from devtools.controller.message_handler import Answer, MessageHandler
from devtools.controller.registry import Registry
from devtools.controller.state import ControllerState, Options
from shim.clock import Clock
from shim.protocol.upstream_message import Message


@dataclass
class FakePeer:
    number: int = 1
    endpoint: Endpoint = Endpoint.CONTROLLER
    owner: str = "aa0000"
    clusters: dict[str, str] = field(default_factory=dict)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["a", "b", "cluster-of-a"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
_NAMES = st.sampled_from(["agent_id", "name", "cluster_id", "command_id", "status", "metadata", "timestamp"])
_MESSAGES = st.builds(
    Message,
    st.sampled_from(
        ["register", "heartbeat", "status", "ping", "pong", "command_ack", "command_result", "proxy_error", "x"]
    ),
    st.dictionaries(_NAMES, _VALUES, max_size=5),
    st.sampled_from(["", "r-1"]),
    st.sampled_from(["", "2026-11-24T00:00:00Z", "no time"]),
)


@given(st.lists(_MESSAGES, max_size=8))
def test_any_sequence_is_answered(messages: list[Message]) -> None:
    """At most one answer each, with the request's id; a heartbeat is acknowledged only for a registered cluster."""
    clock = Clock()
    history = History(clock, max_events=100, max_bytes=1_000_000)
    registry = Registry(clock)
    message_handler = MessageHandler(ControllerState(clock, Options(), history, ActiveFaults(), registry, CommandLog()))
    peer = FakePeer()
    for message in messages:
        answers = message_handler.handle(peer, message, history.record(EventKind.RECEIVED, 1, message))
        assert len(answers) <= 1
        for answer in answers:
            assert isinstance(answer, Answer)
            assert answer.message.request_id == message.request_id
            if answer.message.type == "heartbeat_ack":
                assert registry.all()
            elif answer.message.type == "register_success":
                assert registry.get(answer.message.payload["cluster_id"]).name == message.payload["name"]
        assert set(peer.clusters) <= {known.cluster_id for known in registry.all()}
