"""The checker finds what it is there for, and nothing in a history as promised: good and bad ones, made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.chaos.harness import checker
from tests.chaos.harness import events as ev

C = "s.1"
WALL_S = 1_000_000.0


def pushed(at: float = 1, command: str = C, *, once: bool = False) -> ev.Pushed:
    return ev.Pushed(at, command, checker.session_of(command), once)


def queued(at: float = 2, command: str = C) -> ev.Queued:
    return ev.Queued(at, command)


def offered(
    at: float, attempt: int = 1, reason: str = "", command: str = C, *, recorded: bool = True, by: str = ""
) -> ev.Offered:
    return ev.Offered(at, command, attempt, reason, recorded, by)


def received(at: float, command: str = C) -> ev.Received:
    return ev.Received(at, command, "s")


def contact(since: float, at: float | None = None, what: str = "heartbeat") -> ev.Contact:
    return ev.Contact(since + 0.01 if at is None else at, "s", what, "ok", since, 204)


def shim(at: float, *, born: bool) -> ev.Life:
    return ev.Life(at, "shim", born)


def beat(at: float, sent_at: float | None = None, connection: str = "1/1") -> ev.Beat:
    return ev.Beat(at, connection, "s", 0 if sent_at is None else WALL_S + sent_at)


def broken(history: Sequence[ev.AnyEvent], nameless: Sequence[str] = ()) -> set[str]:
    """The rules that a history breaks."""
    return {violation.rule for violation in checker.check(checker.case(history, nameless))}


DELIVERED = [pushed(), queued(), offered(3), received(4), ev.Delivered(5, C, "next request")]
ANSWERED = [*DELIVERED, ev.Posted(6, C, 204), ev.Reported(7, C, True)]


History = tuple[str, list[ev.AnyEvent], set[str]]


def _all_is_well() -> Iterator[History]:
    yield "all is well", [*ANSWERED, ev.Stored(9, C, 1, "closed")], set()
    yield "nothing happened", [], set()


def _lost() -> Iterator[History]:
    yield "accepted, then silence", [pushed(), queued()], {"lost"}
    yield "acknowledged, then silence", [pushed(), ev.Acked(2, C)], {"lost"}
    yield "stored, and the shim died before it could say so", [pushed(), ev.Stored(9, C, 1, "queued")], {"lost"}
    yield "offered, but never received", [pushed(), queued(), offered(3)], {"lost"}
    yield "never accepted", [pushed()], set()
    yield "ended with a code", [pushed(), queued(), ev.Reported(9, C, False, "expired")], set()
    yield "gone with a destroyed database", [pushed(), queued(), ev.StoreLost(8)], set()
    yield "accepted after a database was destroyed", [ev.StoreLost(0), pushed(), queued()], {"lost"}
    again = [pushed(), queued(), ev.StoreLost(8), pushed(9), queued(10)]
    yield "gone with a destroyed database, then accepted again", again, {"lost"}
    waiting = [pushed(), queued(), contact(5, what="register"), ev.Stored(9, C, 1, "uncertain")]
    yield "waits for an id that its agent had before a database was destroyed", [ev.StoreLost(0.5), *waiting], set()
    yield "waits for its agent, and no database was destroyed", waiting, {"lost"}
    yield "waits, and its agent has not registered since", [ev.StoreLost(0.5), *waiting[:2], waiting[3]], {"lost"}
    yield "its agent has registered, and the command is gone", [ev.StoreLost(0.5), *waiting[:3]], {"lost"}
    ahead, right = ev.WallClock(0, WALL_S + 16_000), ev.WallClock(6, WALL_S)
    kept = [pushed(), queued(), ev.Stored(9, C, 1, "queued")]
    yield "waits for an expiry by a wall clock that was ahead", [ahead, *kept, right], set()
    yield "the clock was ahead, and the command is gone", [ahead, *kept[:2], right], {"lost"}
    yield (
        "the clock was right, and then ahead",
        [ev.WallClock(0, WALL_S), *kept, ev.WallClock(6, WALL_S + 16_000)],
        {"lost"},
    )


def _redelivery() -> Iterator[History]:
    yield "twice with a reason", [*DELIVERED, offered(6, 2, "no evidence"), received(7)], set()
    yield "twice without a reason", [*DELIVERED, offered(6, 2), received(7)], {"redelivery"}
    yield "twice under the same number", [*DELIVERED, offered(6, 1, "restart"), received(7)], {"redelivery"}
    yield "received more often than offered", [*DELIVERED, received(7)], {"redelivery"}
    unknown = [pushed(), queued(), offered(3, recorded=False), received(4)]
    yield "again by a replica whose database has no record", [*unknown, offered(6, by="other"), received(7)], set()
    yield "again by the one that knew it", [*unknown, offered(6), received(7)], {"redelivery"}
    yield "by another replica in spite of a record", [*DELIVERED, offered(6, by="other"), received(7)], {"redelivery"}
    yield "second attempt, the first one unseen", [pushed(), queued(), offered(3, 2, "restart"), received(4)], set()
    yield "second attempt out of nothing", [pushed(), queued(), offered(3, 2), received(4)], {"redelivery"}
    yield (
        "taken back and offered again is no redelivery",
        [pushed(), queued(), offered(3), ev.Requeued(4, C), offered(5), received(6)],
        set(),
    )
    yield (
        "taken back, but the agent had it",
        [pushed(), queued(), offered(3), received(3.5), ev.Requeued(4, C), offered(5), received(6)],
        {"redelivery"},
    )
    killed = [*DELIVERED[:-1], shim(5, born=False), shim(6, born=True)]
    yield (
        "an offer taken back before anybody was told of it is none",
        [*killed, ev.Requeued(7, C, 2), offered(8, 2, "restart"), received(9)],
        set(),
    )
    yield (
        "nor is it the same as one of an earlier life",
        [*killed, ev.Requeued(7, C, 1), offered(8, 2, "restart"), received(9)],
        set(),
    )
    unrecorded = [pushed(), queued(), offered(3, recorded=False), received(4)]
    yield "an offer that no disk remembers, and a restart", [*unrecorded, shim(5, born=False), offered(6)], set()
    yield "an offer that no disk remembers, and another owner", [*unrecorded, offered(6, 1, "restart")], set()
    yield "an offer that no disk remembers, without one", [*unrecorded, offered(6)], {"redelivery"}
    yield "again after the database was destroyed", [*DELIVERED, ev.StoreLost(6), offered(7), received(8)], set()
    later = [*DELIVERED, offered(7, 2, "restart"), received(8), offered(9, 1, "restart")]
    yield "a number that falls long after the database was destroyed", [ev.StoreLost(0), *later], {"redelivery"}


def _at_most_once() -> Iterator[History]:
    once = [pushed(once=True), queued(), offered(3), received(4)]
    twice = [*once, offered(6, 1, "restart"), received(7)]
    yield "once for each database, as it was destroyed", [*twice, ev.StoreLost(5)], set()
    again = [*once, offered(6, 2, "restart"), ev.StoreLost(9)]
    yield "once, and again before the database was destroyed", again, {"at_most_once"}
    yield "once", once, set()
    yield "once, offered twice", [*once, offered(6, 2, "restart")], {"at_most_once"}
    yield "once, received twice", [*once, offered(6, 2, "restart"), received(7)], {"at_most_once"}
    yield (
        "once, another offer than the one taken back",
        [*once, offered(6, 2, "restart"), ev.Requeued(7, C, 3)],
        {"at_most_once"},
    )
    yield "once, taken back first", [once[0], once[1], offered(3), ev.Requeued(4, C), offered(5), received(6)], set()


def _results() -> Iterator[History]:
    yield "a result that was taken and never came up", [*DELIVERED, ev.Posted(6, C, 204)], {"result"}
    yield "a result that was refused", [*DELIVERED, ev.Posted(6, C, 503)], set()
    yield "a result without an answer", [*DELIVERED, ev.Posted(6, C, 0)], set()
    yield "a result twice at the controller", [*ANSWERED, ev.Reported(8, C, True)], set()
    yield "a result gone with the database", [*DELIVERED, ev.Posted(6, C, 204), ev.StoreLost(7)], set()
    yield "a result for an unknown command", [ev.Posted(1, "s.x", 204), ev.Reported(2, "s.x", True)], set()


def _unread() -> Iterator[History]:
    guess = ev.Delivered(4, C, "poll")
    yield "counted as delivered, never read", [pushed(), queued(), offered(3), guess], {"unread", "lost"}
    yield "counted as delivered before it was read", [pushed(), queued(), offered(3), guess, received(5)], {"unread"}
    late = [pushed(), queued(), offered(3), guess, received(4.2), ev.Late(4.3, 0.5)]
    yield "the harness had no time to look which of the two came first", late, set()
    early = [pushed(), queued(), offered(3), guess, received(4.2), ev.Late(4.3, 0.1)]
    yield "it had none only when the reply was read", early, {"unread"}


def _fifo() -> Iterator[History]:
    two = [pushed(1, "s.1"), pushed(1.1, "s.2"), queued(2, "s.1"), queued(2.1, "s.2")]
    both = [offered(3, command="s.1"), offered(3, command="s.2")]
    yield "in order", [*two, *both, received(4, "s.1"), received(4, "s.2")], set()
    yield "out of order", [*two, *both, received(4, "s.2"), received(5, "s.1")], {"fifo"}
    seqs = [ev.Stored(9, "s.1", 8, "closed"), ev.Stored(9, "s.2", 7, "closed")]
    yield "out of the store's order", [*two, *both, received(4, "s.1"), received(5, "s.2"), *seqs], {"fifo"}
    before = [queued(1, "s.2"), offered(2, command="s.2"), received(3, "s.2"), ev.StoreLost(5)]
    after = [queued(6, "s.1"), queued(6.5, "s.2"), offered(7, command="s.1"), received(8, "s.1")]
    counted = [ev.Stored(9, "s.1", 1, "closed"), ev.Stored(9, "s.2", 2, "queued")]
    yield "a new database counts from one again", [*before, *after, *counted], set()
    busy = ev.Late(5.2, 1.3)
    yield (
        "out of order for a harness that had no time to look",
        [*two, *both, received(4, "s.2"), received(5, "s.1"), busy],
        set(),
    )
    yield "out of order before it had none", [*two, *both, received(3.5, "s.2"), received(5, "s.1"), busy], {"fifo"}
    other = [pushed(1, "t.1"), queued(1.5, "t.1"), offered(3, command="t.1"), received(6, "t.1")]
    yield "another session's order is its own", [*two, *both, *other, received(4, "s.1"), received(5, "s.2")], set()


def _heartbeats() -> Iterator[History]:
    told = ev.Introduced(0.5, "1/1", "s")
    living = [told, *(contact(float(at)) for at in range(1, 40, 5))]
    yield "vouched for by a living agent", [*living, beat(36.5)], set()
    yield "within the bound after its death", [*living, ev.Life(37, "s", False), beat(60)], set()
    yield "after the bound", [*living, ev.Life(37, "s", False), beat(80)], {"vouched"}
    yield "nobody was ever there", [told, beat(10)], {"vouched"}
    yield "read late, sent in time", [ev.WallClock(0, WALL_S), *living, beat(110, sent_at=38)], set()
    yield "read late, sent late", [ev.WallClock(0, WALL_S), *living, beat(110, sent_at=90)], {"vouched"}
    yield "a call may have waited while the shim's loop was blocked", [*living, beat(76), ev.Lag(20, 5)], set()
    yield "but not for longer than that", [*living, beat(80), ev.Lag(20, 1)], {"vouched"}
    stepped = [ev.WallClock(0, WALL_S), ev.WallClock(20, WALL_S + 3600), ev.WallClock(30, WALL_S)]
    yield "sent under a clock that was wrong", [*stepped, *living, beat(25.1, sent_at=25 + 3600)], set()
    held = [told, contact(1, 100, "poll"), beat(95)]
    yield "a held poll is life", held, set()
    young = [told, contact(1), beat(43)]
    yield "three gaps unknown: 45 s", young, set()
    half = [ev.Contact(at + 0.01, "s", "heartbeat", "failed", float(at), 0) for at in (11, 16)]
    yield (
        "heartbeats that may never have arrived whole make no gap",
        [told, contact(1), contact(6), *half, beat(59)],
        set(),
    )
    yield "but not for ever", [told, contact(1), contact(6), *half, beat(75)], {"vouched"}
    restarted = [*living, shim(36, born=True), contact(37), beat(79)]
    yield "a shim that has just started knows no interval yet", restarted, set()
    pause = [ev.Fault(30, "paused", True), ev.Fault(50, "paused", False)]
    yield "what came while the shim was paused it reads when it goes on", [*living, *pause, beat(84)], set()
    yield "and then no later than ever", [*living, *pause, beat(90)], {"vouched"}
    earlier = [ev.Fault(2, "paused", True), ev.Fault(5, "paused", False)]
    yield "a pause before the last call vouches for nothing", [*living, *earlier, beat(84)], {"vouched"}

    yield "told on this connection", [told, contact(1), beat(2)], set()
    yield "told on another one", [told, contact(1), beat(2, connection="1/2")], {"introduced"}
    yield "adopted after the database was destroyed", [ev.StoreLost(0.5), contact(1), beat(2)], set()
    registered = contact(1, what="register")
    yield "registered again after that", [ev.StoreLost(0.5), registered, contact(2), beat(3)], {"introduced"}
    late = [ev.WallClock(0, WALL_S), ev.StoreLost(0.5), contact(1), contact(3, what="register"), beat(60, sent_at=2)]
    yield "sent before it registered again, and read long after it", [*late, contact(59)], set()
    under_way = contact(1, at=3, what="register")
    yield "its registration was under way", [ev.StoreLost(0.5), contact(0.9), under_way, beat(2)], set()
    yield "registered only before that", [registered, ev.StoreLost(1.5), contact(2), beat(3)], set()
    yield "told after it", [ev.Introduced(3, "1/1", "s"), contact(1), beat(2)], {"introduced"}


def spoke(connection: str, sent_unix: float, owner: str = "o") -> ev.Spoke:
    return ev.Spoke(sent_unix + 1, owner, connection, sent_unix)


def _owners() -> Iterator[History]:
    first, second = [spoke("1/1", 1), spoke("1/1", 2)], [spoke("1/2", 3), spoke("1/2", 4)]
    yield "one owner after another", [*first, *second], set()
    yield "two at once", [*first, *second, spoke("1/1", 3.5)], {"sole_owner"}
    yield "two owners of two links", [*first, *second, spoke("1/3", 3.5, owner="p")], set()


def _the_rest() -> Iterator[History]:
    yield "a reply that cannot be decoded", [ev.Spoilt(1, "s", "poll", "A2: created_at")], {"decodable"}
    yield "a traceback", [ev.Defect(1, "Traceback")], {"sound"}


GROUPS = (_all_is_well, _lost, _redelivery, _at_most_once, _results, _unread, _fifo, _heartbeats, _owners, _the_rest)
CASES = [one for group in GROUPS for one in group()]


@pytest.mark.parametrize("history, rules", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_history_is_judged(history: list[ev.AnyEvent], rules: set[str]) -> None:
    assert broken(history) == rules


def test_every_rule_is_broken_by_some_history() -> None:
    named = set.union(*(rules for _, _, rules in CASES))
    assert named == {"lost", "redelivery", "at_most_once", "result", "unread", "fifo", "vouched", "introduced"} | {
        "sole_owner",
        "decodable",
        "sound",
    }
    assert len(named) == len(checker.RULES)


def test_a_session_that_was_adopted_without_a_name_needs_no_introduction() -> None:
    assert broken([contact(1), beat(2)], nameless=["s"]) == set()


def test_the_order_of_events_in_the_history_does_not_matter_but_their_times_do() -> None:
    assert broken(list(reversed(ANSWERED))) == set()
