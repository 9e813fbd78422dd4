"""Schedule of the faults: a pure function of the seed. Times are seconds from the start of the fault phase.

Faults are dealt from shuffled decks, one a lane, so that each kind comes before any comes again. Lanes run beside each
other; within one a fault is over before the next begins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Lane:
    """Faults that exclude each other, the seconds they last and the seconds of peace between them (at pace 1)."""

    kinds: tuple[str, ...]
    lasts_s: tuple[float, float]
    rests_s: tuple[float, float]


CRASH_POINTS = (
    "frame_read",
    "before_commit",
    "in_commit",
    "after_commit",
    "before_reply",
    "after_reply",
    "result_stored",
    "result_sent",
)

LINK = Lane(
    (
        "controller_killed",
        "controller_restarted",
        "controller_forgetful",
        "refuse_401",
        "refuse_403",
        "refuse_429",
        "refuse_503",
        "refuse_503_later",
        "accept_then_close",
        "hang_handshake",
        "half_open",
        "stalled",
        "drop_close",
        "drop_rst",
        "result_lost",
        "result_cut",
        "register_unanswered",
        "register_in_progress",
        "register_closes",
        "not_registered",
        "no_acks",
        "new_ids",
        "gateway",
    ),
    lasts_s=(10, 40),
    rests_s=(10, 60),
)
MESSAGES = Lane(
    ("slow", "delay", "duplicate", "reorder", "garbage", "oversize", "binary"),
    lasts_s=(20, 60),
    rests_s=(20, 60),
)
NETWORK = Lane(("cut", "reset", "loss", "latency", "narrow", "dns_hangs"), lasts_s=(10, 50), rests_s=(60, 140))
MEMORY_LIMIT = "memory_limit"
SHIM = Lane(
    (
        *("kill", "sigterm", "clock", "paused", "unread_log", MEMORY_LIMIT),
        *(f"crash_{point}" for point in CRASH_POINTS),
    ),
    lasts_s=(20, 60),
    rests_s=(40, 160),
)
STORE = Lane(
    ("disk_full", "locked", "pinned_wal", "read_only", "newer_schema", "corrupted", "truncated"),
    lasts_s=(20, 80),
    rests_s=(40, 120),
)
AGENTS = Lane(("agent_dies", "agent_new_pod", "agent_forgets_id"), lasts_s=(10, 50), rests_s=(5, 30))

# What takes its time to be found out.
AT_LEAST_S = {"half_open": 65.0, "stalled": 100.0}

# One agent is dead for longer than any contact vouches for it. That bound is the same at every pace.
AWAY = "agent_is_away"
AWAY_S = 48.0

# Those after which the shim's memory of commands is gone by design: once in a run, and not in the first.
RARE = frozenset({"corrupted", "truncated"})


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault. `roll` in [0, 1) settles whatever its kind leaves open."""

    at_s: float
    lasts_s: float
    kind: str
    roll: float


LANES = (LINK, MESSAGES, NETWORK, SHIM, STORE, AGENTS)


def in_lanes(faults: Sequence[Planned]) -> list[list[Planned]]:
    """The same faults, a list for each lane and one for the rest: on a busy machine one may end later than planned."""
    lanes = [[fault for fault in faults if fault.kind in lane.kinds] for lane in LANES]
    known = {kind for lane in LANES for kind in lane.kinds}
    return [*lanes, [fault for fault in faults if fault.kind not in known]]


class Decks:
    """Deals faults for one run after another."""

    def __init__(self, seed: int, *, network: bool = True, store: bool = True, memory: bool = True) -> None:
        """Shuffle by `seed`. Leave out the faults of `network`, `store` or `memory` where they are not possible."""
        self._rng = random.Random(seed)
        shim = SHIM if memory else replace(SHIM, kinds=tuple(kind for kind in SHIM.kinds if kind != MEMORY_LIMIT))
        self._lanes = [LINK, MESSAGES, shim, AGENTS]
        self._lanes += [NETWORK] * network + [STORE] * store
        self._decks: dict[Lane, list[str]] = {}

    def run(self, duration_s: float, pace: float, *, rare: bool) -> list[Planned]:
        """The faults of one run that lives `pace` times as fast as real agents, by time."""
        planned = [fault for lane in self._lanes for fault in self._lane(lane, duration_s, pace, rare=rare)]
        if duration_s > AWAY_S:
            planned.append(Planned(duration_s - AWAY_S, AWAY_S, AWAY, self._rng.random()))
        return sorted(planned, key=lambda fault: fault.at_s)

    def _lane(self, lane: Lane, duration_s: float, pace: float, *, rare: bool) -> Iterator[Planned]:
        at_s = self._between(lane.rests_s, pace) / 2
        spent: set[str] = set()
        while True:
            kind = self._deal(lane, without=frozenset(spent if rare else RARE))
            lasts_s = max(self._between(lane.lasts_s, pace), AT_LEAST_S.get(kind, 0) / pace)
            if at_s + lasts_s > duration_s:
                self._decks[lane].insert(0, kind)
                return
            yield Planned(at_s, lasts_s, kind, self._rng.random())
            if kind in RARE:
                spent |= RARE
            at_s += lasts_s + self._between(lane.rests_s, pace)

    def _deal(self, lane: Lane, without: frozenset[str]) -> str:
        deck = self._decks.setdefault(lane, [])
        if not any(kind not in without for kind in deck):
            fresh = list(lane.kinds)
            self._rng.shuffle(fresh)
            deck.extend(fresh)
        index = next(index for index, kind in enumerate(deck) if kind not in without)
        return deck.pop(index)

    def _between(self, bounds_s: Sequence[float], pace: float) -> float:
        return self._rng.uniform(*bounds_s) / pace
