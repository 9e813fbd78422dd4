"""All upstream links: one per token, or one per session with `upstream.share_link: false`.

See docs/reference/protocol.md#16-owners-sessions-aliases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import sha256
from itertools import count
from typing import NamedTuple, TypeVar

from shim.bridge.context import DEFAULT_OWNER, BridgeContext
from shim.bridge.links import LINK_KIND, LinkContext, UpstreamLink
from shim.bridge.upstream_connection import UpstreamConnection
from shim.core.link_state import AgentCalled, LinkState, TokenChanged
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.core.shards import owner_id
from shim.errors import AgentError
from shim.ports import Caller

BUSY_RETRY_AFTER_S = 30
UNVERIFIED_KEPT_S = 30.0
MAX_REMEMBERED = 4096

_Fact = TypeVar("_Fact")


class LinkRemoved(NamedTuple):
    """A link was deleted together with its token."""

    link: UpstreamLink


class LinkPool:
    """All links, by name, and the sessions that use them.

    `has_unsent_results(owner)` returns True if a result of this owner was never sent. The bridge sets it before the
    first dial.
    """

    has_unsent_results: Callable[[str], bool]

    def __init__(self, ctx: BridgeContext) -> None:
        self.shared = LinkContext(count(1), self.received_since)
        self._ctx = ctx
        self._own_tokens = ctx.settings.upstream.own_tokens  # no reload changes it
        self._links: dict[str, UpstreamLink] = {}
        self._turned_away: dict[str, float] = {}  # until when a token is not dialled again
        self._removed_down: dict[str, tuple[float, str]] = {}  # links that were down: since when, and why
        self._hashed_owner = lru_cache(maxsize=4096)(lambda token: owner_id(ctx.owner_key, token))

    def __iter__(self) -> Iterator[UpstreamLink]:
        return iter(list(self._links.values()))

    def __len__(self) -> int:
        return len(self._links)

    def name_for(self, owner: str, identity: str) -> str:
        """Return the name of a link: its owner, or a hash of the session's identity if links are not shared."""
        if self._ctx.settings.upstream.share_link:
            return owner
        return f"{owner}:{sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"

    def owner_of(self, token: str) -> str | None:
        """Return the owner of the sessions that a caller may use, or None if a required token is missing."""
        if not self._own_tokens:
            return DEFAULT_OWNER
        return self._hashed_owner(token) if token else None

    # --- sessions and their links -------------------------------------------------------------------------------------

    def link_name(self, session: Session) -> str:
        """Return the name of the session's link: that of the link it has, else the name that its key gives."""
        return session.link.name if session.link is not None else self.name_for(session.key.owner, str(session.key))

    def link_of(self, session: Session) -> UpstreamLink | None:
        """Return the link of a session, or None if it does not exist."""
        link: UpstreamLink | None = session.link
        if link is None or link.stopped:
            link = self._links.get(self.link_name(session))
            session.link = link or session.link
        return link

    def link_for(self, session: Session, caller: Caller, now: float) -> UpstreamLink:
        """Return the link of a session whose agent has just called, and connect the link if necessary.

        Raises `AgentError`: 503 if there are too many links, 401 for a token that was refused recently.
        """
        link: UpstreamLink | None = session.link
        if link is None or link.stopped:
            link = session.link = self.get(session.key.owner, self.link_name(session), caller.token)
        if session.gateway is None or not session.gateway.routed:
            link.needed_at = now
            if link.up_connection is None:
                link.ensure_connected(now)
        return link

    def sessions_of(self, link: UpstreamLink) -> list[Session]:
        """Return the sessions that belong to this link."""
        owned = self._ctx.sessions.of_owner(link.owner)
        if link.name == link.owner:
            return list(owned)
        return [session for session in owned if self.link_name(session) == link.name]

    def connection_of(self, session: Session) -> UpstreamConnection | None:
        """Return the connection for a session's heartbeats and results: its gateway's, else its link's.

        None means that neither is open.
        """
        if session.gateway is not None and session.gateway.up_connection is not None:
            connection: UpstreamConnection = session.gateway.up_connection
            return connection
        link: UpstreamLink | None = session.link
        if link is None or link.stopped:
            link = self.link_of(session)
        return link.up_connection if link is not None else None

    def connection_for_key(self, key: SessionKey) -> UpstreamConnection | None:
        """Return the connection for an outbox entry, whose session may have been removed.

        A key of kind `link` names the link itself. For a removed session any open link of its owner is used.
        """
        if key.kind == LINK_KIND:
            link = self._links.get(key.ident)
            return link.up_connection if link is not None else None
        session = self._ctx.sessions.get(key)
        if session is not None:
            return self.connection_of(session)
        return next((link.up_connection for link in self if link.owner == key.owner and link.up_connection), None)

    # --- the use of a link --------------------------------------------------------------------------------------------

    def in_use(self, link: UpstreamLink, now: float) -> bool:
        """Return True if a fresh session uses the link or a stored result was never sent.

        A session that is routed to a gateway does not use its link.
        """
        if any(session.fresh(now) and not _is_routed(session) for session in self.sessions_of(link)):
            return True
        return self.has_unsent_results(link.owner)

    def replaced_by_gateways(self, link: UpstreamLink, now: float) -> bool:
        """Return True if every fresh session of a link is routed to a gateway and no stored result is unsent."""
        fresh = [session for session in self.sessions_of(link) if session.fresh(now)]
        return bool(fresh) and all(map(_is_routed, fresh)) and not self.has_unsent_results(link.owner)

    def check_idle(self) -> None:
        """Close the links that no session has used for `upstream.idle_close_s`; called every few seconds.

        Dial an idle link again if a result waits for it: a command ended while no agent called.
        """
        now, idle_close_s = self._ctx.now, self._ctx.settings.upstream.idle_close_s
        for link in self:
            if self.in_use(link, now):
                link.needed_at = now
                if link.state is LinkState.IDLE and link.machine.accepted_at is not None:
                    link.apply(AgentCalled(), now)
            elif idle_close_s and now - link.needed_at >= idle_close_s:
                link.close_unneeded(now)

    def received_since(self, at_s: float) -> bool:
        """Return True if a frame arrived on any link after the monotonic time `at_s`."""
        return any(link.connection is not None and link.connection.heard_at > at_s for link in self)

    # --- creation and removal -----------------------------------------------------------------------------------------

    def find(self, name: str) -> UpstreamLink | None:
        """Return the link of this name, or None."""
        return self._links.get(name)

    def get(self, owner: str, name: str, token: str) -> UpstreamLink:
        """Return the link of this name; create it if necessary.

        Raises `AgentError`: 503 if there are `upstream.max_links` links in use, 401 for a token that was refused
        recently.
        """
        link = self._links.get(name)
        if link is None:
            if self._ctx.now < self._turned_away.get(name, 0.0):
                raise AgentError(401, "the controller refuses the token")
            if len(self._links) >= self._ctx.settings.upstream.max_links and not self._drop_one():
                raise AgentError(503, "too many upstream links", retry_after_s=BUSY_RETRY_AFTER_S)
            link = self._links[name] = UpstreamLink(self._ctx, owner, name, token, self.shared)
            link.changed_at, link.last_failure = self._removed_down.pop(name, (link.changed_at, ""))
            if self._own_tokens:
                self._ctx.redaction.add(token)  # masked in logs and replies until the link is removed
        return link

    def _drop_one(self) -> bool:
        """Remove a dispensable link to make room for another; return False if all are in use.

        The link of a token that was refused and never accepted is removed even while its agent calls: anybody can
        invent such a token. The token is not dialled again for a while, so that the controller sees no more dials than
        with unlimited links.
        """
        for dispensable in (self._is_idle, self._is_made_up, self._is_useless):
            found = min(filter(dispensable, self), key=lambda link: link.needed_at, default=None)
            if found is not None:
                if self._is_made_up(found):
                    _remember(self._turned_away, found.name, self._ctx.now + self._ctx.backoff_policy.contended_s)
                self._drop(found)
                return True
        return False

    def _is_idle(self, link: UpstreamLink) -> bool:
        return link.state is LinkState.IDLE

    def _is_made_up(self, link: UpstreamLink) -> bool:
        machine = link.machine
        return self._own_tokens and machine.refused and machine.accepted_at is None

    def _is_useless(self, link: UpstreamLink) -> bool:
        return link.machine.refused and not self.in_use(link, self._ctx.now)

    def _drop(self, link: UpstreamLink) -> None:
        if link.last_failure:
            # An agent that was never registered exits and is started again; its calls must fail over all the same.
            _remember(self._removed_down, link.name, (link.changed_at, link.last_failure))
        link.stop(self._ctx.now)
        del self._links[link.name]
        if self._own_tokens and all(other.token != link.token for other in self):
            self._ctx.redaction.discard(link.token)
        self._ctx.events.put(LinkRemoved(link))

    def token_accepted(self, owner: str) -> bool:
        """Return True if the controller has accepted the owner's token since start-up.

        A configured token counts as accepted.
        """
        if not self._own_tokens:
            return True
        return any(link.owner == owner and link.machine.accepted_at is not None for link in self._links.values())

    def sweep(self) -> None:
        """Remove links and tokens that were never accepted and whose agents have stopped calling."""
        if not self._own_tokens:
            return
        now = self._ctx.now
        for link in self:
            unneeded = link.machine.accepted_at is None and not self.in_use(link, now)
            if unneeded and now - link.needed_at >= UNVERIFIED_KEPT_S:
                self._drop(link)

    def token_changed(self) -> None:
        """Dial every link again with the new configured token."""
        for link in self:
            link.apply(TokenChanged(), self._ctx.now)

    def stop(self) -> None:
        """Close all links."""
        for link in self:
            link.stop(self._ctx.now)


def _remember(facts: dict[str, _Fact], name: str, fact: _Fact) -> None:
    """Set a fact about a link; beyond `MAX_REMEMBERED` the name that was added first is dropped."""
    facts[name] = fact
    if len(facts) > MAX_REMEMBERED:
        del facts[next(iter(facts))]


def _is_routed(session: Session) -> bool:
    return session.gateway is not None and session.gateway.routed
