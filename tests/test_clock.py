"""shim.clock reads the machine's clocks."""

import time

from shim.clock import Clock


def test_reads_the_right_clocks() -> None:
    clock = Clock()
    before = time.time(), time.monotonic()
    read = clock.wall_s(), clock.monotonic_s()
    after = time.time(), time.monotonic()
    assert before[0] <= read[0] <= after[0]
    assert before[1] <= read[1] <= after[1]
