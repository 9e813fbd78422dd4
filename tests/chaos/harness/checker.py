"""Judges a history: pure, over everything that happened, knowing nothing of how it was made.

Rules: docs/reference/protocol.md#21-link-life, #3-commands.

Each rule is a function from a `Case` to the violations that it finds; `check` applies all. The one named exception is
`StoreLost`: commands that were in a database which was destroyed, and the sessions known only to it, may be gone. What
came after it is judged as everything else.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TypeVar, cast

from tests.chaos.harness import events as ev
from tests.chaos.harness.waiting import LOOK_S

DEFAULT_INTERVAL_S = 30.0
MIN_FRESH_S = 35.0
FRESH_FACTOR = 1.5
MIN_GAPS = 3
KEPT_GAPS = 8
SLACK_S = 2.0  # between a call's end at the agent and its being noted by the shim, and for the clocks' resolution
STAMP_S = 0.002  # envelopes tell milliseconds
PAUSED = "paused"
WAITING = frozenset({"queued", "uncertain"})
LATE_S = 120.0  # how long a sent heartbeat may lie in buffers before the controller reads it

E = TypeVar("E", bound=ev.Event)


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken; `subject` is a command or a session."""

    rule: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.subject}: {self.text}"


@dataclass(slots=True)
class Command:
    """All that is known of one command, each list in the order of the history."""

    id: str
    pushed: list[ev.Pushed] = field(default_factory=list)
    queued: list[ev.Queued] = field(default_factory=list)
    acked: list[ev.Acked] = field(default_factory=list)
    stored: list[ev.Stored] = field(default_factory=list)
    offers: list[ev.Offered | ev.Requeued] = field(default_factory=list)
    delivered: list[ev.Delivered] = field(default_factory=list)
    received: list[ev.Received] = field(default_factory=list)
    posted: list[ev.Posted] = field(default_factory=list)
    reported: list[ev.Reported] = field(default_factory=list)

    @property
    def session(self) -> str:
        return session_of(self.id)

    @property
    def once(self) -> bool:
        return any(push.once for push in self.pushed)

    @property
    def accepted_at(self) -> float | None:
        """When the shim took responsibility for it, `None` if it never did."""
        words = [*self.queued, *self.acked]
        if words:
            return min(word.at for word in words)
        # It was on disk, but the shim died before it could say so.
        return max((push.at for push in self.pushed), default=0.0) if self.stored else None

    @property
    def last_accepted_at(self) -> float | None:
        """When the shim took responsibility for it the last time: the controller may push it again after a loss."""
        return max((word.at for word in self.queued), default=self.accepted_at)


def session_of(command: str) -> str:
    """The session whose command it is."""
    return command.rpartition(".")[0]


def spans(faults: Iterable[ev.Fault], kinds: frozenset[str]) -> list[tuple[float, float]]:
    """Return when faults of these kinds lasted."""
    found: list[tuple[float, float]] = []
    begun: dict[str, float] = {}
    for event in faults:
        if event.name in kinds:
            if event.begins:
                begun[event.name] = event.at
            elif event.name in begun:
                found.append((begun.pop(event.name), event.at))
    return found + [(at, math.inf) for at in begun.values()]


class Spells:
    """The times in which the harness had no time to look, each of them one moment in its notes."""

    def __init__(self, late: Iterable[ev.Late]) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        for begin, end in sorted((event.at - event.seconds - LOOK_S, event.at + LOOK_S) for event in late):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._begins.append(begin)
                self._ends.append(end)

    def moment(self, at: float) -> float:
        """The same for all times that the notes cannot tell apart."""
        index = bisect_right(self._begins, at) - 1
        return self._begins[index] if index >= 0 and at <= self._ends[index] else at


