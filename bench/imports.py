"""Import what `agent-shim run` imports, and print what each module took: a JSON object of [bytes, seconds] by name.

A module's figures are its own, without those of the modules that it imports. The name "" has what Python itself took.
The script stands alone, so that nothing else is imported: run it by its path.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from typing import Any

PAGE_BYTES = resource.getpagesize()
costs: dict[str, list[float]] = {}
_nested: list[list[float]] = [[0.0, 0.0]]


def rss_bytes() -> int:
    with open("/proc/self/statm") as statm:  # noqa: PTH123 - pathlib is one of the modules that are measured
        return int(statm.read().split()[1]) * PAGE_BYTES


def counted(step: Callable[..., Any], name: Callable[[Any], str]) -> Callable[..., Any]:
    """Return a step of a loader that adds what it takes to the module's costs."""

    def run(self: Any, subject: Any) -> Any:
        began_s, began_bytes = time.perf_counter(), rss_bytes()
        _nested.append([0.0, 0.0])
        try:
            return step(self, subject)
        finally:
            took = [rss_bytes() - began_bytes, time.perf_counter() - began_s]
            inner, own = _nested.pop(), costs.setdefault(name(subject), [0.0, 0.0])
            for at in (0, 1):
                own[at] += took[at] - inner[at]
                _nested[-1][at] += took[at]

    return run


def main() -> None:
    started_s = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    costs[""] = [rss_bytes(), started_s]
    SourceFileLoader.exec_module = counted(SourceFileLoader.exec_module, lambda module: module.__name__)  # type: ignore[method-assign]
    ExtensionFileLoader.create_module = counted(ExtensionFileLoader.create_module, lambda spec: spec.name)  # type: ignore[method-assign]
    ExtensionFileLoader.exec_module = counted(ExtensionFileLoader.exec_module, lambda module: module.__name__)  # type: ignore[method-assign]
    # What is measured; uvloop is imported when the event loop is made.
    importlib.import_module("shim.cli.main")
    importlib.import_module("shim.launch").import_app()
    importlib.import_module("uvloop")
    json.dump(costs, sys.stdout)


if __name__ == "__main__":
    main()
