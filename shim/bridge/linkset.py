"""All upstream links: by owner, or by session where links are not shared (protocol.md §2)."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from shim.bridge.context import Context
from shim.bridge.links import LinkListener, LinkRunner
from shim.core import link_events as ev
from shim.core.link import LinkState
from shim.errors import AgentError

BUSY_RETRY_AFTER_S = 30
UNPROVEN_KEPT_S = 30.0


class LinkSet:
    """All links: by owner, or by session with `upstream.share_link: false`."""

    def __init__(self, ctx: Context, listener: LinkListener, serials: Iterator[int]) -> None:
        self._ctx = ctx
        self._listener = listener
        self._serials = serials
        self._links: dict[str, LinkRunner] = {}

    def __iter__(self) -> Iterator[LinkRunner]:
        return iter(list(self._links.values()))

    def __len__(self) -> int:
        return len(self._links)

    def name_for(self, owner: str, identity: str) -> str:
        """The link's name: the owner's, or one made of the session's identity where links are not shared."""
        if self._ctx.settings.upstream.share_link:
            return owner
        return f"{owner}:{sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"

    def find(self, name: str) -> LinkRunner | None:
        """A link that exists."""
        return self._links.get(name)

    def get(self, owner: str, name: str, token: str) -> LinkRunner:
        """The link of this name, made on first use. Raises `AgentError` 503 when there are `upstream.max_links`."""
        runner = self._links.get(name)
        if runner is None:
            if len(self._links) >= self._ctx.settings.upstream.max_links and not self._drop_one():
                raise AgentError(503, "too many upstream links", retry_after_s=BUSY_RETRY_AFTER_S)
            runner = self._links[name] = LinkRunner(self._ctx, owner, name, self._listener, self._serials)
            runner.token = token
        return runner

    def _drop_one(self) -> bool:
        """Make room: forget a link that is idle or that nobody needs any more."""
        for runner in self:
            if runner.state is LinkState.IDLE or (runner.machine.refused and not self._listener.link_needed(runner)):
                self._drop(runner)
                return True
        return False

    def _drop(self, runner: LinkRunner) -> None:
        runner.stop()
        del self._links[runner.name]
        self._listener.link_dropped(runner)

    def proven(self, owner: str) -> bool:
        """Whether the controller has accepted the owner's token since our start; a configured token needs no proof."""
        if not self._ctx.settings.upstream.own_tokens:
            return True
        return any(runner.owner == owner and runner.machine.accepted_at is not None for runner in self._links.values())

    def sweep(self) -> None:
        """Keep no link and no token of an agent that has stopped calling and was never accepted."""
        if not self._ctx.settings.upstream.own_tokens:
            return
        for runner in self:
            unneeded = runner.machine.accepted_at is None and not self._listener.link_needed(runner)
            if unneeded and self._ctx.now - runner.needed_at >= UNPROVEN_KEPT_S:
                self._drop(runner)

    def token_changed(self) -> None:
        """The configured token is another one: re-dial at once."""
        for runner in self:
            runner.apply(ev.TokenChanged())

    def stop(self) -> None:
        """Close all."""
        for runner in self:
            runner.stop()