@dataclass(frozen=True, slots=True)
class Case:
    """A history, sorted for the rules.

    `nameless` are the sessions that were adopted and have no registration to replay; `registered` has the beginnings of
    the registrations that succeeded, by session.
    """

    commands: dict[str, Command]
    lost_stores: tuple[float, ...]
    others: dict[type, list[ev.AnyEvent]]
    nameless: frozenset[str]
    spells: Spells
    registered: dict[str, list[float]]

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind that belong to no command."""
        return cast("list[E]", self.others.get(kind, []))

    def lost_between(self, after: float, before: float) -> bool:
        """Return whether a database was destroyed within these times."""
        return any(after <= lost <= before for lost in self.lost_stores)

    def excused(self, at: float) -> bool:
        """Return whether what the shim stored at that time was in a database that was destroyed later."""
        return self.lost_between(at, math.inf)


_LISTS: dict[type, str] = {
    ev.Pushed: "pushed",
    ev.Queued: "queued",
    ev.Acked: "acked",
    ev.Stored: "stored",
    ev.Offered: "offers",
    ev.Requeued: "offers",
    ev.Delivered: "delivered",
    ev.Received: "received",
    ev.Posted: "posted",
    ev.Reported: "reported",
}


def case(history: Iterable[ev.AnyEvent], nameless: Iterable[str] = ()) -> Case:
    """Sort a history. Events of the same moment stay in the order in which they were noted."""
    commands: dict[str, Command] = {}
    others: dict[type, list[ev.AnyEvent]] = defaultdict(list)
    for event in sorted(history, key=lambda event: event.at):
        name = _LISTS.get(type(event))
        if name is None:
            others[type(event)].append(event)
        else:
            ident: str = event.command  # type: ignore[union-attr]
            getattr(commands.setdefault(ident, Command(ident)), name).append(event)
    gone = tuple(event.at for event in others[ev.StoreLost])
    spells = Spells(cast("list[ev.Late]", others[ev.Late]))
    registered: dict[str, list[float]] = defaultdict(list)
    for contact in cast("list[ev.Contact]", others[ev.Contact]):
        if contact.what == "register" and contact.outcome == "ok":
            registered[contact.session].append(contact.since)
    return Case(commands, gone, others, frozenset(nameless), spells, registered)


# --- commands ---------------------------------------------------------------------------------------------------------


def lost(found: Case) -> Iterator[Violation]:
    """Every command that the shim accepted was received by its agent, or ended with a result at the controller."""
    for command in found.commands.values():
        at = command.last_accepted_at
        if at is None or command.received or command.reported or found.excused(at):
            continue
        if stranded(found, command, at) or prolonged(found, command, at):
            continue
        yield Violation("lost", command.id, f"accepted at {at:.3f} and never heard of again")


def stranded(found: Case, command: Command, accepted_at: float) -> bool:
    """Return whether a command waits in the database for a cluster id that its agent does not have any more.

    Its session was adopted after a database was destroyed, so nothing is known of it but that id. The agent then lost
    the id, registered, and got another one. The command ends as `expired`, later than a run lasts.
    """
    waits = any(step.state in WAITING for step in command.stored)
    registered = [at for at in found.registered[command.session] if at > accepted_at]
    return waits and any(found.lost_between(0.0, at) for at in registered)


def prolonged(found: Case, command: Command, accepted_at: float) -> bool:
    """Return whether a command waits in the database because the wall clock was ahead when it was accepted.

    Its expiry is a wall-clock time for a shim that was restarted meanwhile: it ends as `expired`, after the run.
    """
    waits = any(step.state in WAITING for step in command.stored)
    clocks = found.of(ev.WallClock)
    before = [clock.offset_s for clock in clocks if clock.at <= accepted_at][-1:]
    behind = any(
        clock.offset_s < offset_s - LATE_S for offset_s in before for clock in clocks if clock.at > accepted_at
    )
    return waits and behind


def redelivered(found: Case) -> Iterator[Violation]:
    """Redelivery only with a recorded reason and a higher attempt number."""
    for command in found.commands.values():
        counting: list[ev.Offered] = []
        for step in command.offers:
            if isinstance(step, ev.Requeued):
                _take_back(found, counting, step)
                continue
            problem = _offer_problem(found, counting, step)
            if problem:
                yield Violation("redelivery", command.id, problem)
            counting.append(step)
        times = len(command.received)
        if times > len(counting):
            yield Violation("redelivery", command.id, f"received {times} times, offered {len(counting)} times")


def _take_back(found: Case, counting: list[ev.Offered], step: ev.Requeued) -> None:
    """Forget the offer that a shim took back; it was never said to be made if its agent left before it was on disk."""
    if counting and counting[-1].attempt == step.attempt and not _died(found, counting[-1].at, step.at):
        counting.pop()


_RESTART = "restart"  # the reason of an offer whose command was read from the store: by a new process, or another owner


def _offer_problem(found: Case, before: Sequence[ev.Offered], offer: ev.Offered) -> str:
    if not before:
        if offer.attempt > 1 and not offer.reason:
            return f"attempt {offer.attempt} without a reason"
        return ""
    last = before[-1]
    if found.lost_between(last.at, offer.at):
        return ""
    forgotten = offer.reason == _RESTART or offer.by != last.by or _died(found, last.at, offer.at)
    if not all(earlier.recorded for earlier in before) and forgotten:
        return ""  # the disk took no record of the offer, and who offers now has only the disk's
    if not offer.reason:
        return f"offered again (attempt {offer.attempt}) without a reason"
    if offer.attempt <= last.attempt:
        return f"offered again as attempt {offer.attempt} after attempt {last.attempt}"
    return ""


def _died(found: Case, after: float, before: float) -> bool:
    return any(life.who == "shim" and not life.born and after <= life.at <= before for life in found.of(ev.Life))


def at_most_once(found: Case) -> Iterator[Violation]:
    """Commands of types that must not be repeated are offered in earnest once, and received once at most."""
    for command in found.commands.values():
        if not command.once:
            continue
        counting: list[ev.Offered] = []
        for step in command.offers:
            if isinstance(step, ev.Offered):
                counting.append(step)
            else:
                _take_back(found, counting, step)
        for what, events in (("offered", counting), ("received", command.received)):
            for earlier, later in pairwise(events):
                if not found.lost_between(earlier.at, later.at):
                    yield Violation("at_most_once", command.id, f"{what} again at {later.at:.3f}")


def results(found: Case) -> Iterator[Violation]:
    """Every result that got a 2xx reached the controller at least once."""
    for command in found.commands.values():
        taken = [post for post in command.posted if 200 <= post.status < 300]
        if taken and not command.reported and not found.excused(taken[0].at):
            yield Violation("result", command.id, f"answered {taken[0].status} at {taken[0].at:.3f}, never reported")


def unread(found: Case) -> Iterator[Violation]:
    """No reply that the agent never read counts as delivered."""
    moment = found.spells.moment
    for command in found.commands.values():
        for step in command.delivered:
            if not any(moment(receipt.at) <= moment(step.at) for receipt in command.received):
                yield Violation("unread", command.id, f"delivered ({step.evidence}) at {step.at:.3f}, but never read")


def fifo(found: Case) -> Iterator[Violation]:
    """The agents of a session receive its commands in the order in which the shim stored them."""
    sessions: dict[str, list[Command]] = defaultdict(list)
    for command in found.commands.values():
        if command.received:
            sessions[command.session].append(command)
    told = sorted((word for command in found.commands.values() for word in command.queued), key=lambda word: word.at)
    position = {word.command: index for index, word in enumerate(told)}
    since = max(found.lost_stores, default=0.0)  # a new database counts from one again
    for commands in sessions.values():
        at = {command.id: found.spells.moment(command.received[0].at) for command in commands}
        stored = [c for c in commands if c.stored and c.received[0].at >= since]
        yield from _inversions([(at[c.id], c.stored[0].seq, c.id) for c in stored])
        yield from _inversions([(at[c.id], position[c.id], c.id) for c in commands if len(c.queued) == 1])


def _inversions(received: list[tuple[float, int, str]]) -> Iterator[Violation]:
    """Of commands as (when they were received, their place in the order of arrival, their id)."""
    for (_, before, earlier), (_, after, later) in pairwise(sorted(received)):
        if before > after:
            yield Violation("fifo", later, f"stored before {earlier}, received after it")


# --- heartbeats -------------------------------------------------------------------------------------------------------


class _Vouchers:
    """When a session's agent called, and how long that vouches for it."""

    def __init__(
        self,
        contacts: list[ev.Contact],
        deaths: list[float],
        shims: list[float],
        pauses: list[tuple[float, float]],
        slack_s: float,
    ) -> None:
        """`pauses` are the times in which the shim was stopped: it reads what came meanwhile when it goes on."""

        def read_at(since: float, until: float) -> float:
            return max([until, *(end for begin, end in pauses if since <= end and until >= begin)])

        self._spans = sorted((contact.since, read_at(contact.since, contact.at)) for contact in contacts)
        self._ends = sorted([end for _, end in self._spans] + [read_at(death, death) for death in deaths])
        beats = sorted((contact.since, contact.outcome) for contact in contacts if contact.what == "heartbeat")
        # A heartbeat that failed may have arrived, or only half of it.
        self._beats = [[since for since, _ in beats], [since for since, outcome in beats if outcome == "ok"]]
        self._shims = shims
        self._slack_s = slack_s

    def vouch(self, at: float) -> bool:
        """Return True if a contact lies within the bound before `at`, or is under way then."""
        slack_s = self._slack_s
        if any(since <= at + slack_s and end >= at - slack_s for since, end in self._spans):
            return True
        index = bisect_right(self._ends, at + slack_s)
        return index > 0 and at - self._ends[index - 1] <= self._fresh_for_s(at) + slack_s

    def _fresh_for_s(self, at: float) -> float:
        """The largest bound that a shim that started last before `at` may know."""
        born = max((start for start in self._shims if start <= at), default=0.0)
        intervals_s = []
        for beats in self._beats:
            seen = beats[bisect_left(beats, born) : bisect_right(beats, at)]
            gaps = [later - earlier for earlier, later in pairwise(seen)][-KEPT_GAPS:]
            intervals_s.append(median(gaps) if len(gaps) >= MIN_GAPS else DEFAULT_INTERVAL_S)
        return max(FRESH_FACTOR * max(intervals_s), MIN_FRESH_S)


