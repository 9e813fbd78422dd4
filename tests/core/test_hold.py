"""How long a poll may be held (protocol.md §1.3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.hold import MAX_PROBE_AFTER, PROBE_AFTER, Hold, Pace

MAX_S = 20.0


def answered(hold: Hold, times: int, max_s: float = MAX_S) -> None:
    for _ in range(times):
        hold.replied(0.0, max_s)


def test_grows_by_a_second_with_each_answer_up_to_the_maximum() -> None:
    hold = Hold()
    seen = []
    for _ in range(25):
        seen.append(hold.limit_s(MAX_S))
        answered(hold, 1)
    assert seen == [float(min(n, 20)) for n in range(1, 26)]


def test_an_agent_that_leaves_first_halves_it_and_sets_the_ceiling_below() -> None:
    hold = Hold()
    answered(hold, 15)
    assert hold.limit_s(MAX_S) == 16
    hold.left(10.0)
    assert hold.limit_s(MAX_S) == 8
    assert hold.ceiling_s == 9
    answered(hold, 5)
    assert hold.limit_s(MAX_S) == 9


def test_an_agent_that_leaves_at_once_is_not_held_any_more() -> None:
    hold = Hold()
    hold.left(0.2)
    answered(hold, PROBE_AFTER)
    assert hold.limit_s(MAX_S) == 0


def test_a_ceiling_is_tried_one_second_higher_ever_more_rarely() -> None:
    hold = Hold()
    hold.left(5.0)  # 4 s at most, and twice as many answers before the first trial
    answered(hold, 4 + 2 * PROBE_AFTER - 1)
    assert hold.limit_s(MAX_S) == 4
    answered(hold, 2)
    assert hold.limit_s(MAX_S) == 5
    for _ in range(20):
        hold.left(5.0)
    answered(hold, 5 + MAX_PROBE_AFTER - 10)
    assert hold.limit_s(MAX_S) == 4
    answered(hold, 20)
    assert hold.limit_s(MAX_S) == 5


def test_a_serial_agent_is_held_less_than_its_heartbeat_interval() -> None:
    hold = Hold()
    answered(hold, 20)
    hold.heartbeat(5.0, during_hold=False)
    assert hold.serial
    assert hold.limit_s(MAX_S) == 4
    # its later intervals contain our holds: they must not loosen the bound
    hold.heartbeat(9.0, during_hold=False)
    assert hold.limit_s(MAX_S) == 4


def test_a_heartbeat_during_a_hold_shows_that_the_agent_is_not_serial() -> None:
    hold = Hold()
    answered(hold, 20)
    hold.heartbeat(5.0, during_hold=False)
    hold.heartbeat(5.0, during_hold=True)
    assert not hold.serial
    assert hold.limit_s(MAX_S) == 20


def test_an_agent_that_never_heartbeats_is_not_bound_by_an_interval() -> None:
    hold = Hold()
    answered(hold, 30)
    assert not hold.serial
    assert hold.limit_s(MAX_S) == 20


def test_a_new_process_may_allow_more_than_its_predecessor() -> None:
    hold = Hold()
    hold.left(3.0)
    hold.new_process()
    answered(hold, 30)
    assert hold.limit_s(MAX_S) == 20


def test_what_was_learnt_survives_a_restart() -> None:
    hold = Hold()
    answered(hold, 9)
    hold.heartbeat(5.0, during_hold=False)
    hold.left(8.0)
    assert hold.changed
    again = Hold(hold.stored())
    assert not hold.changed
    assert again.stored() == hold.stored()
    assert again.limit_s(MAX_S) == hold.limit_s(MAX_S) == 4


@pytest.mark.parametrize("stored", [{}, {"hold_s": "x", "ceiling_s": [], "probe_after": None}, {"hold_s": -3}])
def test_a_stored_state_that_makes_no_sense_starts_afresh(stored: dict[str, object]) -> None:
    assert Hold(stored).limit_s(MAX_S) == 1


def play(hold: Hold, arrivals: list[tuple[float, float]]) -> Pace:
    """Polls as (arrival, answer) times."""
    for arrived, at in arrivals:
        hold.poll_arrived(arrived)
        hold.replied(at, MAX_S)
    return hold.pace


def test_tells_a_ticker_from_a_pause() -> None:
    holds = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert play(Hold(), [(10.0 * n, 10.0 * n + held) for n, held in enumerate(holds)]) is Pace.TICKER
    now, paused = 0.0, []
    for held in holds:
        paused.append((now, now + held))
        now += held + 10.0
    assert play(Hold(), paused) is Pace.PAUSE


def test_an_agent_that_comes_back_at_once_ticks_faster_than_it_is_answered() -> None:
    now, polls = 0.0, []
    for held in (5.0, 6.0, 7.0, 8.0, 9.0, 10.0):
        polls.append((now, now + held))
        now += held + 0.01
    assert play(Hold(), polls) is Pace.TICKER


def test_the_pace_is_unknown_while_little_was_seen_or_nothing_tells_the_two_apart() -> None:
    assert play(Hold(), [(0.0, 1.0), (10.0, 11.0)]) is Pace.UNKNOWN
    assert play(Hold(), [(10.0 * n, 10.0 * n + 1.0) for n in range(9)]) is Pace.UNKNOWN


@given(
    st.lists(
        st.one_of(
            st.just(("replied", 0.0)),
            st.tuples(st.just("left"), st.floats(0, 40)),
            st.tuples(st.sampled_from(["beat", "beat_held"]), st.floats(0.1, 60)),
        ),
        max_size=60,
    ),
    st.floats(0, 25),
)
def test_never_above_any_bound(events: list[tuple[str, float]], max_s: float) -> None:
    hold = Hold()
    for kind, value in events:
        match kind:
            case "replied":
                hold.replied(0.0, max_s)
            case "left":
                hold.left(value)
                assert hold.limit_s(max_s) <= max(0.0, value - 1)
            case _:
                hold.heartbeat(value, during_hold=kind == "beat_held")
        assert 0 <= hold.limit_s(max_s) <= max_s
        restored = Hold(hold.stored())
        assert restored.limit_s(max_s) == hold.limit_s(max_s)
