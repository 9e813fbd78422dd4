"""The demo as a process: child processes, signals and exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from devtools.controller.client import ControlError
from devtools.demo.console import Console, StepFailed
from devtools.demo.gateway_scenario import GatewayScenario
from devtools.demo.postgres import PostgresServer, missing, programs
from devtools.demo.processes import ChildFailed, ChildProcess
from devtools.demo.scenario import Scenario
from devtools.demo.sidecar_scenario import SidecarScenario
from shim.clock import Clock

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_MISSING = 2
EXIT_INTERRUPTED = 130


def play(*, once: bool, colour: bool, gateway: bool = False) -> int:
    """Run the demo and return the exit code. Without `once` it ends with Ctrl-C."""
    if gateway and (lack := missing()):
        print(f"demo --gateway: {lack}", file=sys.stderr)
        return EXIT_MISSING
    make = _gateway if gateway else _sidecar
    with tempfile.TemporaryDirectory(prefix="agent-shim-demo-") as folder:
        return asyncio.run(_play(Path(folder), make, once=once, colour=colour))


def _sidecar(stage: Console, clock: Clock, folder: Path) -> Scenario:
    return SidecarScenario(
        stage, clock, ChildProcess("controller", folder), ChildProcess("shim", folder), folder / "agent-shim.db"
    )


def _gateway(stage: Console, clock: Clock, folder: Path) -> Scenario:
    replicas = [ChildProcess(name, folder) for name in ("north", "south")]
    database = PostgresServer(folder, programs() or folder)
    return GatewayScenario(stage, clock, ChildProcess("controller", folder), database, replicas)


async def _play(folder: Path, make: Callable[[Console, Clock, Path], Scenario], *, once: bool, colour: bool) -> int:
    clock = Clock()
    stage = Console(sys.stdout, clock, colour=colour)
    story = make(stage, clock, folder)
    _cancel_on_signal()
    try:
        code = await perform(story, stage, once=once)
    except asyncio.CancelledError:
        # Ctrl-C is the normal end of the demo after its steps.
        code = EXIT_OK if story.told else EXIT_INTERRUPTED
        stage.headline("Stopping.")
    finally:
        # The order of starting; an end of several is reported in reverse order.
        for child in reversed(story.children):
            await child.stop()
    return code


async def perform(story: Scenario, stage: Console, *, once: bool) -> int:
    """Run a scenario on a console and return the exit code; the caller stops its child processes."""
    failures: list[str] = []
    try:
        async with asyncio.TaskGroup() as group:
            await story.tell(group)
            if not once:
                await story.stay()
            story.dismiss()
    except* (StepFailed, ChildFailed, ControlError) as found:
        failures += await _causes(story, found.exceptions)
    if not failures:
        stage.headline("Every step done.")
        return EXIT_OK
    for child in story.children:
        stage.headline(f"The {child.name} {child.fate}. The last lines of its log:")
        stage.plain("\n".join(child.tail()))
    stage.headline(f"The demo failed: {'; '.join(failures)}")
    return EXIT_FAILED


async def _causes(story: Scenario, found: Sequence[Exception]) -> list[str]:
    """Return the reasons of a failure: the end of child processes where one ended, else the step that failed.

    A step that talks to a process which has just died may fail before the loop learns of the process's end.
    """
    died = await asyncio.gather(*(child.died() for child in story.children))
    ended = [child for child, has in zip(story.children, died, strict=True) if has]
    return [f"the {child.name} {child.fate}" for child in ended] or [str(error) for error in found]


def _cancel_on_signal() -> None:
    """Cancel this task on the first Ctrl-C or SIGTERM; further signals do not disturb its end."""
    main, loop = asyncio.current_task(), asyncio.get_running_loop()

    def interrupt() -> None:
        if main is not None and not main.cancelling():
            main.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
