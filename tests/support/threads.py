"""A call that several threads of a new process make at the same moment."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import json, sys, threading
sys.setswitchinterval(1e-6)
from {module} import {function}
argument, start = json.loads(sys.stdin.read()), threading.Barrier(8)
def call():
    start.wait()
    {function}(argument)
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def exit_code_of_first_calls(module: str, function: str, argument: str) -> int:
    """Return the exit code of a process whose first calls of a function come from eight threads.

    `argument` is the call's argument as JSON.
    """
    script = _SCRIPT.format(module=module, function=function)
    return subprocess.run([sys.executable, "-c", script], input=argument, text=True, timeout=60, check=False).returncode
