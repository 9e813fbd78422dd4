"""A limit of memory is what the harness takes it for: the kernel kills what needs more."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support import memory

LIMIT_BYTES = 48 << 20


@pytest.mark.parametrize("size_bytes, code", [(1 << 20, 0), (4 * LIMIT_BYTES, -signal.SIGKILL)])
def test_the_kernel_ends_a_process_that_needs_more_than_its_group_has(size_bytes: int, code: int) -> None:
    reason = memory.permitted()
    if reason:
        pytest.skip(reason)
    with memory.group() as group:
        assert group.limit(LIMIT_BYTES)
        program = f"import os; held = bytearray({size_bytes}); held[::4096] = bytes(len(held[::4096]))"
        done = subprocess.run([*group.inside, sys.executable, "-c", program], timeout=120, check=False)
        assert done.returncode == code
