"""The schedule of faults: the same for the same seed, and nothing left out."""

from __future__ import annotations

from itertools import pairwise

from tests.chaos.harness.faults import INJURIES
from tests.chaos.harness.schedule import (
    AWAY,
    LANES,
    LINK,
    MEMORY_LIMIT,
    NETWORK,
    RARE,
    STORE,
    Decks,
    Planned,
    in_lanes,
)


def _time(fault: Planned) -> float:
    return fault.at_s


def runs(seed: int, count: int = 3, **possible: bool) -> list[list[Planned]]:
    decks = Decks(seed, **possible)
    return [decks.run(60, 10, rare=number % 2 == 1) for number in range(count)]


def test_a_seed_tells_all() -> None:
    assert runs(7) == runs(7)
    assert runs(7) != runs(8)


def test_every_fault_can_be_done_and_every_one_that_can_be_done_is_dealt() -> None:
    kinds = {kind for lane in LANES for kind in lane.kinds} | {AWAY}
    assert set(INJURIES) == kinds
    assert {fault.kind for run in runs(1, 30) for fault in run} == kinds


def test_no_kind_of_a_lane_comes_again_before_all_have_come() -> None:
    dealt = [fault.kind for run in runs(5, 12) for fault in run if fault.kind in LINK.kinds]
    for start in range(0, len(dealt) - len(LINK.kinds), len(LINK.kinds)):
        assert sorted(dealt[start : start + len(LINK.kinds)]) == sorted(LINK.kinds)


def test_faults_of_one_lane_do_not_overlap_and_end_in_time() -> None:
    for run in runs(3, 10):
        for lane in LANES:
            own = [fault for fault in run if fault.kind in lane.kinds]
            assert all(earlier.at_s + earlier.lasts_s < later.at_s for earlier, later in pairwise(own))
        assert all(fault.at_s >= 0 and fault.at_s + fault.lasts_s <= 60 for fault in run)


def test_every_fault_is_in_one_lane_in_the_order_of_its_time() -> None:
    for run in runs(6, 5):
        lanes = in_lanes(run)
        assert sorted((fault for lane in lanes for fault in lane), key=_time) == run
        assert all(lane == sorted(lane, key=_time) for lane in lanes)
        assert [len(lane) for lane in lanes[-1:]] == [1]  # the agent that is away


def test_databases_are_destroyed_once_in_every_second_run_at_most() -> None:
    for number, run in enumerate(runs(2, 20)):
        destroyed = [fault for fault in run if fault.kind in RARE]
        assert len(destroyed) <= (number % 2 == 1)


def test_what_a_machine_does_not_permit_is_left_out() -> None:
    kinds = {fault.kind for run in runs(4, 10, network=False, store=False, memory=False) for fault in run}
    assert kinds.isdisjoint({*NETWORK.kinds, *STORE.kinds, MEMORY_LIMIT})
