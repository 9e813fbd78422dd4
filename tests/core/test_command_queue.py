"""The queue of one session (docs/reference/protocol.md#13-poll, #3-commands)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shim.core.command_queue import (
    ARRIVING_BYTES,
    ARRIVING_COMMANDS,
    MAX_ARRIVING_BYTES,
    MAX_ARRIVING_COMMANDS,
    OVERLAP_S,
    SHOWN_COMMANDS,
    TRANSITIONS,
    Arriving,
    Batch,
    CommandEvent,
    CommandQueue,
    QueuedCommand,
    QueuePolicy,
    RecentCommands,
    next_state,
    unknown_open,
)
from shim.core.records import CommandRecord, CommandState, SessionKey, TraceEntry
from shim.errors import IllegalTransition

KEY = SessionKey("default", "cluster", "c-1")
POLICY = QueuePolicy(
    max_queued=1000,
    max_queued_bytes=10_000,
    max_batch=100,
    max_bytes=1000,
    max_attempts=3,
    redeliver=True,
    at_most_once=frozenset({"once"}),
)


def record(seq: int, **fields: Any) -> CommandRecord:
    values: dict[str, Any] = {"type": "exec", "size_bytes": 10, **fields}
    return CommandRecord(KEY, f"k{seq}", payload={}, created_at="", arrived_unix=0, expires_unix=0, seq=seq, **values)


def queue_of(*records: CommandRecord) -> CommandQueue:
    queue = CommandQueue(KEY)
    for each in records:
        queue.add(each, expires_at=100.0, since=float(each.seq))
    return queue


def offered(queue: CommandQueue, **policy: Any) -> Batch:
    offer = queue.take(1, 7, 0.0, replace(POLICY, **policy))
    assert offer is not None
    return offer


def ids(commands: tuple[QueuedCommand, ...]) -> list[str]:
    return [live.record.id for live in commands]


# --- offering ---------------------------------------------------------------------------------------------------------


def test_offers_the_oldest_first_whatever_the_order_of_their_commits() -> None:
    queue = queue_of(record(3), record(1), record(2))
    offer = queue.take(5, 7, 12.0, POLICY)
    assert offer is not None
    assert offer.ids == ("k1", "k2", "k3")
    assert (offer.key, offer.number, offer.connection, offer.polled_at) == (KEY, 5, 7, 12.0)
    assert queue.waiting_since == 1.0


@pytest.mark.parametrize(
    "sizes, policy, count",
    [
        ([10] * 5, {"max_batch": 2}, 2),
        ([10] * 5, {"max_bytes": 35}, 3),
        ([10] * 5, {"max_bytes": 30}, 3),
        ([5000, 10], {}, 1),  # at least one, whatever its size
        ([10, 5000, 10], {}, 1),
        ([10] * 5, {"max_batch": 1, "max_bytes": 1}, 1),
    ],
)
def test_a_batch_keeps_to_the_bounds_of_a_reply(sizes: list[int], policy: dict[str, Any], count: int) -> None:
    queue = queue_of(*(record(seq, size_bytes=size) for seq, size in enumerate(sizes)))
    assert len(offered(queue, **policy).ids) == count


def test_while_a_batch_is_without_evidence_nothing_newer_is_offered() -> None:
    queue = queue_of(record(1))
    offer = offered(queue)
    queue.add(record(2), 100.0, 0.0)
    assert not queue.waiting()
    assert queue.take(2, 7, 0.0, POLICY) is None
    assert ids(queue.delivered(offer)) == ["k1"]
    assert offered(queue).ids == ("k2",)


def test_an_unwritten_reply_was_no_attempt_and_everything_is_in_its_old_place() -> None:
    queue = queue_of(record(1), record(3))
    offer = offered(queue)
    queue.add(record(2), 100.0, 0.0)
    back = queue.unwritten(offer)
    assert [(live.state, live.attempts) for live in back] == [(CommandState.QUEUED, 0)] * 2
    assert offered(queue).ids == ("k1", "k2", "k3")


def test_what_may_not_be_offered_without_a_record_was_no_attempt_and_stays_in_its_place() -> None:
    queue = queue_of(record(1), record(2, type="once"), record(3))
    uncertain = queue.add(record(4, state=CommandState.UNCERTAIN, attempts=1), expires_at=100.0, since=4.0)
    uncertain.reason = "no evidence"
    rest = queue.unrecorded(offered(queue), POLICY)
    assert rest is queue.offer
    assert rest is not None
    assert rest.ids == ("k1",)
    assert [(live.record.id, live.state, live.attempts, live.replies) for live in queue.all()] == [
        ("k1", CommandState.OFFERED, 1, 1),
        ("k2", CommandState.QUEUED, 0, 0),
        ("k3", CommandState.QUEUED, 0, 0),
        ("k4", CommandState.UNCERTAIN, 1, 0),
    ]


def test_a_command_that_ended_during_the_write_is_left_as_it_is() -> None:
    queue = queue_of(record(1, type="once"), record(2), record(3))
    offer = offered(queue)
    offer.commands[1].state = CommandState.ANSWERED
    assert queue.unrecorded(offer, POLICY) is None
    assert [live.state for live in offer.commands] == [
        CommandState.QUEUED,
        CommandState.ANSWERED,
        CommandState.QUEUED,
    ]


@pytest.mark.parametrize("later_s, evidence", [(OVERLAP_S, True), (OVERLAP_S * 0.99, False)])
def test_a_poll_from_the_end_of_the_overlap_on_is_evidence(later_s: float, evidence: bool) -> None:
    offer = offered(queue_of(record(1)))
    offer.written_at = 0.0
    offer.open_until = lambda: later_s
    assert offer.is_read_at_poll(later_s, later_s) == evidence


def test_what_was_uncertain_before_an_unwritten_reply_stays_so() -> None:
    queue = queue_of(record(1))
    queue.mark_uncertain(offered(queue), "no evidence", POLICY)
    [live] = queue.unwritten(offered(queue))
    assert (live.state, live.attempts, live.reason) == (CommandState.UNCERTAIN, 1, "no evidence")


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_a_poll_after_a_reply_of_another_replica_waits_for_its_word_that_the_connection_was_open() -> None:
    offer = Batch(KEY, 1, (), -7, 0.0, written_at=10.0)
    assert not offer.is_read_at_poll(11.0, now=11.0)
    assert not offer.is_read_at_poll(12.0, now=12.0), "a second poll changes nothing: the first is the earlier one"
    assert not offer.is_confirmed_by_open_at(11.0), "its end may be on its way, as the poll was"
    assert offer.is_confirmed_by_open_at(11.1)
    assert not offer.is_confirmed_by_open_at(11.2), "once"


@pytest.mark.parametrize("connection, cleanly_closed", [(1, None), (7, None), (-1, True), (-7, True)])
def test_no_report_is_needed_for_a_connection_that_is_certainly_open_or_was_closed(
    connection: int, cleanly_closed: bool | None
) -> None:
    offer = Batch(KEY, 1, (), connection, 0.0, written_at=10.0, cleanly_closed=cleanly_closed)
    offer.open_until = (lambda: 11.0) if cleanly_closed is None else unknown_open
    assert offer.is_read_at_poll(11.0, now=11.0)
    assert not offer.is_confirmed_by_open_at(99.0)


def test_a_result_proves_the_whole_reply() -> None:
    queue = queue_of(record(1), record(2))
    offer = offered(queue)
    assert ids(queue.answered("k2")) == ["k1"]
    assert [live.state for live in offer.commands] == [CommandState.DELIVERED, CommandState.ANSWERED]
    assert len(queue) == 0
    assert queue.offer is None


def test_a_result_proves_only_its_own_command_if_it_may_have_come_in_an_earlier_reply() -> None:
    queue = queue_of(record(1))
    queue.mark_uncertain(offered(queue), "no evidence", POLICY)
    queue.add(record(2), 100.0, 0.0)
    again = offered(queue)
    assert again.ids == ("k1", "k2")
    assert queue.answered("k1") == ()
    assert ids(queue.all()) == ["k2"]
    assert queue.offer is again, "and whether the agent has the other is still open"


def test_so_it_is_if_the_earlier_reply_is_only_believed_not_to_have_arrived() -> None:
    queue = queue_of(record(1))
    queue.unwritten(offered(queue))
    queue.add(record(2), 100.0, 0.0)
    offered(queue)
    assert queue.answered("k1") == ()
    assert ids(queue.all()) == ["k2"]


def test_a_result_for_what_was_not_offered_proves_nothing_else() -> None:
    queue = queue_of(record(1), record(2))
    offer = offered(queue, max_batch=1)
    assert queue.answered("k2") == ()
    assert queue.answered("k9") == ()
    assert queue.offer is offer


def test_late_evidence_settles_what_was_not_offered_again() -> None:
    queue = queue_of(record(1))
    first = offered(queue)
    queue.mark_uncertain(first, "no evidence", POLICY)
    assert ids(queue.delivered(first)) == ["k1"]
    assert len(queue) == 0


def test_late_evidence_for_an_earlier_reply_says_nothing_about_the_next() -> None:
    queue = queue_of(record(1))
    first = offered(queue)
    queue.mark_uncertain(first, "no evidence", POLICY)
    second = offered(queue)
    assert queue.delivered(first) == ()
    assert queue.offer is second
    assert ids(queue.delivered(second)) == ["k1"]


# --- doubt ------------------------------------------------------------------------------------------------------------


def test_without_evidence_it_is_offered_again_until_the_attempts_are_used_up() -> None:
    queue = queue_of(record(1))
    for attempt in (1, 2):
        doubt = queue.mark_uncertain(offered(queue), "no evidence", POLICY)
        assert [(live.attempts, live.state) for live in doubt.again] == [(attempt, CommandState.UNCERTAIN)]
    doubt = queue.mark_uncertain(offered(queue), "no evidence", POLICY)
    assert ids(doubt.dead) == ["k1"]
    assert doubt.dead[0].state is CommandState.DEAD
    assert len(queue) == 0
    assert queue.size_bytes == 0


@pytest.mark.parametrize("fields, policy", [({"type": "once"}, {}), ({}, {"redeliver": False})])
def test_some_are_given_up_at_once(fields: dict[str, Any], policy: dict[str, Any]) -> None:
    queue = queue_of(record(1, **fields))
    doubt = queue.mark_uncertain(offered(queue), "no evidence", replace(POLICY, **policy))
    assert ids(doubt.dead) == ["k1"]
    assert doubt.again == ()


def test_after_a_restart_what_was_offered_is_uncertain() -> None:
    queue = queue_of(
        record(1, state=CommandState.OFFERED, attempts=1),
        record(2, state=CommandState.UNCERTAIN, attempts=2),
        record(3),
        record(4, state=CommandState.OFFERED, attempts=1, type="once"),
        record(5, state=CommandState.OFFERED, attempts=3),
    )
    doubt = queue.recover_after_restart(POLICY)
    assert ids(doubt.again) == ["k1", "k2"]
    assert ids(doubt.dead) == ["k4", "k5"]
    assert {live.reason for live in doubt.again} == {"restart"}
    assert [(live.record.id, live.state) for live in queue.all()] == [
        ("k1", CommandState.UNCERTAIN),
        ("k2", CommandState.UNCERTAIN),
        ("k3", CommandState.QUEUED),
    ]
    assert offered(queue).ids == ("k1", "k2", "k3")


# --- ends -------------------------------------------------------------------------------------------------------------


def test_only_queued_commands_expire() -> None:
    queue = queue_of(record(1), record(2, state=CommandState.UNCERTAIN), record(3))
    offered(queue, max_batch=1)
    assert queue.expire("k1") is None
    assert queue.expire("k2") is None
    expired = queue.expire("k3")
    assert expired is not None
    assert expired.state is CommandState.EXPIRED
    assert queue.expire("k3") is None
    assert queue.expire("k9") is None


def test_purging_spares_what_is_on_its_way() -> None:
    queue = queue_of(record(1), record(2))
    offered(queue, max_batch=1)
    assert queue.give_up("k1") is None
    purged = queue.give_up("k2")
    assert purged is not None
    assert purged.state is CommandState.DEAD
    assert queue.give_up("k2") is None


def test_a_deleted_session_takes_all_its_commands_with_it() -> None:
    queue = queue_of(record(1), record(2, state=CommandState.UNCERTAIN), record(3))
    offered(queue, max_batch=1)
    ended = queue.forget_all()
    assert ids(ended) == ["k1", "k2", "k3"]
    assert {live.state for live in ended} == {CommandState.EXPIRED}
    assert len(queue) == 0
    assert queue.offer is None


def test_a_successor_gets_everything_in_the_order_of_arrival_and_keeps_its_own() -> None:
    old = queue_of(record(1), record(3), record(4, state=CommandState.UNCERTAIN, attempts=2))
    old.all()[2].reason = "restart"
    other = SessionKey("default", "cluster", "c-2")
    new = CommandQueue(other)
    for each in (record(2), record(3, type="own")):
        new.add(each, expires_at=100.0, since=float(each.seq))
    old.move_to(new)
    assert [(live.record.id, live.record.type, live.attempts, live.reason) for live in new.all()] == [
        ("k1", "exec", 0, ""),
        ("k2", "exec", 0, ""),
        ("k3", "own", 0, ""),
        ("k4", "exec", 2, "restart"),
    ]
    assert [live.since for live in new.all()] == [1.0, 2.0, 3.0, 4.0]
    assert new.all()[0].record.session == other
    assert (new.all()[3].record.state, new.all()[3].record.attempts) == (CommandState.UNCERTAIN, 2)
    assert len(old) == 0
    assert old.size_bytes == 0


def test_a_successor_knows_what_was_offered_since_the_commands_were_stored() -> None:
    old, new = queue_of(record(1)), CommandQueue(SessionKey("default", "cluster", "c-2"))
    old.mark_uncertain(offered(old), "superseded", POLICY)
    old.move_to(new)
    [moved] = new.all()
    assert (moved.state, moved.attempts, moved.reason) == (CommandState.UNCERTAIN, 1, "superseded")
    assert (moved.replies, moved.expires_at) == (1, 100.0)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_bounds_count_what_is_on_its_way_to_the_disk() -> None:
    queue = queue_of(record(1))
    policy = replace(POLICY, max_queued=2, max_queued_bytes=100)
    assert queue.room_for(90, policy)
    assert not queue.room_for(91, policy)
    queue.reserve(50)
    assert not queue.room_for(1, policy)
    queue.release(50)
    assert queue.room_for(90, policy)
    policy = replace(POLICY, max_queued=4, max_queued_bytes=100)
    for size_bytes in (20, 30):
        queue.reserve(size_bytes)
    assert (queue.room_for(40, policy), queue.room_for(41, policy)) == (True, False)
    queue.reserve(0)
    assert not queue.room_for(0, policy), "three on their way and one in the queue"
    queue.release(30)
    assert (queue.room_for(70, policy), queue.room_for(71, policy)) == (True, False)
    queue.reserve(0)
    assert not queue.room_for(0, policy)


@pytest.mark.parametrize("number, size_bytes", [(ARRIVING_COMMANDS, 7), (4, ARRIVING_BYTES // 4)])
def test_no_frame_is_read_while_too_much_is_on_its_way_to_the_disk(number: int, size_bytes: int) -> None:
    arriving = Arriving()
    for _ in range(number):
        assert arriving.has_room
        arriving.add(size_bytes)
    assert not arriving.has_room
    assert not arriving.exhausted
    arriving.remove(size_bytes)
    assert arriving.has_room
    arriving.add(size_bytes)
    assert not arriving.has_room


@pytest.mark.parametrize("number, size_bytes", [(MAX_ARRIVING_COMMANDS, 7), (4, MAX_ARRIVING_BYTES // 4)])
def test_a_disk_that_stands_still_ends_in_rejections(number: int, size_bytes: int) -> None:
    arriving = Arriving()
    for _ in range(number):
        assert not arriving.exhausted
        arriving.add(size_bytes)
    assert arriving.exhausted
    for _ in range(number):
        arriving.remove(size_bytes)
    assert (arriving.commands, arriving.size_bytes) == (0, 0)


STEPS = st.lists(
    st.sampled_from(["add", "take", "written", "unwritten", "doubt", "evidence", "late", "result", "expire"]),
    max_size=40,
)


@given(STEPS)
def test_whatever_happens_order_and_bookkeeping_hold(steps: list[str]) -> None:
    """FIFO, at most one batch without evidence, bytes that add up, no command offered twice without a reason."""
    queue, seq, earlier = CommandQueue(KEY), 0, None
    for step in steps:
        offer = queue.offer
        if step == "add":
            seq += 1
            queue.add(record(seq), 100.0, 0.0)
        elif step == "take":
            before = queue.all()
            taken = queue.take(seq, 7, 0.0, replace(POLICY, max_batch=2, max_attempts=99))
            assert (taken is None) == (offer is not None or not before)
            if taken is not None:
                assert taken.commands == before[: len(taken.commands)]
                assert all(live.attempts == 1 or live.reason for live in taken.commands)
        elif step == "unwritten" and offer is not None:
            queue.unwritten(offer)
        elif step == "doubt" and offer is not None:
            assert not queue.mark_uncertain(offer, "no evidence", replace(POLICY, max_attempts=99)).dead
            earlier = offer
        elif step == "evidence" and offer is not None:
            queue.delivered(offer)
        elif step == "late" and earlier is not None:
            queue.delivered(earlier)
        elif step == "result" and queue.all():
            queue.answered(queue.all()[-1].record.id)
        elif step == "expire" and queue.all():
            queue.expire(queue.all()[0].record.id)
        held = queue.all()
        assert [live.seq for live in held] == sorted(live.seq for live in held)
        assert queue.size_bytes == 10 * len(held) == 10 * len(queue)
        in_offer = queue.offer.commands if queue.offer is not None else ()
        assert {live.seq for live in held if live.state is CommandState.OFFERED} <= {live.seq for live in in_offer}


# --- The table of a command's life is total: what it does not say raises (docs/reference/protocol.md#3-commands) ---


S, E = CommandState, CommandEvent
EXPECTED = {
    E.OFFER: {S.QUEUED: S.OFFERED, S.UNCERTAIN: S.OFFERED},
    E.UNWRITTEN: {S.OFFERED: S.QUEUED},
    E.EVIDENCE: {S.OFFERED: S.DELIVERED, S.UNCERTAIN: S.DELIVERED},
    E.NO_EVIDENCE: {S.OFFERED: S.UNCERTAIN},
    E.RESULT: dict.fromkeys(S, S.ANSWERED) | {S.CLOSED: S.CLOSED},
    E.FENCED: {S.ANSWERED: S.CLOSED},
    E.EXPIRE: {S.QUEUED: S.EXPIRED},
    E.GIVE_UP: {S.QUEUED: S.DEAD, S.UNCERTAIN: S.DEAD},
    E.FORGET: dict.fromkeys((S.QUEUED, S.OFFERED, S.UNCERTAIN), S.EXPIRED),
    E.REDELIVER: dict.fromkeys((S.DELIVERED, S.EXPIRED, S.DEAD), S.QUEUED),
}


@pytest.mark.parametrize("step", E, ids=lambda step: step.name)
@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
def test_every_cell(state: CommandState, step: CommandEvent) -> None:
    if state in EXPECTED[step]:
        assert next_state(state, step) is EXPECTED[step][state]
    else:
        with pytest.raises(IllegalTransition, match=f"{step.name} in {state.name}"):
            next_state(state, step)


def test_a_result_is_taken_in_every_state() -> None:
    assert {state for state, step in TRANSITIONS if step is E.RESULT} == set(S)


# --- The latest commands, as the status page shows them ---


OTHER = SessionKey("default", "agent", "a-1")


def test_a_command_is_shown_once_with_its_newest_step_the_newest_first() -> None:
    recent = RecentCommands()
    recent.note(KEY, ("1",), TraceEntry(1.0, "arrived", "exec"))
    recent.note(KEY, ("2",), TraceEntry(2.0, "arrived", "scan"))
    recent.note(KEY, ("1",), TraceEntry(3.0, "offered", "attempt 1"))
    recent.note(OTHER, ("1",), TraceEntry(4.0, "dead", "why"))
    assert [(each.detail, each.wall) for each in recent] == [("why", 4.0), ("attempt 1", 3.0), ("scan", 2.0)]
    assert [(each.id, each.session, each.event, each.type, each.arrived_unix) for each in recent] == [
        ("1", OTHER, "dead", "", 0.0),
        ("1", KEY, "offered", "exec", 1.0),
        ("2", KEY, "arrived", "scan", 2.0),
    ]


def test_only_so_many_are_kept_also_of_one_batch() -> None:
    recent = RecentCommands()
    recent.note(KEY, tuple(map(str, range(3 * SHOWN_COMMANDS))), TraceEntry(1.0, "offered"))
    recent.note(KEY, ("last",), TraceEntry(2.0, "arrived"))
    shown = [each.id for each in recent]
    assert (len(shown), shown[:2]) == (SHOWN_COMMANDS, ["last", str(3 * SHOWN_COMMANDS - 1)])
