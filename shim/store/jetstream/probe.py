"""The store's servers looked at from outside, for `agent-shim doctor`: nothing is written, no stream is made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nats.errors

from shim import settings
from shim.errors import StoreError
from shim.store.jetstream.layout import PREFIX, Layout
from shim.store.jetstream.server import ANSWER_S, Server, Unavailable

# Servers wait that long themselves for streams whose leader does not answer.
_LIST_S = 8.0
_OURS = re.compile(rf"(KV_)?{PREFIX}(-s\d+)?-(journal|commands|outbox|states|sessions|leases|cluster)$")
_NO_LEADER = "no server answers for it: has it lost its leader?"
_DENIED = re.compile(r"permissions violation for (\w+) to \"?([^\"\s]+)", re.IGNORECASE)
_JETSTREAM_OFF = frozenset({10039, 10076})
_NO_STREAM = 10059


class Denied(StoreError):
    """The user may not do what the store needs; the text is `publish to SUBJECT` or `subscription to SUBJECT`."""


class NoJetStream(StoreError):
    """JetStream is off for this server or this account."""


@dataclass(frozen=True, slots=True)
class Account:
    """What an account has of JetStream. Limits of -1 are none."""

    bytes_used: int
    bytes_allowed: int
    streams_allowed: int


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """A stream of the store as its leader sees it. `current` counts the leader and the copies that keep up with it."""

    name: str
    messages: int
    bytes_used: int
    replicas: int
    current: int
    problem: str = ""


class Probe(Server):
    """A connection as the store makes it. Everything raises `StoreError`."""

    def __init__(self, configured: settings.Store) -> None:
        super().__init__(configured)
        self._denied = ""

    async def may_publish(self, shard: str = "") -> None:
        """Ask where nobody listens and no stream keeps it: the server says so, or that it is forbidden (`Denied`).

        `shard` names one of several stores, as in `Layout.of_shard`.
        """
        client = self.connected()
        try:
            await client.request(f"{Layout.of_shard(shard).prefix}.doctor", timeout=ANSWER_S)
        except nats.errors.NoRespondersError:
            return
        except (nats.errors.Error, OSError, TimeoutError) as error:
            if self._denied:
                raise Denied(self._denied) from None
            raise Unavailable(f"the NATS server does not answer: {type(error).__name__}") from None

    async def account(self) -> Account:
        """Raises `NoJetStream` where there is none."""
        found = await self._ask("$JS.API.INFO")
        limits = found.get("limits") or {}
        if not limits and found.get("tiers"):
            limits = max((tier.get("limits") or {} for tier in found["tiers"].values()), key=len)
        allowed = int(limits.get("max_storage", -1))
        return Account(int(found.get("storage", 0)), allowed, int(limits.get("max_streams", -1)))

    async def streams(self) -> Sequence[StreamFacts]:
        """Those of the store and of its shards that exist; none before the first start."""
        found: list[dict[str, Any]] = []
        missing: set[str] = set()
        total = 1
        while len(found) + len(missing) < total:
            page = await self._ask("$JS.API.STREAM.LIST", {"offset": len(found) + len(missing)}, timeout_s=_LIST_S)
            total = page["total"] if page.get("streams") or page.get("missing") else 0
            found += page.get("streams") or ()
            missing |= set(page.get("missing") or ())
        gone = [StreamFacts(name, 0, 0, 0, 0, problem=_NO_LEADER) for name in sorted(missing)]
        return [each for each in [*map(_facts, found), *gone] if _OURS.match(each.name)]

    async def entries(self, stream: str) -> dict[str, bytes]:
        """Keys and values of a key-value bucket, which is `KV_…` as a stream; none where there is no such bucket."""
        prefix = f"$KV.{stream.removeprefix('KV_')}."
        found = await self._ask(f"$JS.API.STREAM.INFO.{stream}", {"subjects_filter": f"{prefix}>"}, absent={})
        values: dict[str, bytes] = {}
        for subject in (found.get("state") or {}).get("subjects") or {}:
            stored = await self.message(stream, subject=subject)
            if stored is not None:
                values[subject.removeprefix(prefix)] = stored.body
        return values

    async def _ask(
        self,
        subject: str,
        body: dict[str, Any] | None = None,
        absent: dict[str, Any] | None = None,
        timeout_s: float = ANSWER_S,
    ) -> dict[str, Any]:
        """An answer of JetStream's API; `absent` where it says that there is no such stream."""
        client = self.connected()
        try:
            answer = await client.request(subject, json.dumps(body).encode() if body else b"", timeout=timeout_s)
        except nats.errors.NoRespondersError:
            raise NoJetStream("nobody answers for JetStream") from None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            if self._denied:
                raise Denied(self._denied) from None
            raise Unavailable(f"the NATS server does not answer: {type(error).__name__}") from None
        found: dict[str, Any] = json.loads(answer.data)
        fault = found.get("error") or {}
        if not fault:
            return found
        code = fault.get("err_code")
        if code == _NO_STREAM and absent is not None:
            return absent
        if code in _JETSTREAM_OFF:
            raise NoJetStream(str(fault.get("description", "JetStream is off")))
        raise Unavailable(f"JetStream answers with error {code}")

    async def _note(self, error: Exception) -> None:
        if denied := _DENIED.search(str(error)):
            self._denied = f"{denied[1].lower()} to {denied[2]}"
        await super()._note(error)


def _facts(found: dict[str, Any]) -> StreamFacts:
    state, config = found["state"], found["config"]
    others = (found.get("cluster") or {}).get("replicas") or []
    return StreamFacts(
        config["name"],
        messages=state["messages"],
        bytes_used=state["bytes"],
        replicas=config["num_replicas"],
        current=1 + sum(bool(each.get("current")) and not each.get("offline") for each in others),
    )
