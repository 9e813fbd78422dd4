"""How long a poll may be held (docs/reference/protocol.md#13-poll)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.poll_hold import MAX_PROBE_AFTER, PROBE_AFTER, HoldEstimator, PollPacing

MAX_S = 20.0


def answered(hold: HoldEstimator, times: int, max_s: float = MAX_S) -> None:
    for _ in range(times):
        hold.reply_sent(0.0, max_s)


@pytest.mark.parametrize(
    "max_s, seen", [(20.0, [4, 8, 16, 20, 20]), (28.0, [4, 8, 16, 28, 28]), (3.0, [3, 3, 3, 3, 3])]
)
def test_doubles_with_each_answer_up_to_the_maximum(max_s: float, seen: list[float]) -> None:
    hold = HoldEstimator()
    found = []
    for _ in seen:
        found.append(hold.limit_s(max_s))
        answered(hold, 1, max_s)
    assert found == seen


def test_an_agent_that_leaves_first_sets_the_ceiling_below_and_growth_is_slow_from_then_on() -> None:
    hold = HoldEstimator()
    answered(hold, 2)
    assert hold.limit_s(MAX_S) == 16
    hold.agent_disconnected(10.0)
    assert hold.limit_s(MAX_S) == 4.5
    assert hold.ceiling_s == 9
    seen = []
    for _ in range(6):
        answered(hold, 1)
        seen.append(HoldEstimator(hold.stored()).limit_s(MAX_S))
    assert seen == [5.5, 6.5, 7.5, 8.5, 9, 9]


def test_an_agent_that_leaves_at_once_is_not_held_any_more() -> None:
    hold = HoldEstimator()
    hold.agent_disconnected(0.2)
    answered(hold, PROBE_AFTER)
    assert hold.limit_s(MAX_S) == 0


def test_a_ceiling_is_tried_one_second_higher_ever_more_rarely() -> None:
    hold = HoldEstimator()
    hold.agent_disconnected(5.0)  # 4 s at most, and twice as many answers before the first trial
    answered(hold, 2 + 2 * PROBE_AFTER - 1)
    assert hold.limit_s(MAX_S) == 4
    answered(hold, 2)
    assert hold.limit_s(MAX_S) == 5
    for _ in range(20):
        hold.agent_disconnected(5.0)
    answered(hold, 2 + MAX_PROBE_AFTER - 10)
    assert hold.limit_s(MAX_S) == 4
    answered(hold, 20)
    assert hold.limit_s(MAX_S) == 5


def test_a_serial_agent_is_held_less_than_its_heartbeat_interval() -> None:
    hold = HoldEstimator()
    answered(hold, 20)
    hold.heartbeat(5.0)
    assert hold.serial
    assert hold.limit_s(MAX_S) == 4
    # its later intervals contain our holds: they must not loosen the bound
    hold.heartbeat(9.0)
    assert hold.limit_s(MAX_S) == 4


def test_a_heartbeat_during_a_hold_shows_that_the_agent_is_not_serial() -> None:
    hold = HoldEstimator()
    answered(hold, 20)
    hold.heartbeat(5.0)
    hold.poll_arrived(0.0)
    hold.heartbeat(5.0)
    hold.reply_sent(1.0, MAX_S)
    assert not hold.serial
    assert hold.limit_s(MAX_S) == 20


def test_an_agent_that_never_heartbeats_is_not_bound_by_an_interval() -> None:
    hold = HoldEstimator()
    answered(hold, 30)
    assert not hold.serial
    assert hold.limit_s(MAX_S) == 20


def test_a_new_process_may_allow_more_than_its_predecessor() -> None:
    hold = HoldEstimator()
    hold.agent_disconnected(3.0)
    hold.new_process()
    answered(hold, 30)
    assert hold.limit_s(MAX_S) == 20


def test_a_process_that_died_during_a_hold_taught_its_successor_nothing() -> None:
    hold = HoldEstimator()
    answered(hold, 20)
    hold.agent_disconnected(0.5)
    assert hold.limit_s(MAX_S) == 0
    hold.new_process()
    assert hold.limit_s(MAX_S) == 20


def test_an_agent_that_hung_up_and_polls_on_was_impatient() -> None:
    hold = HoldEstimator()
    answered(hold, 20)
    hold.agent_disconnected(5.0)
    answered(hold, 1)
    hold.new_process()
    assert hold.limit_s(MAX_S) == 3


@pytest.mark.parametrize("interval_s, held_s", [(5.0, 4.0), (30.0, 8.0)])
def test_the_first_gap_between_heartbeats_bounds_a_serial_agents_second_hold(interval_s: float, held_s: float) -> None:
    hold = HoldEstimator()
    hold.heartbeat(None)
    answered(hold, 1)
    hold.heartbeat(None, interval_s)
    assert hold.limit_s(MAX_S) == held_s


def test_what_was_learnt_survives_a_restart() -> None:
    hold = HoldEstimator()
    answered(hold, 9)
    hold.heartbeat(5.0)
    hold.agent_disconnected(8.0)
    assert hold.changed
    again = HoldEstimator(hold.stored())
    assert not hold.changed
    assert again.stored() == hold.stored()
    assert again.limit_s(MAX_S) == hold.limit_s(MAX_S) == 3.5


@pytest.mark.parametrize("stored", [{}, {"hold_s": "x", "ceiling_s": [], "probe_after": None}, {"hold_s": -3}])
def test_a_stored_state_that_makes_no_sense_starts_afresh(stored: dict[str, object]) -> None:
    assert HoldEstimator(stored).limit_s(MAX_S) == 4


class Polls:
    """Polls of an agent, played one after the other."""

    def __init__(self, hold: HoldEstimator) -> None:
        self.hold = hold
        self.now = 1000.0

    def held(self, for_s: float, then_s: float = 0.0) -> None:
        """A poll that ends with our reply; the next comes `then_s` after that."""
        self.hold.poll_arrived(self.now)
        self.hold.reply_sent(self.now + for_s, MAX_S)
        self.now += for_s + then_s


def test_two_loops_of_one_rate_are_told_from_a_serial_agent_by_one_longer_hold() -> None:
    hold = HoldEstimator()
    answered(hold, 20)
    polls = Polls(hold)
    hold.heartbeat(5.0)
    assert hold.limit_s(MAX_S) == 4
    polls.held(4.0, 1.0)  # the heartbeat comes just before each poll, never during it
    hold.heartbeat(5.0)
    assert hold.limit_s(MAX_S) == 6
    hold.poll_arrived(polls.now)
    hold.heartbeat(5.0)
    hold.reply_sent(polls.now + 6, MAX_S)
    assert hold.limit_s(MAX_S) == 20


def test_a_serial_agent_is_held_longer_once_and_never_again() -> None:
    hold = HoldEstimator()
    answered(hold, 20)
    polls = Polls(hold)
    hold.heartbeat(5.0)
    polls.held(4.0, 1.0)
    polls.held(2.0, 1.0)  # a command came: nothing was learnt
    assert hold.limit_s(MAX_S) == 6
    polls.held(6.0, 1.0)
    for _ in range(5):
        assert HoldEstimator(hold.stored()).limit_s(MAX_S) == hold.limit_s(MAX_S) == 4
        polls.held(4.0, 1.0)
    hold.new_process()
    assert hold.limit_s(MAX_S) == 4  # and what it is will be found out again
    polls.held(4.0, 1.0)
    assert hold.limit_s(MAX_S) == 6


HOLDS_S = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def ticker(polls: Polls, interval_s: float, holds_s: list[float]) -> PollPacing:
    for held_s in holds_s:
        polls.held(held_s, interval_s - held_s)
    return polls.hold.pace


def pauser(polls: Polls, pause_s: float, holds_s: list[float]) -> PollPacing:
    for held_s in holds_s:
        polls.held(held_s, pause_s)
    return polls.hold.pace


def test_tells_a_ticker_from_a_pause() -> None:
    ticking, pausing = HoldEstimator(), HoldEstimator()
    assert ticker(Polls(ticking), 10.0, HOLDS_S) is PollPacing.TICKER
    assert ticking.interval_s == pytest.approx(10)
    assert pauser(Polls(pausing), 10.0, HOLDS_S) is PollPacing.PAUSE
    assert pausing.interval_s == pytest.approx(10)


def test_an_agent_that_comes_back_at_once_ticks_faster_than_it_is_answered() -> None:
    assert pauser(Polls(HoldEstimator()), 0.01, HOLDS_S[4:]) is PollPacing.TICKER


def test_the_pace_is_unknown_while_little_was_seen_or_nothing_tells_the_two_apart() -> None:
    assert ticker(Polls(HoldEstimator()), 10.0, [0.0, 1.0]) is PollPacing.UNKNOWN
    assert ticker(Polls(HoldEstimator()), 10.0, [1.0] * 9) is PollPacing.UNKNOWN
    assert HoldEstimator().interval_s is None


def test_tiny_differences_between_equal_holds_tell_nothing() -> None:
    holds_s = [1.0, 1.02, 0.99, 1.03, 1.01, 0.98, 1.0, 1.01, 1.02]
    assert ticker(Polls(HoldEstimator()), 10.0, holds_s) is PollPacing.UNKNOWN
    assert pauser(Polls(HoldEstimator()), 10.0, holds_s) is PollPacing.UNKNOWN


def test_a_pace_once_seen_is_kept_when_all_polls_are_held_equally_long_and_over_a_restart() -> None:
    hold = HoldEstimator()
    polls = Polls(hold)
    ticker(polls, 30.0, HOLDS_S)
    assert ticker(polls, 30.0, [20.0, 20.01, 19.99] * 9) is PollPacing.TICKER
    assert hold.changed
    assert HoldEstimator(hold.stored()).pace is PollPacing.TICKER
    assert pauser(polls, 5.0, [*HOLDS_S, *HOLDS_S]) is PollPacing.PAUSE  # it may change, too


def test_a_pace_is_news_once() -> None:
    hold = HoldEstimator()
    news = []
    now = 0.0
    for held_s in HOLDS_S:
        news.append(hold.poll_arrived(now))
        hold.reply_sent(now + held_s, MAX_S)
        now += 10.0
    assert news.count(True) == 1


def test_a_poll_that_overtakes_another_leaves_no_pause_between_them() -> None:
    hold = HoldEstimator()
    for n in range(12):
        hold.poll_arrived(float(n))
        if n:
            hold.reply_sent(float(n), MAX_S)  # the older one is answered when the newer arrives
    assert hold.pace is PollPacing.UNKNOWN
    assert not hold.serial
    hold.heartbeat(5.0)
    assert HoldEstimator(hold.stored()).stored()["concurrent"] is True


@given(
    st.lists(
        st.one_of(
            st.just(("replied", 0.0)),
            st.just(("restarted", 0.0)),
            st.tuples(st.just("left"), st.floats(0, 40)),
            st.tuples(st.sampled_from(["beat", "beat_held"]), st.floats(0.1, 60)),
        ),
        max_size=60,
    ),
    st.floats(0, 25),
)
def test_never_above_any_bound(events: list[tuple[str, float]], max_s: float) -> None:
    hold = HoldEstimator()
    assert hold.changed is False
    stored = hold.stored()
    for kind, value in events:
        match kind:
            case "replied":
                hold.reply_sent(0.0, max_s)
            case "restarted":
                hold.new_process()
            case "left":
                hold.agent_disconnected(value)
                assert hold.limit_s(max_s) <= max(0.0, value - 1)
            case _:
                if kind == "beat_held":
                    hold.poll_arrived(0.0)
                hold.heartbeat(value)
                hold.connection_lost()
        assert 0 <= hold.limit_s(max_s) <= max_s
        changed, before = hold.changed, stored
        stored = hold.stored()
        assert changed is True or (changed is False and stored == before), "what is learnt is marked for the disk"
        assert hold.changed is False
        restored = HoldEstimator(stored)
        assert restored.limit_s(max_s) == hold.limit_s(max_s)


def test_a_ceiling_is_tried_higher_after_a_fixed_number_of_replies_at_it() -> None:
    hold = HoldEstimator()
    hold.agent_disconnected(5.0)
    answered(hold, 2)  # up to the ceiling
    for ceiling_s in (4, 5):
        answered(hold, 2 * PROBE_AFTER - 1)
        assert hold.limit_s(MAX_S) == ceiling_s
        hold.stored()
        answered(hold, 1)
        assert hold.limit_s(MAX_S) == ceiling_s + 1
        assert hold.changed is True


def test_a_ceiling_at_the_maximum_is_not_raised() -> None:
    hold = HoldEstimator()
    hold.agent_disconnected(MAX_S + 1)
    answered(hold, 10 * PROBE_AFTER)
    assert hold.ceiling_s == MAX_S


def test_a_new_process_begins_at_the_hold_that_the_previous_one_allowed_and_counts_anew() -> None:
    hold = HoldEstimator()
    hold.agent_disconnected(5.0)
    answered(hold, 20)
    hold.stored()
    hold.new_process()
    assert hold.changed is True
    assert hold.limit_s(MAX_S) == 4
    hold.agent_disconnected(5.0)
    answered(hold, 2 + 2 * PROBE_AFTER - 1)
    assert hold.limit_s(MAX_S) == 4
    answered(hold, 1)
    assert hold.limit_s(MAX_S) == 5


def test_an_agent_that_leaves_at_once_lets_the_hold_grow_for_no_successor() -> None:
    hold = HoldEstimator()
    hold.agent_disconnected(0.2)
    answered(hold, 1)
    assert hold.held_s == 0


def test_only_a_shorter_interval_is_written_to_disk() -> None:
    hold = HoldEstimator()
    hold.heartbeat(5.0)
    assert hold.changed is True
    hold.stored()
    for interval_s in (5.0, 6.0):
        hold.heartbeat(interval_s)
        assert hold.changed is False


def test_that_an_agent_is_serial_is_known_after_a_restart() -> None:
    hold = HoldEstimator()
    polls = Polls(hold)
    hold.heartbeat(5.0)
    polls.held(4.0, 1.0)  # as long as a serial agent may be held
    assert hold.limit_s(MAX_S) == 6
    polls.held(5.0, 1.0)  # as long as the interval: no heartbeat came
    restored = HoldEstimator(hold.stored())
    polls = Polls(restored)
    for _ in range(3):
        assert restored.limit_s(MAX_S) == 4
        polls.held(4.0, 1.0)


def test_a_parallel_agent_is_never_taken_as_serial_and_neither_is_learnt_twice() -> None:
    parallel, serial = HoldEstimator(), HoldEstimator()
    parallel.poll_arrived(0.0)
    for hold in (parallel, serial):
        hold.heartbeat(5.0)
        hold.reply_sent(1.0, MAX_S)
        answered(hold, 9)
        Polls(hold).held(MAX_S)
    assert (parallel.stored()["serial"], serial.stored()["serial"]) == (False, True)
    Polls(serial).held(MAX_S)
    assert serial.changed is False


def test_polls_without_any_pause_and_hold_are_judged_too() -> None:
    assert pauser(Polls(HoldEstimator()), 0.0, [0.25] * 9) is PollPacing.TICKER
    assert pauser(Polls(HoldEstimator()), 0.0, [0.1] * 9) is PollPacing.UNKNOWN
    assert pauser(Polls(HoldEstimator()), 0.0, [0.05, 0.1, 0.15, 0.2] * 3) is PollPacing.PAUSE
