"""Validated configuration: frozen, pure data. `loader.py` reads the sources and creates it.

Names end in their units: `_s` seconds, `_bytes` bytes. docs/reference/configuration.md describes every key.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shim.hosts import is_loopback


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


class TlsFiles(Section, frozen=True):
    """Certificate of the agent listener, as PEM files. Without them it speaks plain HTTP."""

    cert_file: str = ""
    key_file: str = ""


Hosts = str | tuple[str, ...]
"""One or several addresses to listen on."""


class _Listener(Section, frozen=True):
    host: Hosts = "127.0.0.1"

    @property
    def hosts(self) -> tuple[str, ...]:
        """All addresses to listen on."""
        return (self.host,) if isinstance(self.host, str) else self.host


class Listen(_Listener, frozen=True):
    """The agent listener and its bounds."""

    port: int = 7080
    base_path: str = ""
    auth: Literal["auto", "required", "off"] = "auto"
    allowed_hosts: tuple[str, ...] = ()
    tls: TlsFiles = TlsFiles()
    max_body_bytes: int = 1_048_576
    max_status_body_bytes: int = 4_194_304
    max_connections: int = 2048
    max_in_flight_per_session: int = 8
    header_timeout_s: float = 10
    body_timeout_s: float = 30
    keepalive_s: float = 120

    @property
    def on_loopback(self) -> bool:
        """True if only this machine can connect."""
        return all(is_loopback(host) for host in self.hosts)


class Admin(_Listener, frozen=True):
    """The admin port. Without `token_file` it changes nothing by request."""

    port: int = 7090
    token_file: str = ""
    allowed_hosts: tuple[str, ...] = ()
    ready_requires_upstream: bool = False


class Reconnect(Section, frozen=True):
    """Delays between dials, in seconds."""

    initial_s: float = 1
    max_s: float = 5
    refused_max_s: float = 60
    stable_after_s: float = 30


class DialSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings for opening a connection to the vendor: trust, client certificate and proxy.

    `section` is the section of the configuration for which they were built. `inherited` has the names of the values
    that come from `upstream`, because that section does not set them.
    """

    section: str
    ca_file: str
    client_cert_file: str
    client_key_file: str
    insecure_skip_verify: bool
    proxy: str
    connect_timeout_s: float
    inherited: frozenset[str] = frozenset()

    def key(self, name: str) -> str:
        """Return the configuration key from which the value called `name` comes."""
        return f"{'upstream' if name in self.inherited else self.section}.{name}"


class Upstream(Section, frozen=True):
    """The link to the controller: address, token, trust, timeouts and message sizes."""

    url: str = "https://api.pipeops.io"
    path: str = "/api/v1/clusters/agent/ws"
    token: str = ""
    token_file: str = ""
    auth: Literal["auto", "query", "header", "both"] = "auto"
    share_link: bool = True
    max_links: int = 64
    allow_insecure: bool = False
    insecure_skip_verify: bool = False
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    proxy: str = ""
    gateway_hosts: tuple[str, ...] = ()
    connect_timeout_s: float = 5
    ping_interval_s: float = 25
    read_timeout_s: float = 55
    heartbeat_interval_s: float = 27.5
    idle_close_s: float = 90
    reconnect: Reconnect = Reconnect()
    max_message_bytes: int = 16_777_216
    max_send_bytes: int = 1_048_576
    send_status: bool = True
    send_command_ack: bool = False

    @property
    def own_tokens(self) -> bool:
        """True if each agent's own Bearer token opens its link.

        The rule is docs/reference/protocol.md#16-owners-sessions-aliases.
        """
        return not self.token and not self.token_file

    @property
    def dialling(self) -> DialSettings:
        """The settings for dialling the link."""
        return DialSettings(
            section="upstream",
            ca_file=self.ca_file,
            client_cert_file=self.client_cert_file,
            client_key_file=self.client_key_file,
            insecure_skip_verify=self.insecure_skip_verify,
            proxy=self.proxy,
            connect_timeout_s=self.connect_timeout_s,
        )


class Register(Section, frozen=True):
    """Registrations. `deadline_s` bounds the wait for the controller."""

    deadline_s: float = 25


class Heartbeat(Section, frozen=True):
    """Answers to heartbeats while the link is down."""

    when_link_down: Literal["accept", "fail"] = "accept"


class Poll(Section, frozen=True):
    """Holds and replies of polls (docs/reference/protocol.md#13-poll)."""

    hold: Literal["auto", "off"] | float = "auto"
    max_hold_s: float = 20
    hold_tunnel: bool = False
    max_batch: int = 100
    max_bytes: int = 1_048_576
    frequency_s: int = 5


