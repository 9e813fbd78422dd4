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
from shim.store.jetstream.layout import Layout
from shim.store.jetstream.server import ANSWER_S, Server, Unavailable

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
    leader: str
    problem: str = ""


class Probe(Server):
    """A connection as the store makes it. Everything raises `StoreError`."""

    def __init__(self, configured: settings.Store, layout: Layout | None = None) -> None:
        super().__init__(configured)
        self._layout = layout or Layout()
        self._denied = ""

    async def may_publish(self) -> None:
        """Ask where nobody listens and no stream keeps it: the server says so, or that it is forbidden (`Denied`)."""
        client = self.connected()
        try:
            await client.request(f"{self._layout.prefix}.doctor", timeout=ANSWER_S)
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
        """Those of the store that exist; none before the first start."""
        names = (self._layout.journal, *self._layout.rows)
        found = [await self._stream(name) for name in names]
        return [each for each in found if each is not None]

    async def bucket(self, name: str) -> dict[str, Any]:
        """Subjects and their last values of a key-value bucket, `{}` where there is none."""
        stream = f"KV_{name}"
        found = await self._ask(f"$JS.API.STREAM.INFO.{stream}", {"subjects_filter": f"$KV.{name}.>"}, absent={})
        values: dict[str, Any] = {}
        for subject in (found.get("state") or {}).get("subjects") or {}:
            stored = await self.message(stream, subject=subject)
            if stored is not None:
                values[subject.removeprefix(f"$KV.{name}.")] = stored.body
        return values

    async def _stream(self, name: str) -> StreamFacts | None:
        try:
            found = await self._ask(f"$JS.API.STREAM.INFO.{name}", absent={})
        except Unavailable:
            return StreamFacts(name, 0, 0, 0, 0, "", "no server answers for it: has it lost its leader?")
        if not found:
            return None
        state, config = found["state"], found["config"]
        group = found.get("cluster") or {}
        others = group.get("replicas") or []
        return StreamFacts(
            name,
            messages=state["messages"],
            bytes_used=state["bytes"],
            replicas=config["num_replicas"],
            current=1 + sum(bool(each.get("current")) and not each.get("offline") for each in others),
            leader=group.get("leader", ""),
        )

    async def _ask(
        self, subject: str, body: dict[str, Any] | None = None, absent: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """An answer of JetStream's API; `absent` where it says that there is no such stream."""
        client = self.connected()
        try:
            answer = await client.request(subject, json.dumps(body).encode() if body else b"", timeout=ANSWER_S)
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
