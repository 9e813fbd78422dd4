"""All upstream links: by owner, or by session where links are not shared (protocol.md §2)."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from shim.bridge.context import BridgeContext
from shim.bridge.links import LinkListener, UpstreamLink
from shim.core import link_events as ev
from shim.core.link import LinkState
from shim.errors import AgentError

BUSY_RETRY_AFTER_S = 30
UNVERIFIED_KEPT_S = 30.0
MAX_TURNED_AWAY = 4096


class LinkPool:
    """All links: by owner, or by session with `upstream.share_link: false`."""

    def __init__(self, ctx: BridgeContext, listener: LinkListener, serials: Iterator[int]) -> None:
        self._ctx = ctx
        self._listener = listener
        self._serials = serials
        self._links: dict[str, UpstreamLink] = {}
        self._turned_away: dict[str, float] = {}  # until when a token is not dialled again

    def __iter__(self) -> Iterator[UpstreamLink]:
        return iter(list(self._links.values()))

    def __len__(self) -> int:
        return len(self._links)

    def name_for(self, owner: str, identity: str) -> str:
        """The link's name: the owner's, or one made of the session's identity where links are not shared."""
        if self._ctx.settings.upstream.share_link:
            return owner
        return f"{owner}:{sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"

    def find(self, name: str) -> UpstreamLink | None:
        """A link that exists."""
        return self._links.get(name)

    def get(self, owner: str, name: str, token: str) -> UpstreamLink:
        """Return the link of this name, made on first use.

        Raises `AgentError`: 503 when there are `upstream.max_links`, 401 for a token that was refused a moment ago.
        """
        runner = self._links.get(name)
        if runner is None:
            if self._ctx.now < self._turned_away.get(name, 0.0):
                raise AgentError(401, "the controller refuses the token")
            if len(self._links) >= self._ctx.settings.upstream.max_links and not self._drop_one():
                raise AgentError(503, "too many upstream links", retry_after_s=BUSY_RETRY_AFTER_S)
            runner = self._links[name] = UpstreamLink(self._ctx, owner, name, self._listener, self._serials)
            runner.token = token
            if self._ctx.settings.upstream.own_tokens:
                self._ctx.redaction.add(token)  # until the link is dropped, no log and no reply shows it
        return runner

    def _drop_one(self) -> bool:
        """Make room for another link; return False where all are in use.

        A token that was refused and never accepted gives way even while its agent calls: anybody can make one up. It
        is not dialled again before its time, so that the controller sees no more dials than with room for all.
        """
        for dispensable in (self._is_idle, self._is_made_up, self._is_useless):
            found = min(filter(dispensable, self), key=lambda runner: runner.needed_at, default=None)
            if found is not None:
                if self._is_made_up(found):
                    self._turned_away[found.name] = self._ctx.now + self._ctx.backoff_policy.contended_s
                    while len(self._turned_away) > MAX_TURNED_AWAY:
                        del self._turned_away[next(iter(self._turned_away))]
                self._drop(found)
                return True
        return False

    def _is_idle(self, runner: UpstreamLink) -> bool:
        return runner.state is LinkState.IDLE

    def _is_made_up(self, runner: UpstreamLink) -> bool:
        machine = runner.machine
        return self._ctx.settings.upstream.own_tokens and machine.refused and machine.accepted_at is None

    def _is_useless(self, runner: UpstreamLink) -> bool:
        return runner.machine.refused and not self._listener.link_in_use(runner)

    def _drop(self, runner: UpstreamLink) -> None:
        runner.stop()
        del self._links[runner.name]
        if self._ctx.settings.upstream.own_tokens and all(other.token != runner.token for other in self):
            self._ctx.redaction.discard(runner.token)
        self._listener.link_dropped(runner)

    def token_accepted(self, owner: str) -> bool:
        """Whether the controller has accepted the owner's token since our start; a configured token needs no proof."""
        if not self._ctx.settings.upstream.own_tokens:
            return True
        return any(runner.owner == owner and runner.machine.accepted_at is not None for runner in self._links.values())

    def sweep(self) -> None:
        """Keep no link and no token of an agent that has stopped calling and was never accepted."""
        if not self._ctx.settings.upstream.own_tokens:
            return
        for runner in self:
            unneeded = runner.machine.accepted_at is None and not self._listener.link_in_use(runner)
            if unneeded and self._ctx.now - runner.needed_at >= UNVERIFIED_KEPT_S:
                self._drop(runner)

    def token_changed(self) -> None:
        """The configured token is another one: re-dial at once."""
        for runner in self:
            runner.apply(ev.TokenChanged())

    def stop(self) -> None:
        """Close all."""
        for runner in self:
            runner.stop()
