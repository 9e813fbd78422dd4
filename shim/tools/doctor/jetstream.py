"""The store on NATS JetStream: reachable, protected, allowed, able to keep what it must. Nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from shim.errors import StoreError
from shim.settings import Settings
from shim.tools.doctor import leases
from shim.tools.doctor.findings import Finding, Status, failed, passed, warned
from shim.tools.doctor.greeting import Greeting, greet, judge

if TYPE_CHECKING:
    from shim.store.jetstream.probe import Account, Probe, StreamFacts

OLDEST = (2, 9)
SYNCS_ALWAYS = (2, 10)
LITTLE_BYTES = 64 * 1024 * 1024
PAYLOAD_BYTES = 1024 * 1024
PAYLOAD_MOST_BYTES = 8 * 1024 * 1024
STREAMS = 5
"""Of a store, which is one for each shard; replicas share two more."""
SHARED_STREAMS = 2
_MIB = 1024 * 1024

_HELP = (
    ("cannot be read", "the files must exist and be readable for the shim's user"),
    ("credentials", "store.credentials_file, or the user in store.url, must be one that the servers know"),
    ("no TLS", "give the server a tls block, or write nats:// in store.url where nobody can listen"),
    ("not trusted", "store.ca_file must hold the authority of the servers' certificates"),
)


async def examine(settings: Settings) -> list[Finding]:
    """The lines about `store.url`, up to the first after which nothing more can be known."""
    try:
        from shim.store.jetstream.probe import Probe  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        todo = "pip install 'agent-shim[nats]'; the container image has it"
        return [failed("nats", f"store.url needs the extra agent-shim[nats]: no {error.name}", todo)]
    greetings = await greet(settings.store)
    found = judge(greetings)
    there = [each for each in greetings if each.info]
    if any(each.status is Status.FAIL for each in found):
        return found
    found += [_version(there), _payload(there)]
    # One that is no NATS server would end an attempt to connect, and who is asked first is chance.
    probe = Probe(msgspec.structs.replace(settings.store, url=",".join(each.url for each in there)))
    try:
        await probe.connect()
        found.append(_user(settings, there))
    except StoreError as error:
        found.append(_refused(error))
    else:
        await _inside(probe, settings, there, found)
    finally:
        await probe.close()
    return found


async def _inside(probe: Probe, settings: Settings, there: Sequence[Greeting], found: list[Finding]) -> None:
    """What only a user may ask."""
    try:
        found.append(_room(await probe.account(), settings.shards.count))
        for shard in ("", f"s{settings.shards.count - 1}") if settings.shards.count else ("",):
            await probe.may_publish(shard)
        streams = await probe.streams()
        shards = await leases.examine(probe, settings.shards, streams)
    except StoreError as error:
        found.append(_fault(error))
        return
    found.extend(_copies(settings.store.replicas, there, streams))
    found.extend(_streams(streams))
    found.extend(shards)


def _refused(error: StoreError) -> Finding:
    text = str(error)
    todo = next((help_ for word, help_ in _HELP if word in text), "the servers' own log says more")
    return failed("nats-user", text, todo)


def _fault(error: StoreError) -> Finding:
    from shim.store.jetstream.probe import Denied, NoJetStream  # noqa: PLC0415 - as above

    text = str(error)
    if isinstance(error, Denied):
        todo = "docs/scaling.md, What the server must be set to: the subjects that the user needs"
        return failed("nats-user", f"not allowed: {text}", todo)
    if isinstance(error, NoJetStream):
        todo = "jetstream { store_dir } in every server's file, and jetstream: enabled in the account"
        return failed("jetstream", text, todo)
    return failed("jetstream", text, "of a cluster more than half of the servers must be up")


def _user(settings: Settings, there: Sequence[Greeting]) -> Finding:
    if not any(each.info.get("auth_required") for each in there):
        todo = "an account of its own for agent-shim: whoever reaches the servers can write commands"
        return warned("nats-user", "the servers ask for no credentials", todo)
    how = "by store.credentials_file" if settings.store.credentials_file else "by store.url"
    return passed("nats-user", f"accepted, {how}")


def _version(there: Sequence[Greeting]) -> Finding:
    """The oldest of the servers decides. They tell clients their version, and not their `sync_interval`."""
    texts = [str(each.info.get("version", "")) for each in there]
    oldest = min(texts, key=_numbers)
    if _numbers(oldest) < OLDEST:
        return failed("nats-version", oldest, "nats-server 2.9 or later")
    if _numbers(oldest) < SYNCS_ALWAYS:
        todo = "2.10 or later with sync_interval: always, or servers that do not lose power together"
        return warned("nats-version", f"{oldest} writes to disk every 2 minutes and cannot be told otherwise", todo)
    return passed("nats-version", f"{oldest}; that sync_interval is `always` a client cannot see: docs/scaling.md")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _payload(there: Sequence[Greeting]) -> Finding:
    least = min(int(each.info.get("max_payload", 0)) for each in there)
    text = f"max_payload is {least / _MIB:g} MiB; a larger command, result or session is refused, alone"
    if least < PAYLOAD_BYTES:
        return warned("payload", text, "max_payload: 8MB in the servers' file; 1 MiB is the default")
    if least > PAYLOAD_MOST_BYTES:
        return warned("payload", text, "NATS recommends 8 MB at the most")
    return passed("payload", text)


def _room(account: Account, shards: int) -> Finding:
    used = f"{account.bytes_used / _MIB:.0f} MiB used"
    needed = STREAMS * shards + SHARED_STREAMS if shards else STREAMS
    if 0 <= account.streams_allowed < needed:
        todo = f"max_streams of the account: at least {needed}"
        return failed("jetstream", f"the account may have {account.streams_allowed} streams", todo)
    if account.bytes_allowed < 0:
        return passed("jetstream", f"{used}; the account has no limit, the servers' max_file_store has")
    left = account.bytes_allowed - account.bytes_used
    text = f"{used} of {account.bytes_allowed / _MIB:.0f} MiB"
    if left < LITTLE_BYTES:
        return warned(
            "jetstream", text, "more disk for the account, or shorter commands.retain_s and commands.dedupe_s"
        )
    return passed("jetstream", text)


def _copies(wanted: int, there: Sequence[Greeting], streams: Sequence[StreamFacts]) -> Iterator[Finding]:
    """Whether as many servers are known as `store.replicas` asks for, and what the streams have now."""
    known = max(_servers(each.info) for each in there)
    if wanted > known:
        todo = f"store.replicas: {1 if known < 3 else 3}, or more servers in the cluster"
        yield failed("replicas", f"store.replicas is {wanted}, and {known} servers are known", todo)
        return
    if wanted == 1:
        text = "one copy: as durable as that server's disk"
        yield warned("replicas", text, "three servers and store.replicas: 3") if known > 1 else passed("replicas", text)
        return
    other = sorted({each.replicas for each in streams if not each.problem} - {wanted})
    text = f"{wanted} copies on {known} servers"
    if other:
        yield warned("replicas", f"{text}; streams have {other[0]}", "the next start of the shim changes that")
    else:
        yield passed("replicas", text)


def _servers(info: dict[str, Any]) -> int:
    """How many a server knows of, itself included: clients are told each one's address."""
    return max(1, len(info.get("connect_urls") or ())) if info.get("cluster") else 1


def _streams(streams: Sequence[StreamFacts]) -> Iterator[Finding]:
    if not streams:
        yield passed("streams", "none yet: the first start makes them")
        return
    for each in streams:
        if each.problem:
            yield failed("streams", f"{each.name}: {each.problem}", "more than half of the servers must be up")
            return
    behind = [f"{each.name} {each.current} of {each.replicas}" for each in streams if each.current < each.replicas]
    if behind:
        todo = "start the server that is missing; until it has caught up another one must not go"
        yield warned("streams", f"copies that keep up: {', '.join(behind)}", todo)
        return
    stored = sum(each.bytes_used for each in streams)
    messages = sum(each.messages for each in streams)
    yield passed("streams", f"{len(streams)}, all copies up to date: {messages} messages, {stored / _MIB:.1f} MiB")
