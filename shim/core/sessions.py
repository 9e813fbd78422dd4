"""Sessions: the state of each agent, and its freshness (docs/reference/protocol.md#16-owners-sessions-aliases)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from shim.core.agent_calls import HeartbeatCall, Registered, SessionTarget, TargetKind
from shim.core.bounds import FREE_KEPT_BYTES, MAX_ALL_KEPT_BYTES
from shim.core.poll_hold import HoldEstimator, Samples, middle_of, remember
from shim.core.records import SessionKey, SessionRecord
from shim.core.standing import HeartbeatCoverage, SessionStanding

DEFAULT_INTERVAL_S = 30.0
MIN_FRESH_S = 35.0
FRESH_FACTOR = 1.5
MIN_GAPS = 3
_NOTHING: dict[str, Any] = {}  # shared by thousands of sessions: fields are replaced, never changed in place
_CLUSTER, _AGENT = TargetKind.CLUSTER.value, TargetKind.AGENT.value
_NO_STATUS = ("", "disconnected")


class Session:
    """One agent. Attributes that end in `_at` are monotonic seconds, `None` if it never happened in this process.

    `link` is the agent's `bridge.links.UpstreamLink`. `gateway` is the `bridge.gateway_redirect.GatewayConnection` that
    carries its traffic instead. Both are None if there is none. `LinkPool.link_of` replaces a link that was removed.
    """

    __slots__ = (
        "_tunnel_hold",
        "agent_id",
        "announced_on",
        "contact_at",
        "coverage",
        "dialect",
        "gaps",
        "gateway",
        "heartbeat",
        "heartbeat_at",
        "held",
        "hold",
        "kept_bytes",
        "key",
        "known",
        "last_seen_unix",
        "last_sent_status",
        "last_sent_tunnel",
        "link",
        "measured_interval_s",
        "migrated_at",
        "moved_to",
        "persisted_last_seen",
        "poll_at",
        "registration",
        "reply",
        "reported_status",
        "secret",
        "sent_at",
        "standing",
        "superseded_by",
        "tunnel",
        "tunnel_bytes",
        "upstream_cluster_id",
    )

    def __init__(self, key: SessionKey, dialect: str) -> None:
        self.key = key
        self.dialect = dialect
        self.link: Any = None  # not typed, because the core does not import the bridge
        self.gateway: Any = None
        self.agent_id = key.ident if key.kind == TargetKind.AGENT.value else ""
        self.upstream_cluster_id = key.ident if key.kind == TargetKind.CLUSTER.value else ""
        self.registration: dict[str, Any] = _NOTHING
        self.reply: dict[str, Any] = _NOTHING
        self.secret = ""
        self.known: dict[str, Any] = _NOTHING
        self.superseded_by: SessionKey | None = None
        self.moved_to: Session | None = None  # its successor, once that has its commands
        self.tunnel: dict[str, Any] | None = None
        self.tunnel_bytes = 0  # those that count towards the bound of all tunnel states
        self.last_sent_tunnel: dict[str, Any] | None = {}  # the agent has received none: {} differs from every state
        self.hold = HoldEstimator()
        self._tunnel_hold: HoldEstimator | None = None  # created on demand: most agents' tunnel polls are never held
        self.last_seen_unix = 0.0
        self.persisted_last_seen = 0.0
        self.contact_at: float | None = None
        self.migrated_at: float | None = None  # time since which the agent connects by WebSocket itself
        self.heartbeat_at: float | None = None
        self.poll_at: float | None = None
        self.measured_interval_s: float | None = None
        self.gaps: Samples = ()
        self.held = 0
        self.coverage = HeartbeatCoverage()
        self.heartbeat: HeartbeatCall | None = None
        self.kept_bytes = 0
        self.sent_at: float | None = None
        self.last_sent_status: tuple[str, str] | None = None
        self.reported_status = _NO_STATUS  # (status, tunnel_status) as a heartbeat would report them upstream now
        self.announced_on = 0
        self.standing = SessionStanding()

    @classmethod
    def from_record(cls, record: SessionRecord) -> Session:
        """Return a session loaded from disk. It is not fresh before its agent calls."""
        session = cls(record.key, record.dialect)
        session.agent_id = record.agent_id
        session.upstream_cluster_id = record.upstream_cluster_id
        session.registration = dict(record.registration)
        session.reply = dict(record.reply)
        session.hold = HoldEstimator(record.hold.get("poll"))
        if record.hold.get("tunnel"):
            session._tunnel_hold = HoldEstimator(record.hold["tunnel"])
        session.last_seen_unix = session.persisted_last_seen = record.last_seen_unix
        session.superseded_by = SessionKey.parse(record.superseded_by) if record.superseded_by else None
        return session

    def record(self) -> SessionRecord:
        """Return the session as it is stored, without any secret."""
        self.persisted_last_seen = self.last_seen_unix
        tunnel = self._tunnel_hold
        return SessionRecord(
            key=self.key,
            dialect=self.dialect,
            agent_id=self.agent_id,
            upstream_cluster_id=self.upstream_cluster_id,
            last_seen_unix=self.last_seen_unix,
            registration=dict(self.registration),
            reply=dict(self.reply),
            hold={"poll": self.hold.stored()} | ({"tunnel": tunnel.stored()} if tunnel is not None else {}),
            superseded_by=str(self.superseded_by) if self.superseded_by else "",
        )

    @property
    def home(self) -> SessionKey:
        """The key of the session that has this one's commands now: its last successor, if it was moved."""
        session = self
        while session.moved_to is not None:
            session = session.moved_to
        return session.key

    @property
    def tunnel_hold(self) -> HoldEstimator:
        """The estimator for the agent's tunnel polls."""
        if self._tunnel_hold is None:
            self._tunnel_hold = HoldEstimator()
        return self._tunnel_hold

    @property
    def holds_changed(self) -> bool:
        """True if an estimator has learnt something that is not stored."""
        return self.hold.changed or (self._tunnel_hold is not None and self._tunnel_hold.changed)

    @property
    def interval_s(self) -> float:
        """The agent's heartbeat interval in seconds: the median of its last 8 gaps, 30 s until three are known."""
        return DEFAULT_INTERVAL_S if self.measured_interval_s is None else self.measured_interval_s

    @property
    def fresh_for_s(self) -> float:
        """Seconds for which the agent counts as alive after a contact."""
        return max(FRESH_FACTOR * self.interval_s, MIN_FRESH_S)

    def fresh(self, now: float) -> bool:
        """Return True if the agent counts as alive: it has a held poll, or its last contact is recent."""
        if self.held:
            return True
        if self.contact_at is None:
            return False
        since_s = now - self.contact_at
        return since_s < MIN_FRESH_S or since_s < self.fresh_for_s

    def touch(self, now: float, wall: float) -> None:
        """Record a call of the agent."""
        self.contact_at, self.migrated_at = now, None
        self.last_seen_unix = wall

    def migrate(self, now: float) -> None:
        """Mark the agent as not alive: its successor connects by WebSocket itself.

        A later call of the agent reverts this.
        """
        self.contact_at, self.migrated_at = None, now

    def forget_contact(self) -> None:
        """Mark the agent as not alive: its process calls under another cluster id now."""
        self.contact_at = None

    def record_heartbeat(self, call: HeartbeatCall, now: float) -> None:
        """Record a heartbeat: measure the gap and keep the heartbeat as the newest."""
        if self.heartbeat_at is not None:
            self.gaps = remember(self.gaps, now - self.heartbeat_at)
        self.heartbeat_at = now
        provisional_s = middle_of(self.gaps) if self.gaps else None
        if len(self.gaps) >= MIN_GAPS:
            self.measured_interval_s = provisional_s
        self.hold.heartbeat(self.measured_interval_s, provisional_s)
        if self._tunnel_hold is not None:
            self._tunnel_hold.heartbeat(self.measured_interval_s, provisional_s)
        self.heartbeat = call
        self.reported_status = call.status, call.tunnel_status or "disconnected"
        if call.agent_id:
            self.agent_id = call.agent_id
        if call.known and call.known != self.known:
            self.known = self.known | call.known
        if call.secret:
            self.secret = call.secret

    def new_process(self) -> None:
        """Reset what the estimators have learnt of the agent's previous process."""
        self.hold.new_process()
        if self._tunnel_hold is not None:
            self._tunnel_hold.new_process()

    def heartbeat_due(self, now: float, interval_s: float) -> bool:
        """Return True if this contact should send a heartbeat upstream: the last is old enough, or a status changed."""
        if self.sent_at is None or now - self.sent_at >= interval_s:
            return True
        return self.reported_status != self.last_sent_status

    def heartbeat_payload(self) -> dict[str, Any]:
        """Return the upstream payload of the newest heartbeat.

        Its fields are docs/reference/protocol.md#2-upstream-side-the-websocket.
        """
        status, tunnel_status = self.reported_status
        payload: dict[str, Any] = {"cluster_id": self.upstream_cluster_id, "agent_id": self.agent_id}
        if status:
            payload["status"] = status
        payload["tunnel_status"] = tunnel_status
        payload["metadata"] = {}
        if self.heartbeat is not None:
            payload.update(self.heartbeat.payload)
        return payload

    @property
    def registered_name(self) -> str:
        """The cluster name in the stored registration, empty if there is none."""
        name = self.registration.get("name")
        return name if isinstance(name, str) else ""

    @property
    def name(self) -> str:
        """The name of the agent's cluster, empty if it is not known."""
        return str(self.registration.get("name") or self.known.get("name") or "")

    def registered(self, *, cached: bool) -> Registered:
        """Return the answer to the agent's registration, with the cluster id that the agent knows.

        That id never changes for the agent, see docs/reference/protocol.md#16-owners-sessions-aliases.
        """
        reply = self.reply
        cluster_id = self.key.ident if self.key.kind == TargetKind.CLUSTER.value else self.upstream_cluster_id
        uuid = reply.get("cluster_uuid", cluster_id) if cluster_id == self.upstream_cluster_id else cluster_id
        return Registered(
            cluster_id=cluster_id,
            cluster_uuid=uuid,
            name=reply.get("name") or self.registration.get("name") or "",
            agent_id=self.agent_id,
            status=reply.get("status") or "registered",
            tunnel_url=reply.get("tunnel_url", ""),
            api_server=reply.get("api_server", ""),
            workspace_id=reply.get("workspace_id"),
            registered_at=reply.get("registered_at"),
            cached=cached,
        )

    def register_payload(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the payload of a `register`: `identity`, heartbeat fields, stored registration, later ones winning.

        Returns `None` if there is no name.
        """
        payload = {**identity, **self.known, **self.registration}
        if not payload.get("name"):
            return None
        payload["agent_id"] = self.agent_id or payload.get("agent_id", "")
        if self.upstream_cluster_id:
            payload["cluster_id"] = self.upstream_cluster_id
        if self.secret:
            payload["k8s_service_token"] = self.secret
        return payload


class _Index:
    """Sessions by one of their texts. Those without it are left out."""

    def __init__(self) -> None:
        # Nearly all texts have one session, which needs no dictionary. All agents of a shim may have the same name.
        self._found: dict[str, Session | dict[SessionKey, Session]] = {}

    def add(self, text: str, session: Session) -> None:
        """Add a session under a text; an empty text is not indexed."""
        found = self._found.get(text)
        if isinstance(found, dict):
            found[session.key] = session
        elif found is not None:
            self._found[text] = {found.key: found, session.key: session}
        elif text:
            self._found[text] = session

    def drop(self, text: str, session: Session) -> None:
        """Remove a session from the sessions of a text, if it is among them."""
        found = self._found.get(text)
        if isinstance(found, dict) and found.get(session.key) is session:
            del found[session.key]
        if found is session or found == {}:
            del self._found[text]

    def get(self, text: str) -> tuple[Session, ...]:
        """Return the sessions of a text."""
        found = self._found.get(text)
        if isinstance(found, dict):
            return tuple(found.values())
        return () if found is None else (found,)


class Sessions:
    """All sessions, by key, by alias, by the controller's ids and by the name of their cluster.

    A look-up takes the same time however many sessions there are: thousands of agents register together.
    """

    def __init__(self) -> None:
        self._by_key: dict[SessionKey, Session] = {}
        self._aliases: dict[tuple[str, str], SessionKey] = {}
        self._aliases_of: dict[SessionKey, tuple[str, ...]] = {}
        self._by_owner: dict[str, dict[SessionKey, Session]] = {}
        self._by_upstream_id = _Index()
        self._by_name = _Index()
        self._kept_bytes = 0
        self._tunnel_bytes = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_key.values()))

    def get(self, key: SessionKey) -> Session | None:
        """Return the session with this key."""
        return self._by_key.get(key)

    def find_target(self, owner: str, target: SessionTarget) -> Session | None:
        """Return the session that a call names, or None if its owner does not have it."""
        if target.kind is TargetKind.CLUSTER:
            return self._by_key.get(SessionKey(owner, _CLUSTER, target.ident))
        return self._by_key.get(self.key_of(owner, target))

    def of_owner(self, owner: str) -> Iterable[Session]:
        """Return all sessions of an owner."""
        return list(self._by_owner.get(owner, {}).values())

    def count_of(self, owner: str) -> int:
        """Return the number of sessions of an owner."""
        return len(self._by_owner.get(owner, ()))

    def add(self, session: Session) -> None:
        """Add a session, or replace the one with the same key."""
        before = self._by_key.get(session.key)
        if before is not None:
            self._drop_from_index(before)
        self._by_key[session.key] = session
        self._by_owner.setdefault(session.key.owner, {})[session.key] = session
        self._index(session)

    def set_upstream_id(self, session: Session, cluster_id: str) -> None:
        """Set the controller's id of a session, which need not have been added yet."""
        self._drop_from_index(session)
        session.upstream_cluster_id = cluster_id
        self._index(session)

    def set_registration(self, session: Session, registration: dict[str, Any]) -> None:
        """Set the stored registration of a session, which need not have been added yet."""
        self._drop_from_index(session)
        session.registration = registration
        self._index(session)

    def _index(self, session: Session) -> None:
        if self._by_key.get(session.key) is session:
            self._by_upstream_id.add(session.upstream_cluster_id, session)
            self._by_name.add(session.registered_name, session)

    def _drop_from_index(self, session: Session) -> None:
        self._by_upstream_id.drop(session.upstream_cluster_id, session)
        self._by_name.drop(session.registered_name, session)

    def with_upstream_id(self, cluster_id: str, owner: str | None = None) -> list[Session]:
        """Return the sessions with this id of the controller, of one owner or of all."""
        return [each for each in self._by_upstream_id.get(cluster_id) if owner in (None, each.key.owner)]

    def registered_as(self, owner: str, name: str) -> list[Session]:
        """Return the owner's sessions whose stored registration has this cluster name."""
        return [each for each in self._by_name.get(name) if each.key.owner == owner]

    def remove(self, session: Session) -> None:
        """Remove a session and its aliases."""
        if session.key in self._by_key:
            self._kept_bytes -= session.kept_bytes
            self._tunnel_bytes -= session.tunnel_bytes
        self._by_key.pop(session.key, None)
        self._drop_from_index(session)
        owned = self._by_owner.get(session.key.owner, {})
        owned.pop(session.key, None)
        if not owned:
            self._by_owner.pop(session.key.owner, None)
        for agent_id in self._aliases_of.pop(session.key, ()):
            self._aliases.pop((session.key.owner, agent_id), None)

    def has_room_for(self, session: Session | None, call: HeartbeatCall) -> bool:
        """Return True if a heartbeat can be kept in place of the session's last one."""
        more_bytes = _counted_bytes(call) - (0 if session is None else session.kept_bytes)
        return self._kept_bytes + more_bytes <= MAX_ALL_KEPT_BYTES

    def keep(self, session: Session, call: HeartbeatCall) -> None:
        """Count the bytes of the heartbeat that a session keeps from now on."""
        self._kept_bytes += _counted_bytes(call) - session.kept_bytes
        session.kept_bytes = _counted_bytes(call)

    def keep_tunnel(self, session: Session, state: dict[str, Any], size_bytes: int) -> bool:
        """Keep a tunnel state in place of the session's last one; return False if all together would be too large."""
        counted_bytes = max(0, size_bytes - FREE_KEPT_BYTES)
        total_bytes = self._tunnel_bytes - session.tunnel_bytes + counted_bytes
        if total_bytes > MAX_ALL_KEPT_BYTES:
            return False
        self._tunnel_bytes, session.tunnel_bytes, session.tunnel = total_bytes, counted_bytes, state
        return True

    def alias(self, owner: str, agent_id: str) -> Session | None:
        """Return the session for which an agent id of the owner is an alias."""
        key = self._aliases.get((owner, agent_id))
        return self._by_key.get(key) if key is not None else None

    def set_alias(self, owner: str, agent_id: str, key: SessionKey) -> SessionKey | None:
        """Make an agent id an alias of a session. Returns its previous session's key if that was another one."""
        before = self._aliases.get((owner, agent_id))
        if before == key:
            return None
        if before is not None:
            self._aliases_of[before] = tuple(each for each in self._aliases_of[before] if each != agent_id)
        self._aliases[(owner, agent_id)] = key
        self._aliases_of[key] = (*self._aliases_of.get(key, ()), agent_id)
        return before

    def alias_is(self, owner: str, agent_id: str, key: SessionKey) -> bool:
        """Return True if the agent id is an alias of this session. Every heartbeat with an agent id calls this."""
        return self._aliases.get((owner, agent_id)) == key

    def move_aliases(self, source: SessionKey, target: SessionKey) -> None:
        """Move the aliases of a superseded session to its successor."""
        for agent_id in self._aliases_of.pop(source, ()):
            del self._aliases[source.owner, agent_id]
            self.set_alias(target.owner, agent_id, target)

    def key_of(self, owner: str, target: SessionTarget) -> SessionKey:
        """Return the key of the session that a call names (docs/reference/protocol.md#16-owners-sessions-aliases)."""
        if target.kind is TargetKind.ALIAS:
            aliased = self.alias(owner, target.ident)
            if aliased is not None:
                return aliased.key
            return SessionKey(owner, _AGENT, target.ident)
        return SessionKey(owner, _CLUSTER if target.kind is TargetKind.CLUSTER else _AGENT, target.ident)

    def find(self, owner: str, cluster_id: str, agent_id: str) -> list[Session]:
        """Return the owner's sessions that match a controller's target, the most recently seen first.

        A cluster id matches the agent's own id or the controller's. An agent id matches the session of its latest
        register or heartbeat. Beside a cluster id it only selects among several, because agent ids change.
        """
        if not cluster_id:
            return self._of_agent(owner, agent_id)
        exact = self.get(SessionKey(owner, TargetKind.CLUSTER.value, cluster_id))
        if exact is not None and exact.upstream_cluster_id == cluster_id and agent_id in ("", exact.agent_id):
            return [exact]
        found = self.with_upstream_id(cluster_id, owner)
        if exact is not None and exact not in found:
            found.append(exact)
        if agent_id and len(found) > 1:
            found = [s for s in found if s.agent_id == agent_id] or found
        return sorted(found, key=recency, reverse=True)

    def _of_agent(self, owner: str, agent_id: str) -> list[Session]:
        aliased = self.alias(owner, agent_id) or self.get(SessionKey(owner, TargetKind.AGENT.value, agent_id))
        return [aliased] if aliased is not None else []


def recency(session: Session) -> tuple[float, float]:
    """Return a sort key, by which the session that was seen last is the greatest."""
    return session.contact_at or 0.0, session.last_seen_unix


def _counted_bytes(call: HeartbeatCall) -> int:
    return max(0, call.size_bytes - FREE_KEPT_BYTES)
