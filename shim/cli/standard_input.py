"""Standard input of commands that read a file or, as `-`, standard input."""

from __future__ import annotations

import errno
import sys
from typing import BinaryIO


def standard_input() -> BinaryIO:
    """Return standard input as bytes. Raises `OSError` if the process was started without it."""
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    return sys.stdin.buffer
