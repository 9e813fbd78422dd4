"""Who a caller is, and which link and connection carry a session's traffic (protocol.md §1.6, §2)."""

from __future__ import annotations

from functools import lru_cache

from shim.bridge.context import DEFAULT_OWNER, BridgeContext
from shim.bridge.gateway_redirect import GatewayConnections
from shim.bridge.links import LinkPool, UpstreamLink
from shim.bridge.upstream_connection import UpstreamConnection
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.core.shard_assignment import owner_id
from shim.ports import Caller

LINK_KIND = "link"
"""The kind of a `SessionKey` that stands for a link itself: where rejections without a session are filed."""


class LinkLookup:
    """Finds owners, links and connections."""

    def __init__(self, ctx: BridgeContext, links: LinkPool, gateways: GatewayConnections) -> None:
        self.links = links
        self.gateways = gateways
        self._ctx = ctx
        self._owner_of = lru_cache(maxsize=4096)(self._hash_owner)
        self._link_of: dict[SessionKey, str] = {}

    def owner_of(self, token: str) -> str | None:
        """Whose sessions a caller sees; `None` without a token where one is needed."""
        if not self._ctx.settings.upstream.own_tokens:
            return DEFAULT_OWNER
        return self._owner_of(token) if token else None

    def _hash_owner(self, token: str) -> str:
        return owner_id(self._ctx.owner_key, token)

    # --- links --------------------------------------------------------------------------------------------------------

    def link_name(self, session: Session) -> str:
        """The name of the link that a session belongs to."""
        name = self._link_of.get(session.key)
        if name is None:
            key = session.key
            shared = self._ctx.settings.upstream.share_link
            name = key.owner if shared else self.links.name_for(key.owner, str(key))
        return name

    def bind(self, session: Session, runner: UpstreamLink) -> None:
        """The session registered over this link."""
        self._link_of[session.key] = runner.name

    def forget(self, key: SessionKey) -> None:
        """The session is gone."""
        self._link_of.pop(key, None)

    def runner_of(self, session: Session) -> UpstreamLink | None:
        """The link of a session, if it exists."""
        return self.links.find(self.link_name(session))

    def link_for(self, session: Session, client: Caller) -> UpstreamLink:
        """The link of a session whose agent just called, dialled if need be; raises `AgentError` 503."""
        runner = self.links.get(session.key.owner, self.link_name(session), client.token)
        if not self.gateways.is_routed(session.key):
            runner.ensure_connected()
        return runner

    def sessions_of(self, runner: UpstreamLink) -> list[Session]:
        """The sessions whose link this is."""
        owned = self._ctx.sessions.of_owner(runner.owner)
        if runner.name == runner.owner:
            return list(owned)
        return [session for session in owned if self.link_name(session) == runner.name]

    # --- connections --------------------------------------------------------------------------------------------------

    def connection_of(self, session: Session) -> UpstreamConnection | None:
        """The connection that carries a session's heartbeats and results now: its gateway's, else its link's."""
        gateway = self.gateways.connection_of(session.key)
        if gateway is not None:
            return gateway
        runner = self.runner_of(session)
        return runner.up_connection if runner is not None else None

    def connection_for_key(self, key: SessionKey) -> UpstreamConnection | None:
        """The same for what is filed under a session that may be gone, or under a link."""
        if key.kind == LINK_KIND:
            runner = self.links.find(key.ident)
            return runner.up_connection if runner is not None else None
        session = self._ctx.sessions.get(key)
        if session is not None:
            return self.connection_of(session)
        return next((r.up_connection for r in self.links if r.owner == key.owner and r.up_connection), None)