def vouched(found: Case) -> Iterator[Violation]:
    """Heartbeats go up only for fresh sessions: none later than the freshness bound after an agent's death."""
    contacts: dict[str, list[ev.Contact]] = defaultdict(list)
    for contact in found.of(ev.Contact):
        contacts[contact.session].append(contact)
    deaths: dict[str, list[float]] = defaultdict(list)
    shims = []
    for life in found.of(ev.Life):
        if life.who == "shim" and life.born:
            shims.append(life.at)
        elif not life.born:
            deaths[life.who].append(life.at)
    offsets = found.of(ev.WallClock)
    blocked_s = max((lag.seconds for lag in found.of(ev.Lag)), default=0.0)  # a call may have waited that long
    slack_s = SLACK_S + blocked_s + max((late.seconds for late in found.of(ev.Late)), default=0.0)
    pauses = spans(found.of(ev.Fault), frozenset({PAUSED}))
    vouchers = {name: _Vouchers(contacts[name], deaths[name], shims, pauses, slack_s) for name in {*contacts, *deaths}}
    for beat in found.of(ev.Beat):
        known = vouchers.get(beat.session)
        if known is None or not any(map(known.vouch, _sent_at(beat, offsets))):
            yield Violation("vouched", beat.session, f"a heartbeat at {beat.at:.3f} without a living agent behind it")


