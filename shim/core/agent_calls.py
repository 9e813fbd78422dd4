"""What an agent asked for and what it is answered, free of any dialect (protocol.md §1).

`dialects` turn a legacy request into one of the `…Call` types and one of the outcome types into a legacy reply. What
comes with every heartbeat and poll is a `Struct`: making one costs a tenth of what a frozen dataclass does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec


class TargetKind(Enum):
    """How a call names its session (protocol.md §1.6)."""

    CLUSTER = "cluster"  # by the cluster id
    AGENT = "agent"  # by the agent id
    ALIAS = "alias"  # by an agent id that may be an alias of a cluster session; else as AGENT


class SessionTarget(msgspec.Struct, frozen=True):
    """The session that a call means: `ident` is the agent's own id for it, decoded from the path or the body."""

    kind: TargetKind
    ident: str


@dataclass(frozen=True, slots=True)
class RegisterCall:
    """A registration. `payload` is the upstream `register` payload by the map of wire-facts §4.

    It carries `agent_id` and `name` and only what the agent sent otherwise, never `k8s_service_token`, which stands in
    `secret` because it is never stored. `known_by_agent`: the session is keyed by agent id (dialect `agents`).
    """

    dialect: str
    agent_id: str
    name: str
    payload: dict[str, Any] = field(repr=False)
    secret: str = field(default="", repr=False)
    known_by_agent: bool = False


class HeartbeatCall(msgspec.Struct, frozen=True):
    """A heartbeat. `status` and `tunnel_status` are the agent's own words, `""` where it sent none.

    For the dialect `agents`, which knows no tunnel status, `tunnel_status` is `disconnected` then. `payload` holds
    `metadata` and monitoring groups exactly as they go upstream; `known` what the call tells about the agent for an
    adopted session's registration (`name`, `agent_version`, …; protocol.md §1.4). `secret` is the ServiceAccount token
    that one generation sends here too; it is held in memory only. `size_bytes` is the body's size.
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


@dataclass(frozen=True, slots=True)
class StatusCall:
    """A cluster status report (dialect `agents`); `body` goes upstream as it is."""

    dialect: str
    target: SessionTarget
    body: dict[str, Any] = field(repr=False)


class PollCall(msgspec.Struct, frozen=True):
    """A poll for commands."""

    dialect: str
    target: SessionTarget


@dataclass(frozen=True, slots=True)
class ResultCall:
    """A command result. `body` holds what the agent sent of `success, output, error, metadata, timestamp`."""

    dialect: str
    target: SessionTarget
    command_id: str
    body: dict[str, Any] = field(repr=False)


class TunnelPollCall(msgspec.Struct, frozen=True):
    """A tunnel status poll (protocol.md §1.5)."""

    target: SessionTarget


class TunnelInfoCall(msgspec.Struct, frozen=True):
    """A question for the registration's tunnel data (dialect `clusters_agent`)."""

    target: SessionTarget


class HealthCall(msgspec.Struct, frozen=True):
    """Is the shim there?"""


AgentCall = (
    RegisterCall | HeartbeatCall | StatusCall | PollCall | ResultCall | TunnelPollCall | TunnelInfoCall | HealthCall
)


@dataclass(frozen=True, slots=True)
class Registered:
    """A successful registration as the agent gets it.

    `cluster_id` is non-empty and URL-safe. `workspace_id` and `registered_at` (RFC 3339) are `None` where unknown.
    `cached` says that it came from the store and not from the controller just now.
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
    """A heartbeat, status or result was taken."""


class OfferedCommand(msgspec.Struct, frozen=True):
    """A command as it stands in a poll reply: every field has its exact type (protocol.md §1.3)."""

    id: str
    type: str
    payload: dict[str, Any]
    created_at: str


class Commands(msgspec.Struct, frozen=True):
    """A poll's answer: the commands in order, possibly none."""

    commands: tuple[OfferedCommand, ...]
    poll_frequency_s: int


class TunnelState(msgspec.Struct, frozen=True):
    """A tunnel poll's answer: the payload of the latest `tunnel_status`, or `None` for the default."""

    payload: dict[str, Any] | None
    poll_frequency_s: int


class TunnelInfo(msgspec.Struct, frozen=True):
    """The registration's tunnel data."""

    registered: Registered


class Healthy(msgspec.Struct, frozen=True):
    """The shim serves."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The call failed with this HTTP status. `cluster_id` is set where a conflict carries the existing id (409)."""

    status: int
    error: str
    retry_after_s: int | None = None
    cluster_id: str = ""


Outcome = Registered | Accepted | Commands | TunnelState | TunnelInfo | Healthy | Failed
