"""This process's memory: searched for garbage rarely, and given back when the start is over."""

from __future__ import annotations

import ctypes
import gc
import sys

# With 10,000 sessions a search for garbage through everything takes most of a second, in which no agent is answered,
# and by default it comes whenever a quarter more is alive than before: with every wave of held polls. What is garbage
# is nearly always young: the young are searched, and all only after tens of millions of objects.
_YOUNG, _MIDDLE, _ALL = 10_000, 20, 200


def tune_gc() -> None:
    """Spare this process's event loop long searches. What is alive now, modules and classes, is left out of all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _ALL)


def trim_heap() -> None:
    """Return to the system what the start has needed and freed; elsewhere than on glibc nothing is done."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
