"""The life of a link: every cell of the table, and the stories that run through it.

Rules: docs/reference/protocol.md#21-link-life.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from shim.core import link_state as ev
from shim.core.backoff import Backoff, BackoffPolicy
from shim.core.link_state import CONTENDED_WITHIN_S, TRANSITIONS, LinkState, LinkStateMachine, PhaseKind, phase_of
from shim.errors import IllegalTransition

S = LinkState
HEADER, QUERY, BOTH = ev.Dial(True, False), ev.Dial(False, True), ev.Dial(True, True)

# What each event does to the state alone, wherever it is allowed.
EXPECTED: dict[type, dict[LinkState, LinkState]] = {
    ev.AgentCalled: {S.IDLE: S.OPENING},
    ev.RetryNow: {S.IDLE: S.OPENING, S.WAITING: S.OPENING},
    ev.Opened: {S.OPENING: S.REPLAYING},
    ev.DialFailed: {S.OPENING: S.WAITING},
    ev.Replayed: {S.REPLAYING: S.ONLINE},
    ev.Registered: {S.REPLAYING: S.REPLAYING, S.ONLINE: S.ONLINE},
    ev.Acknowledged: {S.REPLAYING: S.REPLAYING, S.ONLINE: S.ONLINE},
    ev.StableTimerFired: {S.REPLAYING: S.REPLAYING, S.ONLINE: S.ONLINE},
    ev.Lost: {S.REPLAYING: S.WAITING, S.ONLINE: S.WAITING},
    ev.WatchdogFailed: {S.REPLAYING: S.WAITING, S.ONLINE: S.WAITING},
    ev.RetryDue: {S.WAITING: S.OPENING},
    ev.TokenChanged: {S.OPENING: S.OPENING, S.REPLAYING: S.OPENING, S.ONLINE: S.OPENING, S.WAITING: S.OPENING},
    ev.IdleTimeout: {S.OPENING: S.IDLE, S.REPLAYING: S.IDLE, S.ONLINE: S.IDLE, S.WAITING: S.IDLE},
    ev.Stop: dict.fromkeys(S, S.STOPPED),
}
# In every other state these are allowed and change nothing; the rest is forbidden there.
ANYWHERE = {ev.AgentCalled, ev.RetryNow, ev.TokenChanged, ev.IdleTimeout, ev.Stop}


def link(*, own_token: bool = False, auth: Any = "auto", rng: float = 0.5) -> LinkStateMachine:
    return LinkStateMachine(auth, Backoff(BackoffPolicy(), lambda: rng), own_token=own_token)


def in_state(state: LinkState, **fields: Any) -> LinkStateMachine:
    machine = link(**fields)
    path: dict[LinkState, list[ev.LinkEvent]] = {
        S.IDLE: [],
        S.OPENING: [ev.AgentCalled()],
        S.REPLAYING: [ev.AgentCalled(), ev.Opened()],
        S.ONLINE: [ev.AgentCalled(), ev.Opened(), ev.Replayed()],
        S.WAITING: [ev.AgentCalled(), ev.DialFailed()],
        S.STOPPED: [ev.Stop()],
    }
    for event in path[state]:
        machine.handle(event, 0.0)
    assert machine.state is state
    return machine


def insides(machine: LinkStateMachine) -> dict[str, Any]:
    return {name: value for name, value in vars(machine).items() if not name.startswith(("_policy", "_backoff"))}


@pytest.mark.parametrize("event_type", ev.EVENT_TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("state", S, ids=lambda s: s.name)
def test_every_cell(state: LinkState, event_type: type) -> None:
    machine = in_state(state)
    before = deepcopy(insides(machine)), machine.failures
    event = event_type()
    if state in EXPECTED[event_type]:
        machine.handle(event, 10.0)
        assert machine.state is EXPECTED[event_type][state]
    elif event_type in ANYWHERE:
        assert machine.handle(event, 10.0) == []
        assert machine.state is state
    else:
        with pytest.raises(IllegalTransition, match=f"{event_type.__name__} in {state.name}"):
            machine.handle(event, 10.0)
        assert (insides(machine), machine.failures) == before
    assert ((state, event_type) in TRANSITIONS) == (state in EXPECTED[event_type] or event_type in ANYWHERE)


def test_the_way_up_and_down() -> None:
    machine = link()
    assert machine.handle(ev.AgentCalled(), 0) == [HEADER]
    assert machine.handle(ev.Opened(), 1) == [ev.StartReplay()]
    assert machine.connected
    assert machine.handle(ev.Replayed(), 2) == [ev.Online()]
    assert machine.handle(ev.Lost(), 60) == [ev.Offline(), ev.StartRetryTimer(0.5)]
    assert not machine.connected
    assert machine.handle(ev.RetryDue(), 61) == [HEADER]
    assert machine.handle(ev.Opened(), 62) == [ev.StartReplay()]
    assert machine.handle(ev.WatchdogFailed(), 63) == [ev.CloseSocket(0), ev.Offline(), ev.StartRetryTimer(1.0)]


@pytest.mark.parametrize(
    "state, effects",
    [
        (S.IDLE, []),
        (S.OPENING, [ev.CancelDial()]),
        (S.REPLAYING, [ev.CloseSocket(1000), ev.Offline()]),
        (S.ONLINE, [ev.CloseSocket(1000), ev.Offline()]),
        (S.WAITING, [ev.CancelRetryTimer()]),
        (S.STOPPED, []),
    ],
)
def test_stopping_undoes_what_is_under_way(state: LinkState, effects: list[ev.LinkEffect]) -> None:
    assert in_state(state).handle(ev.Stop(), 1) == effects
    unneeded = in_state(state)
    assert unneeded.handle(ev.IdleTimeout(), 1) == effects


# --- authentication ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth, dial", [("header", HEADER), ("query", QUERY), ("both", BOTH)])
def test_a_forced_way_is_the_only_one(auth: str, dial: ev.Dial) -> None:
    machine = link(auth=auth)
    assert machine.handle(ev.AgentCalled(), 0) == [dial]
    assert machine.handle(ev.DialFailed(401), 0) == [ev.AuthRejected(), ev.StartRetryTimer(0.5)]
    assert machine.refused


@pytest.mark.parametrize("status", [401, 403])
def test_auto_tries_the_query_once_and_remembers_what_worked(status: int) -> None:
    machine = link()
    assert machine.handle(ev.AgentCalled(), 0) == [HEADER]
    assert machine.handle(ev.DialFailed(status), 0) == [QUERY]
    assert machine.state is S.OPENING
    machine.handle(ev.Opened(), 0)
    machine.handle(ev.Lost(), 50)
    assert machine.handle(ev.RetryDue(), 55) == [QUERY]
    assert machine.handle(ev.DialFailed(status), 55) == [HEADER]
    machine.handle(ev.Opened(), 56)
    machine.handle(ev.Lost(), 90)
    assert machine.handle(ev.RetryDue(), 91) == [HEADER]


def test_auto_is_refused_when_both_ways_are() -> None:
    machine = link()
    machine.handle(ev.AgentCalled(), 0)
    machine.handle(ev.DialFailed(401), 0)
    assert not machine.refused
    assert machine.handle(ev.DialFailed(403), 0) == [ev.AuthRejected(), ev.StartRetryTimer(0.5)]
    assert machine.refused
    assert machine.handle(ev.RetryDue(), 1) == [HEADER]
    assert machine.refused, "until the controller has accepted the token, its last word counts"
    machine.handle(ev.Opened(), 2)
    assert not machine.refused


def test_a_network_failure_of_the_other_way_is_no_refusal() -> None:
    machine = link()
    machine.handle(ev.AgentCalled(), 0)
    machine.handle(ev.DialFailed(401), 0)
    assert machine.handle(ev.DialFailed(0), 0) == [ev.StartRetryTimer(0.5)]
    assert not machine.refused
    assert machine.handle(ev.RetryDue(), 1) == [HEADER]


@pytest.mark.parametrize("state", [S.IDLE, S.OPENING, S.WAITING])
def test_a_new_token_is_not_judged_by_the_old_ones_refusal(state: LinkState) -> None:
    machine = link(auth="header")
    machine.handle(ev.AgentCalled(), 0)
    machine.handle(ev.DialFailed(401, 200.0), 0)
    if state is S.OPENING:
        machine.handle(ev.RetryDue(), 300)
    elif state is S.IDLE:
        machine.handle(ev.IdleTimeout(), 1)
    effects = machine.handle(ev.TokenChanged(), 2)
    assert not machine.refused
    if state is S.IDLE:
        effects = machine.handle(ev.AgentCalled(), 3)
    assert effects[-1] == HEADER, "and it is tried at once, whatever was asked for the old one"


# --- refusals and Retry-After -----------------------------------------------------------------------------------------


def waiting_after(machine: LinkStateMachine, event: ev.DialFailed, now: float = 0.0) -> float:
    machine.handle(ev.AgentCalled(), now)
    effect = machine.handle(event, now)[-1]
    assert isinstance(effect, ev.StartRetryTimer)
    return effect.delay_s


def test_hurry_cuts_a_backoff_short_at_most_every_five_seconds() -> None:
    machine = link(rng=0.999)
    assert waiting_after(machine, ev.DialFailed()) > 0.9
    assert machine.handle(ev.RetryNow(), 0.5) == [ev.CancelRetryTimer(), HEADER]
    machine.handle(ev.DialFailed(), 0.5)
    assert machine.handle(ev.RetryNow(), 5.4) == []
    assert machine.state is S.WAITING
    assert machine.handle(ev.RetryNow(), 5.5) == [ev.CancelRetryTimer(), HEADER]


def test_hurry_never_goes_against_retry_after() -> None:
    machine = link()
    delay_s = waiting_after(machine, ev.DialFailed(429, 30))
    assert machine.handle(ev.RetryNow(), delay_s - 0.1) == []
    assert machine.handle(ev.RetryNow(), delay_s + 0.1) == [ev.CancelRetryTimer(), HEADER]
    machine.handle(ev.DialFailed(), 40)
    assert machine.handle(ev.RetryNow(), 40 + delay_s) == [ev.CancelRetryTimer(), HEADER], (
        "a plain failure imposes nothing"
    )


def test_a_link_that_was_not_needed_meanwhile_keeps_to_retry_after_as_well() -> None:
    machine = link()
    delay_s = waiting_after(machine, ev.DialFailed(503, 300))
    machine.handle(ev.IdleTimeout(), 90)
    assert machine.handle(ev.AgentCalled(), 100) == [ev.StartRetryTimer(delay_s - 100)]
    assert machine.state is S.WAITING
    machine.handle(ev.IdleTimeout(), 200)
    assert machine.handle(ev.AgentCalled(), delay_s - 0.25) == [ev.StartRetryTimer(0.25)]
    assert machine.handle(ev.RetryDue(), delay_s) == [HEADER]


def test_a_404_after_a_working_link_is_a_redeployment() -> None:
    machine = in_state(S.ONLINE, rng=0.999)
    machine.handle(ev.StableTimerFired(), 30)
    machine.handle(ev.Lost(), 100)
    delays = []
    for _ in range(10):
        machine.handle(ev.RetryDue(), 110)
        delays.append(machine.handle(ev.DialFailed(404), 110)[-1].delay_s)  # type: ignore[union-attr]
    assert max(delays) < 5
    machine.handle(ev.RetryDue(), 700)
    assert machine.handle(ev.DialFailed(404), 701)[-1].delay_s > 5  # type: ignore[union-attr]


def test_a_refused_configured_token_is_tried_for_ever_with_a_growing_pace() -> None:
    machine = link(auth="header", rng=0.999)
    machine.handle(ev.AgentCalled(), 0)
    delays = []
    for _ in range(12):
        delays.append(machine.handle(ev.DialFailed(401), 0)[-1].delay_s)  # type: ignore[union-attr]
        machine.handle(ev.RetryDue(), 0)
    assert delays[:6] == pytest.approx([0.999 * 2**n for n in range(6)])
    assert delays[-1] == pytest.approx(0.999 * 60)


def test_an_own_token_that_was_never_accepted_is_dialled_once_a_minute() -> None:
    machine = link(own_token=True)
    machine.handle(ev.AgentCalled(), 0)
    assert machine.handle(ev.DialFailed(401), 0) == [QUERY]
    refusal, retry = machine.handle(ev.DialFailed(401), 0)
    assert refusal == ev.AuthRejected()
    assert isinstance(retry, ev.StartRetryTimer)
    assert 60 <= retry.delay_s <= 66
    assert machine.handle(ev.RetryNow(), 50) == [], "not even a registration makes it faster"
    machine.handle(ev.RetryDue(), 61)
    machine.handle(ev.DialFailed(401), 61)
    assert machine.handle(ev.DialFailed(401, 200), 61)[-1].delay_s >= 200  # type: ignore[union-attr]


def test_an_own_token_that_was_accepted_before_backs_off_like_any_other() -> None:
    machine = in_state(S.ONLINE, own_token=True, auth="header")
    machine.handle(ev.Acknowledged(), 5)
    machine.handle(ev.Lost(), 10)
    machine.handle(ev.RetryDue(), 11)
    assert machine.handle(ev.DialFailed(401), 11)[-1] == ev.StartRetryTimer(1.0)


# --- earned resets and contention -------------------------------------------------------------------------------------


def test_a_fresh_backoff_must_be_earned() -> None:
    machine = in_state(S.ONLINE, rng=0.999)
    for _ in range(10):
        machine.handle(ev.Lost(), 1)
        machine.handle(ev.RetryDue(), 1)
        machine.handle(ev.Opened(), 1)
        machine.handle(ev.Replayed(), 1)
    assert machine.failures == 10
    assert machine.handle(ev.Lost(), 1)[-1] == ev.StartRetryTimer(0.999 * 5), "accepting and closing earns nothing"
    machine.handle(ev.RetryDue(), 1)
    machine.handle(ev.Opened(), 1)
    machine.handle(ev.StableTimerFired(), 31)
    assert machine.handle(ev.Lost(), 40)[-1] == ev.StartRetryTimer(0.999)


def short_life(
    machine: LinkStateMachine, now: float, *, registered: bool = True, by_close_frame: bool = True, code: int = 1000
) -> list[Any]:
    if machine.state is S.IDLE:
        machine.handle(ev.AgentCalled(), now)
    elif machine.state is S.WAITING:
        machine.handle(ev.RetryDue(), now)
    machine.handle(ev.Opened(), now)
    if registered:
        machine.handle(ev.Registered(), now)
    machine.handle(ev.Replayed(), now)
    return machine.handle(ev.Lost(by_close_frame, code), now + 29)


def test_three_short_lives_after_registering_are_contention() -> None:
    machine = link()
    short_life(machine, 0)
    short_life(machine, 100)
    assert not machine.contended
    retry = short_life(machine, 200)[-1]
    assert machine.contended
    assert 60 <= retry.delay_s <= 66
    assert machine.handle(ev.RetryNow(), 240) == []
    machine.handle(ev.RetryDue(), 300)
    assert machine.handle(ev.DialFailed(503, 120), 300)[-1].delay_s >= 120
    machine.handle(ev.RetryDue(), 500)
    machine.handle(ev.Opened(), 500)
    machine.handle(ev.StableTimerFired(), 530)
    assert not machine.contended
    assert machine.handle(ev.Lost(by_close_frame=True), 540)[-1].delay_s < 1


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013, 1014, 3008, 4408, 4500, 4503])
def test_a_restarting_or_busy_controller_is_dialled_again_soon_and_is_no_contention(code: int) -> None:
    machine = link(rng=0.999)
    delays = [short_life(machine, 100.0 * round_, code=code)[-1].delay_s for round_ in range(6)]
    assert not machine.contended
    assert not machine.refused
    assert max(delays) < 5


@pytest.mark.parametrize("code", [0, 1000, 3001, 4000, 4001, 4409, 4999])
def test_any_other_close_soon_after_registering_may_be_contention(code: int) -> None:
    machine = link()
    for round_ in range(3):
        short_life(machine, 100.0 * round_, code=code)
    assert machine.contended
    assert not machine.refused


@pytest.mark.parametrize("code", [1002, 1003, 1007, 1009, 1010, 4429])
def test_a_controller_that_cannot_use_what_we_send_is_dialled_more_and_more_rarely(code: int) -> None:
    machine = link(rng=0.999)
    delays = [short_life(machine, 100.0 * round_, code=code)[-1].delay_s for round_ in range(7)]
    assert not machine.contended
    assert not machine.refused
    assert delays == pytest.approx([0.999 * min(60, 2**n) for n in range(7)])


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("code", [1008, 3000, 3003, 4401, 4403])
def test_a_close_code_that_refuses_counts_as_a_refusal(code: int, registered: bool) -> None:
    machine = link(auth="header", rng=0.999)
    effects = []
    for round_ in range(7):
        effects = short_life(machine, 100.0 * round_, registered=registered, code=code)
        assert machine.refused
        assert ev.AuthRejected() in effects
    assert not machine.contended
    assert effects[-1] == ev.StartRetryTimer(pytest.approx(0.999 * 60)), "the cap of refusals, not of losses"
    machine.handle(ev.RetryDue(), 800)
    machine.handle(ev.Opened(), 800)
    machine.handle(ev.Replayed(), 800)
    assert machine.refused, "the handshake proves nothing to a controller that looks at the token behind it"
    machine.handle(ev.Registered(), 801)
    assert not machine.refused


def test_a_token_refused_behind_the_handshake_is_presented_the_other_way_at_the_next_dial() -> None:
    machine = link()
    assert machine.handle(ev.AgentCalled(), 0) == [HEADER]
    machine.handle(ev.Opened(), 0)
    machine.handle(ev.Lost(True, 4401), 0)
    assert machine.handle(ev.RetryDue(), 1) == [QUERY]
    machine.handle(ev.Opened(), 1)
    machine.handle(ev.Registered(), 1)
    machine.handle(ev.Lost(True, 4401), 40)
    assert machine.handle(ev.RetryDue(), 41) == [QUERY], "what worked is kept"


def test_an_own_token_that_is_always_refused_behind_the_handshake_is_dialled_once_a_minute() -> None:
    machine = link(own_token=True)
    for round_ in range(3):
        retry = short_life(machine, 100.0 * round_, registered=False, code=4401)[-1]
        assert 60 <= retry.delay_s <= 66
        assert machine.handle(ev.RetryNow(), 100.0 * round_ + 50) == []


@pytest.mark.parametrize("other", [{"registered": False}, {"by_close_frame": False}])
def test_other_short_lives_are_not(other: dict[str, bool]) -> None:
    machine = link()
    for round_ in range(3):
        short_life(machine, 100.0 * round_)
        short_life(machine, 100.0 * round_ + 50, **other)
    assert not machine.contended


def test_a_register_on_an_earlier_connection_does_not_count() -> None:
    machine = link()
    for round_ in range(4):
        short_life(machine, 10.0 * round_, registered=round_ == 0)
    assert not machine.contended


# --- what mutants survived --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [ev.Registered(), ev.Acknowledged(), ev.StableTimerFired()])
def test_an_own_token_is_accepted_at_the_first_sign_of_it(event: ev.LinkEvent) -> None:
    machine = in_state(S.ONLINE, own_token=True)
    assert machine.accepted_at is None
    assert machine.handle(event, 5.0) == [ev.TokenAccepted()]
    assert machine.handle(event, 6.0) == []
    assert machine.accepted_at == 5.0


def test_a_configured_token_is_accepted_with_the_handshake() -> None:
    machine = link()
    machine.handle(ev.AgentCalled(), 1.0)
    machine.handle(ev.Opened(), 2.0)
    assert machine.accepted_at == 2.0


def test_short_lives_are_counted_anew_after_a_stable_or_a_long_one() -> None:
    machine = link()
    for round_ in range(2):
        short_life(machine, 100.0 * round_)
    machine.handle(ev.RetryDue(), 300)
    machine.handle(ev.Opened(), 300)
    machine.handle(ev.StableTimerFired(), 330)
    machine.handle(ev.Lost(), 340)
    for round_ in range(4, 6):
        short_life(machine, 100.0 * round_)
    assert not machine.contended
    machine.handle(ev.RetryDue(), 600)
    machine.handle(ev.Opened(), 600)
    machine.handle(ev.Registered(), 600)
    machine.handle(ev.Lost(True, 1000), 600 + CONTENDED_WITHIN_S)
    for round_ in range(7, 9):
        short_life(machine, 100.0 * round_)
    assert not machine.contended


@pytest.mark.parametrize("event", [ev.TokenChanged(), ev.IdleTimeout()])
def test_a_404_after_an_open_link_was_closed_on_purpose_is_a_redeployment(event: ev.LinkEvent) -> None:
    machine = in_state(S.ONLINE, rng=0.999)
    machine.handle(event, 100)
    machine.handle(ev.AgentCalled(), 101)
    for _ in range(10):
        [*_, retry] = machine.handle(ev.DialFailed(404), 110)
        machine.handle(ev.RetryDue(), 110)
    assert isinstance(retry, ev.StartRetryTimer)
    assert retry.delay_s < 5


def test_a_new_token_of_an_open_link_is_not_refused_yet() -> None:
    machine = in_state(S.ONLINE)
    machine.refused = machine.closed_as_refused = True
    machine.handle(ev.TokenChanged(), 1)
    assert (machine.refused, machine.closed_as_refused) == (False, False)


def test_a_404_after_a_half_open_link_was_dropped_is_a_redeployment() -> None:
    machine = in_state(S.REPLAYING, rng=0.999)
    machine.handle(ev.Registered(), 9990)
    machine.handle(ev.WatchdogFailed(), 10_000)
    for _ in range(10):
        machine.handle(ev.RetryDue(), 10_010)
        [*_, retry] = machine.handle(ev.DialFailed(404), 10_010)
    assert isinstance(retry, ev.StartRetryTimer)
    assert retry.delay_s < 5


@pytest.mark.parametrize("state", [S.OPENING, S.WAITING])
def test_a_refused_link_that_is_not_needed_is_judged_by_its_next_dial(state: LinkState) -> None:
    machine = in_state(S.ONLINE)
    machine.handle(ev.Lost(True, 1008), 1)
    assert phase_of(machine) is PhaseKind.REFUSED
    if state is S.OPENING:
        machine.handle(ev.RetryDue(), 2)
    machine.handle(ev.IdleTimeout(), 3)
    assert phase_of(machine) is PhaseKind.IDLE
    machine.handle(ev.AgentCalled(), 4)
    assert phase_of(machine) is PhaseKind.DOWN
    machine.handle(ev.Opened(), 5)
    machine.handle(ev.Replayed(), 5)
    assert phase_of(machine) is PhaseKind.UP


@pytest.mark.parametrize(
    "state, phase",
    [
        (S.IDLE, PhaseKind.IDLE),
        (S.OPENING, PhaseKind.DOWN),
        (S.REPLAYING, PhaseKind.DOWN),
        (S.ONLINE, PhaseKind.UP),
        (S.WAITING, PhaseKind.DOWN),
        (S.STOPPED, PhaseKind.IDLE),
    ],
)
def test_the_phase_of_a_link_that_is_not_refused_is_that_of_its_state(state: LinkState, phase: PhaseKind) -> None:
    assert phase_of(in_state(state)) is phase


def test_retry_after_is_spread_as_a_refusal_whatever_the_status() -> None:
    """Many shims get the same `Retry-After`: after a long outage they return within a minute, not within 5 s."""
    machine = link(rng=0.999)
    machine.handle(ev.AgentCalled(), 0)
    for _ in range(10):
        machine.handle(ev.DialFailed(503), 0)
        machine.handle(ev.RetryDue(), 0)
    assert machine.handle(ev.DialFailed(503, 300), 0) == [ev.StartRetryTimer(300 + 0.999 * 60)]


def test_short_lives_before_a_stable_one_do_not_count_even_if_that_registered_late() -> None:
    machine = link()
    for round_ in range(2):
        short_life(machine, 100.0 * round_)
    machine.handle(ev.RetryDue(), 300)
    machine.handle(ev.Opened(), 300)
    machine.handle(ev.Registered(), 325)
    machine.handle(ev.StableTimerFired(), 330)
    machine.handle(ev.Lost(True, 1000), 340)
    short_life(machine, 400)
    assert not machine.contended


def test_an_own_token_that_nobody_has_judged_yet_is_dialled_again_soon() -> None:
    machine = in_state(S.ONLINE, own_token=True)
    assert machine.handle(ev.Lost(), 10) == [ev.Offline(), ev.StartRetryTimer(0.5)]


@pytest.mark.parametrize(
    "state, effects",
    [
        (S.IDLE, []),
        (S.OPENING, [ev.CancelDial(), HEADER]),
        (S.REPLAYING, [ev.CloseSocket(1000), ev.Offline(), HEADER]),
        (S.ONLINE, [ev.CloseSocket(1000), ev.Offline(), HEADER]),
        (S.WAITING, [ev.CancelRetryTimer(), HEADER]),
    ],
)
def test_a_new_token_ends_what_the_old_one_has_begun(state: LinkState, effects: list[ev.LinkEffect]) -> None:
    assert in_state(state).handle(ev.TokenChanged(), 1) == effects