def _sent_at(beat: ev.Beat, offsets: Sequence[ev.WallClock]) -> list[float]:
    """When it may have been sent: the wall clock may have been set while it lay in buffers."""
    active = [clock.offset_s for clock in offsets if clock.at <= beat.at - LATE_S][-1:]
    active += [clock.offset_s for clock in offsets if beat.at - LATE_S < clock.at <= beat.at + SLACK_S]
    moments = [beat.sent_unix - offset_s for offset_s in active] if beat.sent_unix else []
    return [at for at in moments if beat.at - LATE_S <= at <= beat.at + SLACK_S] or [beat.at]


def introduced(found: Case) -> Iterator[Violation]:
    """Never a heartbeat for a session that the controller has not been told about on this connection."""
    told: dict[tuple[str, str], float] = {}
    for event in found.of(ev.Introduced):
        told.setdefault((event.connection, event.session), event.at)
    answered: dict[str, list[float]] = defaultdict(list)  # registrations; the shim knows nothing of one under way
    for contact in found.of(ev.Contact):
        if contact.what == "register" and contact.outcome == "ok":
            answered[contact.session].append(contact.at)
    offsets = found.of(ev.WallClock)
    for beat in found.of(ev.Beat):
        sent_at = min(_sent_at(beat, offsets))
        gone_at = max((lost for lost in found.lost_stores if lost <= sent_at), default=None)
        known = gone_at is None or any(gone_at <= at <= sent_at for at in answered[beat.session])
        if beat.session in found.nameless or not known:
            continue  # there is no registration to tell of: the agent was adopted
        if told.get((beat.connection, beat.session), float("inf")) > beat.at:
            yield Violation("introduced", beat.session, f"a heartbeat at {beat.at:.3f} on {beat.connection} before it")


def sole_owner(found: Case) -> Iterator[Violation]:
    """Two owners never send at once: what is sent on an owner's later connection is later than all on earlier ones."""
    spoken: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for event in found.of(ev.Spoke):
        spoken[event.owner].setdefault(event.connection, []).append(event.sent_unix)
    for owner, connections in spoken.items():
        spans = sorted((min(sent), max(sent), name) for name, sent in connections.items())
        for (_, until, earlier), (since, _, later) in pairwise(spans):
            if until > since + STAMP_S:
                text = f"{earlier} was spoken on until {until:.3f}, {later} from {since:.3f}"
                yield Violation("sole_owner", owner, text)


# --- the rest ---------------------------------------------------------------------------------------------------------


def decodable(found: Case) -> Iterator[Violation]:
    """No agent ever saw a reply that its generation cannot decode."""
    for event in found.of(ev.Spoilt):
        yield Violation("decodable", event.session, f"{event.what} at {event.at:.3f}: {event.reason}")


def sound(found: Case) -> Iterator[Violation]:
    """Yield everything that no fault explains."""
    for event in found.of(ev.Defect):
        yield Violation("sound", f"{event.at:.3f}", event.text)


RULES: tuple[Callable[[Case], Iterator[Violation]], ...] = (
    lost,
    redelivered,
    at_most_once,
    results,
    unread,
    fifo,
    vouched,
    introduced,
    sole_owner,
    decodable,
    sound,
)


def check(found: Case) -> list[Violation]:
    """Everything that is wrong with a history; empty if it is as promised."""
    return [violation for rule in RULES for violation in rule(found)]
