"""Lookup of a caller's owner, and of the link and connection that a session uses.

See docs/reference/protocol.md#16-owners-sessions-aliases.
"""

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
"""Kind of a `SessionKey` that names a link: rejections of commands without a session are stored under it."""


class LinkLookup:
    """Lookup table of owners, links and connections."""

    def __init__(self, ctx: BridgeContext, links: LinkPool, gateways: GatewayConnections) -> None:
        self.links = links
        self.gateways = gateways
        self._ctx = ctx
        self._owner_of = lru_cache(maxsize=4096)(self._hash_owner)
        self._link_of: dict[SessionKey, str] = {}

    def owner_of(self, token: str) -> str | None:
        """Return the owner of the sessions that a caller may use, or None if a required token is missing."""
        if not self._ctx.settings.upstream.own_tokens:
            return DEFAULT_OWNER
        return self._owner_of(token) if token else None

    def _hash_owner(self, token: str) -> str:
        return owner_id(self._ctx.owner_key, token)

    # --- links --------------------------------------------------------------------------------------------------------

    def link_name(self, session: Session) -> str:
        """Return the name of the link that a session belongs to."""
        name = self._link_of.get(session.key)
        if name is None:
            key = session.key
            shared = self._ctx.settings.upstream.share_link
            name = key.owner if shared else self.links.name_for(key.owner, str(key))
        return name

    def bind(self, session: Session, link: UpstreamLink) -> None:
        """Record that the session registered over this link."""
        self._link_of[session.key] = link.name

    def forget(self, key: SessionKey) -> None:
        """Delete the record of a session that was removed."""
        self._link_of.pop(key, None)

    def link_of(self, session: Session) -> UpstreamLink | None:
        """Return the link of a session, or None if it does not exist."""
        return self.links.find(self.link_name(session))

    def link_for(self, session: Session, client: Caller) -> UpstreamLink:
        """Return the link of a session whose agent has just called, and connect the link if necessary.

        Raises `AgentError`: 503 if there are too many links, 401 for a token that was refused recently.
        """
        link = self.links.get(session.key.owner, self.link_name(session), client.token)
        if not self.gateways.is_routed(session.key):
            link.ensure_connected()
        return link

    def sessions_of(self, link: UpstreamLink) -> list[Session]:
        """Return the sessions that belong to this link."""
        owned = self._ctx.sessions.of_owner(link.owner)
        if link.name == link.owner:
            return list(owned)
        return [session for session in owned if self.link_name(session) == link.name]

    # --- connections --------------------------------------------------------------------------------------------------

    def connection_of(self, session: Session) -> UpstreamConnection | None:
        """Return the connection for a session's heartbeats and results: its gateway's, else its link's.

        None means that neither is open.
        """
        gateway = self.gateways.connection_of(session.key)
        if gateway is not None:
            return gateway
        link = self.link_of(session)
        return link.up_connection if link is not None else None

    def connection_for_key(self, key: SessionKey) -> UpstreamConnection | None:
        """Return the connection for an outbox entry, whose session may have been removed.

        A key of kind `link` names the link itself. For a removed session any open link of its owner is used.
        """
        if key.kind == LINK_KIND:
            link = self.links.find(key.ident)
            return link.up_connection if link is not None else None
        session = self._ctx.sessions.get(key)
        if session is not None:
            return self.connection_of(session)
        return next((r.up_connection for r in self.links if r.owner == key.owner and r.up_connection), None)
