"""Decoding of replies as legacy agents do it: strict about types as Go is, lenient about missing fields."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

Rfc3339 = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?"
        r"(Z|[+-]([01]\d|2[0-3]):[0-5]\d)$"
    ),
]


class DecodeError(Exception):
    """A success that this generation cannot use: a real agent logs an error or exits. The text omits the body."""


class Command(msgspec.Struct, frozen=True):
    """A command as an agent decodes it. Go reads `null` in any place as the zero value."""

    id: str
    type: str
    payload: dict[str, Any] | None = None
    created_at: Rfc3339 | None = None


class Registration(msgspec.Struct, frozen=True):
    """Fields of a register reply that an agent stores; empty if it reads none. `token` replaces its service token."""

    cluster_id: str = ""
    token: str = ""


class TunnelForward(msgspec.Struct, frozen=True):
    name: str | None = None
    remote_port: int | None = None


class TunnelStatus(msgspec.Struct, frozen=True):
    """Reply of a tunnel poll; every field is optional."""

    status: str | None = None
    forwards: list[TunnelForward] | None = None
    credentials: str | None = None
    poll_frequency: int | None = None
    tunnel_server_addr: str | None = None
    server_fingerprint: str | None = None


class _Commands(msgspec.Struct, frozen=True):
    commands: list[Command] | None = None


class _Cluster(msgspec.Struct, frozen=True):
    id: str | None = None
    uuid: str | None = None
    name: str | None = None
    status: str | None = None
    tunnel_status: str | None = None
    agent_id: str | None = None
    agent_hostname: str | None = None
    agent_version: str | None = None
    cloud_provider: str | None = None
    region: str | None = None
    cluster_version: str | None = None
    token: str | None = None
    api_server: str | None = None
    workspace_id: int | None = None
    registered_at: Rfc3339 | None = None


class _Data(msgspec.Struct, frozen=True):
    cluster_id: str | None = None
    status: str | None = None
    tunnel_url: str | None = None
    registered_at: Rfc3339 | None = None


class _Registered(msgspec.Struct, frozen=True):
    """Reply of generation B4 and later: one wrong type in any place fails the whole reply."""

    success: bool | None = None
    message: str | None = None
    cluster_id: str | None = None
    cluster_uuid: str | None = None
    name: str | None = None
    status: str | None = None
    tunnel_url: str | None = None
    api_server: str | None = None
    cluster: _Cluster | None = None
    data: _Data | None = None


class _ClusterOfB3(msgspec.Struct, frozen=True):
    id: str | None = None
    name: str | None = None
    token: str | None = None
    api_server: str | None = None


class _RegisteredB3(msgspec.Struct, frozen=True):
    success: bool | None = None
    message: str | None = None
    cluster: _ClusterOfB3 | None = None


_Reply = TypeVar("_Reply")


def _decode(kind: type[_Reply], body: bytes, what: str) -> _Reply:
    try:
        # Go leaves the struct unchanged if the whole reply is `null`.
        reply = msgspec.json.decode(body, type=kind | None)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise DecodeError(f"the {what} reply does not decode") from None
    return kind() if reply is None else reply


def decode_commands(body: bytes) -> list[Command]:
    """Decode the commands of a poll. Raises `DecodeError`."""
    return _decode(_Commands, body, "commands").commands or []


def decode_tunnel(body: bytes) -> TunnelStatus:
    """Decode the reply of a tunnel poll. Raises `DecodeError`."""
    return _decode(TunnelStatus, body, "tunnel")


def decode_registration(body: bytes) -> Registration:
    """Decode a reply to B4 or later, in which the top-level `cluster_id` is mandatory. Raises `DecodeError`."""
    reply = _decode(_Registered, body, "register")
    if not reply.cluster_id:
        raise DecodeError("the register reply has no cluster_id")
    return Registration(reply.cluster_id, reply.cluster.token or "" if reply.cluster else "")


def decode_registration_b3(body: bytes) -> Registration:
    """Decode a reply to B1 to B3: the nested `cluster.id`. Without one the agent is registered but sends no heartbeat.

    Raises `DecodeError`.
    """
    cluster = _decode(_RegisteredB3, body, "register").cluster or _ClusterOfB3()
    return Registration(cluster.id or "", cluster.token or "")
