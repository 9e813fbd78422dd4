"""Calls of agents and their outcomes, independent of any dialect (docs/reference/protocol.md#1-legacy-side).

`shim.protocol.dialects` converts a legacy request into one of the `…Call` types, and an outcome into a legacy reply.
The types used by every heartbeat and poll are `Struct`s: creating one costs a tenth of a frozen dataclass.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec


class TargetKind(Enum):
    """Kinds of ids by which a call names its session (docs/reference/protocol.md#16-owners-sessions-aliases)."""

    CLUSTER = "cluster"  # by the cluster id
    AGENT = "agent"  # by the agent id
    ALIAS = "alias"  # by an agent id that may be an alias of a cluster session; else as AGENT


class SessionTarget(msgspec.Struct, frozen=True):
    """The session that a call names. `ident` is the agent's own id, decoded from the path or the body."""

    kind: TargetKind
    ident: str


class RegisterCall(msgspec.Struct, frozen=True):
    """A registration. `payload` is the upstream `register` payload.

    The field map is docs/reference/legacy-agents.md#4-field-mapping-http-to-websocket. `payload` always has `agent_id`
    and `name`, and other fields only if the agent sent them. It never has `k8s_service_token`: that is in `secret`,
    because payloads are stored and the token must not be. `known_by_agent` is true if the session is keyed by agent id
    (dialect `agents`).
    """

    dialect: str
    agent_id: str
    name: str
    payload: dict[str, Any]
    secret: str = ""
    known_by_agent: bool = False

    def __repr__(self) -> str:
        return f"RegisterCall({self.dialect!r}, {self.agent_id!r}, {self.name!r})"


class HeartbeatCall(msgspec.Struct, frozen=True):
    """A heartbeat. `status` and `tunnel_status` are the agent's values, `""` if it sent none.

    In the dialect `agents`, which has no tunnel status, `tunnel_status` is always `disconnected`. `payload` has
    `metadata` and the monitoring groups unchanged. `known` has the fields that complete the registration of an adopted
    session (`name`, `agent_version`, …; docs/reference/protocol.md#14-adoption). `secret` is the ServiceAccount token
    that one generation sends in heartbeats; it is kept in memory only. `size_bytes` is the size of the body.
    """

    dialect: str
    target: SessionTarget
    agent_id: str
    status: str = ""
    tunnel_status: str = ""
    payload: dict[str, Any] = {}
    known: dict[str, Any] = {}
    secret: str = ""
    size_bytes: int = 0

    def __repr__(self) -> str:
        return f"HeartbeatCall({self.dialect!r}, {self.target!r}, {self.agent_id!r}, {self.status!r})"


class StatusCall(msgspec.Struct, frozen=True):
    """A cluster status report (dialect `agents`). `body` is sent upstream unchanged."""

    dialect: str
    target: SessionTarget
    body: dict[str, Any]

    def __repr__(self) -> str:
        return f"StatusCall({self.dialect!r}, {self.target!r})"


class PollCall(msgspec.Struct, frozen=True):
    """A poll for commands."""

    dialect: str
    target: SessionTarget


class ResultCall(msgspec.Struct, frozen=True):
    """A command result. `body` has those of `success, output, error, metadata, timestamp` that the agent sent."""

    dialect: str
    target: SessionTarget
    command_id: str
    body: dict[str, Any]

    def __repr__(self) -> str:
        return f"ResultCall({self.dialect!r}, {self.target!r}, {self.command_id!r})"


class TunnelPollCall(msgspec.Struct, frozen=True):
    """A tunnel status poll (docs/reference/protocol.md#15-tunnel-poll)."""

    target: SessionTarget


class TunnelInfoCall(msgspec.Struct, frozen=True):
    """A request for the tunnel data of the registration (dialect `clusters_agent`)."""

    target: SessionTarget


class HealthCall(msgspec.Struct, frozen=True):
    """A health check of the shim."""


AgentCall = (
    RegisterCall | HeartbeatCall | StatusCall | PollCall | ResultCall | TunnelPollCall | TunnelInfoCall | HealthCall
)


class Registered(msgspec.Struct, frozen=True):
    """A successful registration as it is returned to the agent.

    `cluster_id` is non-empty and URL-safe. `workspace_id` and `registered_at` (RFC 3339) are `None` if unknown.
    `cached` is true if the reply comes from the store and not from the controller.
    """

    cluster_id: str
    cluster_uuid: str
    name: str
    agent_id: str
    status: str = "registered"
    tunnel_url: str = ""
    api_server: str = ""
    workspace_id: int | None = None
    registered_at: str | None = None
    cached: bool = False


class Accepted(msgspec.Struct, frozen=True):
    """The outcome of a heartbeat, status or result that was accepted."""


class OfferedCommand(msgspec.Struct, frozen=True):
    """A command in a poll reply, with the fields of the reply.

    Every field has exactly the type that agents decode (docs/reference/protocol.md#13-poll).
    """

    id: str
    type: str
    payload: dict[str, Any]
    created_at: str


class Commands(msgspec.Struct, frozen=True):
    """The outcome of a poll: the commands in order, possibly none."""

    commands: tuple[OfferedCommand, ...]
    poll_frequency_s: int


class TunnelState(msgspec.Struct, frozen=True):
    """The outcome of a tunnel poll: the payload of the latest `tunnel_status`, or `None` for the default."""

    payload: dict[str, Any] | None
    poll_frequency_s: int


class TunnelInfo(msgspec.Struct, frozen=True):
    """The outcome of a `TunnelInfoCall`."""

    registered: Registered


class Healthy(msgspec.Struct, frozen=True):
    """The outcome of a health check."""


class Failed(msgspec.Struct, frozen=True):
    """A failed call and its HTTP status. `cluster_id` is the existing cluster's id in a conflict (409)."""

    status: int
    error: str
    retry_after_s: int | None = None
    cluster_id: str = ""


Outcome = Registered | Accepted | Commands | TunnelState | TunnelInfo | Healthy | Failed
