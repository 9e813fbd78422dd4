"""Half-open connections and stalled applications are found in time (docs/reference/protocol.md#21-link-life)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.liveness import MAX_TRACKED_HEARTBEATS, Liveness, LivenessCheck, LivenessState

PING_S, READ_S, ACK_S = 25.0, 55.0, 55.0
Deed = Callable[[Liveness, float], None]


def watched(deeds: dict[float, Deed], until: float = 300.0) -> list[tuple[float, LivenessState]]:
    """What the checks find, run when each asks for the next one; `deeds` happen at their times, before a check."""
    liveness = Liveness(0.0, PING_S, READ_S, ACK_S)
    found: list[tuple[float, LivenessState]] = []
    due, todo = 0.0, sorted(deeds)
    while due <= until:
        while todo and todo[0] <= due:
            at = todo.pop(0)
            deeds[at](liveness, at)
        check = liveness.check(due)
        if check.verdict is not LivenessState.ALIVE:
            found.append((due, check.verdict))
        if check.verdict in (LivenessState.HALF_OPEN, LivenessState.STALLED):
            break
        assert check.next_s > 0
        due += check.next_s
    return found


def frame(liveness: Liveness, now: float) -> None:
    liveness.frame(now)


def beat(request_id: str) -> Deed:
    return lambda liveness, now: liveness.heartbeat_sent(request_id, now)


def ack(request_id: str) -> Deed:
    def deed(liveness: Liveness, now: float) -> None:
        liveness.frame(now)
        liveness.acked(request_id)

    return deed


def test_silence_is_asked_after_25_s_and_condemned_after_55() -> None:
    assert watched({}) == [(25.0, LivenessState.PING), (55.0, LivenessState.HALF_OPEN)]


def test_any_frame_is_life() -> None:
    frames = dict.fromkeys(map(float, range(10, 100, 20)), frame)
    assert watched(frames) == [(115.0, LivenessState.PING), (145.0, LivenessState.HALF_OPEN)]


def test_a_silence_is_asked_once() -> None:
    assert watched({24.0: frame, 60.0: frame}) == [
        (49.0, LivenessState.PING),
        (85.0, LivenessState.PING),
        (115.0, LivenessState.HALF_OPEN),
    ]


def living(more: dict[float, Deed], until: float = 300.0) -> dict[float, Deed]:
    """A live proxy answers all along."""
    return {**dict.fromkeys((n + 0.5 for n in range(0, int(until), 10)), frame), **more}


def test_a_controller_that_never_acknowledges_is_not_stalled() -> None:
    assert watched(living({float(n): beat(f"h{n}") for n in range(1, 300, 27)})) == []


def test_a_stalled_application_behind_a_live_proxy_is_found_within_90_s() -> None:
    # it stalls right after the acknowledgement at 1.5, and the agent calls every 30 s
    deeds = living({1.0: beat("h1"), 1.5: ack("h1"), 31.0: beat("h2"), 61.0: beat("h3")})
    [(at, verdict)] = watched(deeds)
    assert verdict is LivenessState.STALLED
    assert at - 1.5 < 90
    assert at == 31.0 + ACK_S


def test_acknowledgements_keep_it_alive() -> None:
    deeds: dict[float, Deed] = {}
    for number in range(1, 10):
        deeds[number * 27.5] = beat(f"h{number}")
        deeds[number * 27.5 + 2] = ack(f"h{number}")
    assert watched(living(deeds), until=280) == []


def test_without_request_ids_each_acknowledgement_answers_the_oldest() -> None:
    deeds = living({1.0: beat("h1"), 2.0: beat("h2"), 3.0: ack(""), 40.0: ack("")})
    assert watched(deeds) == []
    [(at, verdict)] = watched(living({1.0: beat("h1"), 20.0: beat("h2"), 21.0: ack("")}))
    assert (at, verdict) == (75.0, LivenessState.STALLED)


def test_a_later_acknowledgement_covers_earlier_heartbeats() -> None:
    assert watched(living({1.0: beat("h1"), 2.0: beat("h2"), 3.0: ack("h2")})) == []


def test_a_controller_that_numbers_its_acknowledgements_itself_is_not_stalled() -> None:
    deeds: dict[float, Deed] = {}
    for number in range(1, 10):
        deeds[number * 27.5] = beat(f"h{number}")
        deeds[number * 27.5 + 2] = ack(f"controller-{number}")
    assert watched(living(deeds), until=280) == []


def test_a_heartbeat_that_was_answered_otherwise_is_not_waited_for() -> None:
    deeds = living({1.0: beat("h1"), 1.5: ack("h1"), 28.0: beat("h2"), 29.0: lambda live, now: live.answered("h2")})
    assert watched(deeds) == []


def test_what_is_remembered_is_bounded() -> None:
    liveness = Liveness(0.0, PING_S, READ_S, ACK_S)
    for number in range(3 * MAX_TRACKED_HEARTBEATS):
        liveness.heartbeat_sent(f"h{number}", 1.0)
    assert len(liveness._unacked) == MAX_TRACKED_HEARTBEATS


@given(
    st.lists(
        st.tuples(
            st.floats(0, 60),
            st.sampled_from(["frame", "beat", "ack", "lone ack"]),
        ),
        max_size=30,
    )
)
def test_no_verdict_is_later_than_promised(steps: list[tuple[float, str]]) -> None:
    """Whatever happens: a silent connection is condemned at 55 s, and a check is never due later than that."""
    liveness = Liveness(0.0, PING_S, READ_S, ACK_S)
    now = last_frame = 0.0
    for number, (gap_s, step) in enumerate(steps):
        now += gap_s
        check = liveness.check(now)
        if now - last_frame >= READ_S:
            assert check.verdict is LivenessState.HALF_OPEN
            return
        if check.verdict is LivenessState.STALLED:
            return
        assert 0 < check.next_s <= READ_S - (now - last_frame) + 1e-9
        if step == "beat":
            liveness.heartbeat_sent(f"h{number}", now)
            continue
        liveness.frame(now)
        last_frame = now
        if step != "frame":
            liveness.acked("" if step == "ack" else f"x{number}")


@pytest.mark.parametrize("first_silent_s", [0.0, 24.9])
def test_the_ping_comes_when_the_silence_is_25_s_old(first_silent_s: float) -> None:
    liveness = Liveness(0.0, PING_S, READ_S, ACK_S)
    check = liveness.check(first_silent_s)
    assert check.verdict is LivenessState.ALIVE
    assert check.next_s == pytest.approx(PING_S - first_silent_s)
    assert liveness.check(PING_S).verdict is LivenessState.PING


def test_a_pause_of_our_own_is_not_held_against_the_peer() -> None:
    liveness = Liveness(0, 25, 55, 55)
    liveness.heartbeat_sent("h1", 0)
    liveness.acked("h1")
    liveness.heartbeat_sent("h2", 1)
    liveness.excuse(100)
    assert liveness.check(100) == LivenessCheck(LivenessState.PING, 30)
    assert liveness.check(129).verdict is LivenessState.ALIVE
    assert liveness.check(130).verdict is LivenessState.HALF_OPEN
    liveness.frame(130)
    liveness.excuse(131)
    assert liveness.check(131) == LivenessCheck(LivenessState.ALIVE, 24), (
        "what came in during the pause counts as it is"
    )
    liveness.frame(186)
    assert liveness.check(186).verdict is LivenessState.STALLED


def test_a_controller_that_acknowledged_on_earlier_connections_is_stalled_without_a_first_one_on_this() -> None:
    liveness = Liveness(0, PING_S, READ_S, ACK_S, used_to_ack=True)
    assert (liveness.learnt, liveness.acks_seen) == (None, False)
    liveness.heartbeat_sent("h1", 10)
    liveness.frame(60)
    assert liveness.check(64.9).verdict is LivenessState.ALIVE
    assert liveness.check(65) == LivenessCheck(LivenessState.STALLED, 0)
    assert liveness.learnt is False
    liveness.acked("h1")
    assert liveness.learnt is True


def test_an_acknowledgement_covers_no_later_heartbeat() -> None:
    [(at, verdict)] = watched(living({1.0: beat("h1"), 20.0: beat("h2"), 21.0: ack("h1")}))
    assert (at, verdict) == (20.0 + ACK_S, LivenessState.STALLED)


def test_of_too_many_heartbeats_the_oldest_are_not_awaited() -> None:
    liveness = Liveness(0, PING_S, READ_S, ACK_S, used_to_ack=True)
    liveness.heartbeat_sent("h", 0)
    for number in range(MAX_TRACKED_HEARTBEATS):
        liveness.heartbeat_sent(f"h{number}", 50)
    liveness.frame(50)
    assert liveness.check(ACK_S).verdict is LivenessState.ALIVE


def test_a_reply_to_a_heartbeat_that_is_not_awaited_changes_nothing() -> None:
    liveness = Liveness(0, PING_S, READ_S, ACK_S)
    liveness.answered("unknown")
    assert liveness.check(READ_S) == LivenessCheck(LivenessState.HALF_OPEN, 0)


def test_a_first_acknowledgement_may_come_for_ten_seconds_unless_earlier_connections_tell() -> None:
    unknown, never, always = (Liveness(0, PING_S, READ_S, ACK_S, used_to_ack=each) for each in (None, False, True))
    for liveness in (unknown, never, always):
        assert liveness.may_ack(0) is False, "none is awaited"
        liveness.heartbeat_sent("h1", 100)
        liveness.heartbeat_sent("h2", 105)
    assert [each.may_ack(109.9) for each in (unknown, never, always)] == [True, False, True]
    assert [each.may_ack(110.0) for each in (unknown, never, always)] == [False, False, True]
    assert [each.learnt for each in (unknown, never, always)] == [False, None, None]
    unknown.acked("h1")
    assert unknown.may_ack(500) is True