class Commands(Section, frozen=True):
    """Queueing and delivery of commands (docs/reference/protocol.md#3-commands)."""

    types: tuple[str, ...] = ("command",)
    ttl_s: float = 86_400
    retain_s: float = 86_400
    dedupe_s: float = 86_400
    evidence_s: float = 60
    uncertain: Literal["redeliver", "dead"] = "redeliver"
    at_most_once: tuple[str, ...] = ()
    max_attempts: int = 5
    max_queued: int = 1000
    max_queued_bytes: int = 16_777_216


class Sessions(Section, frozen=True):
    """Bounds on sessions. `retain_s` counts from the last call."""

    retain_s: float = 2_592_000
    max_per_owner: int = 10_000


class Identity(Section, frozen=True):
    """Registration data of agents that never registered here (docs/reference/protocol.md#14-adoption)."""

    name: str = ""
    k8s_version: str = ""
    agent_version: str = ""
    hostname: str = ""
    region: str = ""
    cloud_provider: str = ""
    labels: dict[str, str] = {}


class Store(Section, frozen=True):
    """The store: a SQLite file, or a PostgreSQL database if `url` is set."""

    path: str = "./agent-shim.db"
    url: str = ""
    password_file: str = ""
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    allow_insecure: bool = False


class Cluster(Section, frozen=True):
    """Replicas on one PostgreSQL database: their internal listener and leases."""

    host: str = "127.0.0.1"
    port: int = 7081
    advertise: str = ""
    replica: str = ""
    lease_s: float = 5


class Fallback(Section, frozen=True):
    """The vendor's HTTP API as the other way (docs/reference/protocol.md#4-modes)."""

    url: str = ""
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    proxy: str = ""
    insecure_skip_verify: bool | None = None
    after_s: float = 10
    hold_down_s: float = 60
    use_upstream_token: bool = False

    def dialling(self, upstream: Upstream) -> DialSettings:
        """Return the settings for dialling the HTTP API: the link's, unless this section has its own."""
        own = {name: getattr(self, name) for name in ("ca_file", "proxy") if getattr(self, name)}
        if self.client_cert_file:
            own |= {"client_cert_file": self.client_cert_file, "client_key_file": self.client_key_file}
        if self.insecure_skip_verify is not None:
            own["insecure_skip_verify"] = self.insecure_skip_verify
        names = ("ca_file", "client_cert_file", "client_key_file", "insecure_skip_verify", "proxy")
        inherited = frozenset(names).difference(own)
        return msgspec.structs.replace(upstream.dialling, section="fallback", inherited=inherited, **own)


class Rollout(Section, frozen=True):
    """Share of the agents that the WebSocket serves (docs/reference/protocol.md#41-the-hash-of-the-rollout)."""

    percent: float = 100
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def partial(self) -> bool:
        """True if some agents may be served by the vendor's HTTP API."""
        return self.percent < 100 or bool(self.exclude)


class Sunset(Section, frozen=True):
    """Announced end of the legacy API, sent to agents in headers."""

    deprecation_at: str = ""
    at: str = ""
    link: str = ""


class Notify(Section, frozen=True):
    """Notifications by webhook or file."""

    url: str = ""
    url_file: str = ""
    ca_file: str = ""
    proxy: str = ""
    file: str = ""

    @property
    def wanted(self) -> bool:
        """True if notifications go anywhere."""
        return bool(self.url or self.url_file or self.file)

    @property
    def dialling(self) -> DialSettings:
        """The settings for dialling the webhook. Nothing of the vendor's link is used for it."""
        return DialSettings(
            section="notify",
            ca_file=self.ca_file,
            client_cert_file="",
            client_key_file="",
            insecure_skip_verify=False,
            proxy=self.proxy,
            connect_timeout_s=5,
        )


class Telemetry(Section, frozen=True):
    """Traces of commands, sent to an OpenTelemetry collector."""

    otlp_url: str = ""


class Log(Section, frozen=True):
    """Level and format of the log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Settings(Section, frozen=True):
    """All settings of a shim. The defaults are those of docs/reference/configuration.md."""

    mode: Literal["websocket", "http", "auto"] = "websocket"
    listen: Listen = Listen()
    admin: Admin = Admin()
    upstream: Upstream = Upstream()
    register: Register = Register()
    heartbeat: Heartbeat = Heartbeat()
    poll: Poll = Poll()
    commands: Commands = Commands()
    sessions: Sessions = Sessions()
    identity: Identity = Identity()
    store: Store = Store()
    cluster: Cluster = Cluster()
    fallback: Fallback = Fallback()
    rollout: Rollout = Rollout()
    sunset: Sunset = Sunset()
    notify: Notify = Notify()
    telemetry: Telemetry = Telemetry()
    log: Log = Log()

    @property
    def uses_fallback(self) -> bool:
        """True if calls may be sent to the vendor's HTTP API, now or after one change of `mode`."""
        return bool(self.fallback.url) or self.mode != "websocket" or self.rollout.partial
