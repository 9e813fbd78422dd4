"""`python -m bench.herd`: a thousand shims lose their controller in the same moment, and it comes back.

The shim's own pure backoff, in simulated time. What is compared is the number of connection attempts in each second
with what it would be if every shim were equally likely to come at any moment of the backoff window that it is in: that
is the least that anybody can be asked to bear, and more than twice as much would be a herd.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from shim.core.backoff import Backoff, BackoffPolicy, FailureKind

SHIMS = 1000
OUTAGES_S = (0.0, 0.5, 2.0, 5.0, 10.0, 30.0, 60.0, 600.0)
RETRY_AFTER_S = 30.0
BUCKET_S = 1.0
BOUND = 2.0


@dataclass(frozen=True, slots=True)
class Herd:
    """One return. `uniform_per_s`: the attempts in a second if all spread evenly over their windows; `peak_per_s`: the

    most that came in one. `attempts` are those during the outage, `back_s` is when the last shim was back.
    """

    outage_s: float
    asked_to_wait: bool
    attempts: int
    uniform_per_s: float
    peak_per_s: float
    back_s: float

    @property
    def ratio(self) -> float:
        return self.peak_per_s / self.uniform_per_s


class _Shim:
    """One link's backoff. `window_s` is how wide the window is that its last delay was drawn from."""

    def __init__(self, rng: random.Random) -> None:
        self.window_s = 0.0
        self._rng = rng
        self._drawn = 1.0
        self._backoff = Backoff(BackoffPolicy(), self._draw)

    def _draw(self) -> float:
        self._drawn = 1.0 - self._rng.random()
        return self._drawn

    def delay_s(self, kind: FailureKind = FailureKind.LOSS, retry_after_s: float | None = None) -> float:
        """The next delay. What the controller imposed is no part of the window."""
        delay_s = self._backoff.next_delay_s(kind, retry_after_s)
        self.window_s = (delay_s - (retry_after_s or 0.0)) / self._drawn
        return delay_s


def restart(outage_s: float, shims: int = SHIMS, seed: int = 1, *, asked_to_wait: bool = False) -> Herd:
    """The controller is away for `outage_s` and then takes everybody; or it says `Retry-After` once, and then does."""
    rng = random.Random(seed)
    herd = [_Shim(rng) for _ in range(shims)]
    due = [(shim.delay_s(), number) for number, shim in enumerate(herd)]
    heapq.heapify(due)
    attempts, asked, returned = 0, set[int](), list[float]()
    windows_s: list[float] = [] if outage_s else [shim.window_s for shim in herd]
    while due:
        now, number = heapq.heappop(due)
        if not windows_s and now >= outage_s:
            windows_s = [shim.window_s for shim in herd]
        shim = herd[number]
        if now < outage_s:
            attempts += 1
            heapq.heappush(due, (now + shim.delay_s(), number))
        elif asked_to_wait and number not in asked:
            asked.add(number)
            heapq.heappush(due, (now + shim.delay_s(FailureKind.REFUSED, RETRY_AFTER_S), number))
        else:
            returned.append(now)
    if asked_to_wait:
        windows_s = [shim.window_s for shim in herd]
    first = min(returned) if asked_to_wait else outage_s
    seconds = Counter(int((at - first) / BUCKET_S) for at in returned)
    uniform = sum(min(1.0, BUCKET_S / window_s) for window_s in windows_s) / BUCKET_S
    return Herd(outage_s, asked_to_wait, attempts, uniform, max(seconds.values()) / BUCKET_S, max(returned) - outage_s)


def measured(shims: int = SHIMS, seed: int = 1) -> Iterator[Herd]:
    """All cases."""
    for outage_s in OUTAGES_S:
        yield restart(outage_s, shims, seed)
    yield restart(10.0, shims, seed, asked_to_wait=True)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.herd", description=__doc__)
    parser.add_argument("--shims", type=int, default=SHIMS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(given)
    herds = list(measured(options.shims, options.seed))
    if options.json:
        print(json.dumps([asdict(herd) | {"ratio": herd.ratio} for herd in herds]))
    else:
        print(f"{options.shims} shims: connections in the busiest second after the controller's return")
        print(f"{'outage':>10}{'attempts in it':>16}{'uniform /s':>12}{'peak /s':>10}{'ratio':>8}{'all back in':>13}")
        for herd in herds:
            name = f"{herd.outage_s:g} s" + (" *" if herd.asked_to_wait else "")
            numbers = f"{herd.attempts:>16}{herd.uniform_per_s:>12.0f}{herd.peak_per_s:>10.0f}{herd.ratio:>8.2f}"
            print(f"{name:>10}{numbers}{herd.back_s:>11.1f} s")
        print(f"* then everybody is told Retry-After: {RETRY_AFTER_S:g} once")
    return 0 if all(herd.ratio <= BOUND for herd in herds) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
