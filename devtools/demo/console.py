"""Output of the demo: one line a step, with the time since the start and the step's duration. Plain ANSI."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TextIO

from devtools.latency import duration
from shim.clock import Clock

_TITLE_WIDTH = 33


class StepFailed(Exception):
    """A step that failed and has been shown; the text is the reason."""


@dataclass(slots=True)
class Step:
    """A running step. `took_s` overrides the step's own duration if events measure it more precisely."""

    title: str
    detail: str = ""
    took_s: float | None = None


class Console:
    """Writer to a stream; colours are used only for a terminal without NO_COLOR."""

    def __init__(self, out: TextIO, clock: Clock, *, colour: bool) -> None:
        self._out = out
        self._clock = clock
        self._terminal = out.isatty()
        self._colour = colour and self._terminal and not os.environ.get("NO_COLOR")
        self._start_s = clock.monotonic_s()

    def headline(self, text: str) -> None:
        """Print the headline of a section."""
        self._line(f"\n{self._paint('1', text)}")

    def note(self, text: str) -> None:
        """Print a line of explanation."""
        self._line(f"  {self._paint('2', text)}")

    def plain(self, text: str) -> None:
        """Print text to be copied."""
        self._line(text)

    def happened(self, title: str, detail: str = "", took_s: float | None = None) -> None:
        """Print a step that has ended."""
        self._show(Step(title, detail, took_s), self._paint("32", "✓"))

    @asynccontextmanager
    async def step(self, title: str, limit_s: float = 20) -> AsyncIterator[Step]:
        """Run a step with its time limit. A failure is shown and raised as `StepFailed`."""
        step, start_s = Step(title), self._clock.monotonic_s()
        if self._terminal:
            self._out.write(f"  {self._since()}  …  {title}\r")
            self._out.flush()
        try:
            async with asyncio.timeout(limit_s):
                yield step
        except TimeoutError:
            raise self._failed(step, f"nothing happened within {limit_s:g} s") from None
        except Exception as error:
            raise self._failed(step, str(error) or type(error).__name__) from error
        if step.took_s is None:
            step.took_s = self._clock.monotonic_s() - start_s
        self._show(step, self._paint("32", "✓"))

    def _failed(self, step: Step, reason: str) -> StepFailed:
        step.detail = reason
        self._show(step, self._paint("31", "✗"))
        return StepFailed(f"{step.title}: {reason}")

    def _show(self, step: Step, mark: str) -> None:
        took = "" if step.took_s is None else duration(step.took_s)
        timed = f"{step.title:<{_TITLE_WIDTH}} {self._paint('36', f'{took:>8}')}"
        line = f"  {self._since()}  {mark}  {timed}  {self._paint('2', step.detail)}"
        self._line(("\x1b[2K" if self._terminal else "") + line.rstrip())

    def _since(self) -> str:
        return self._paint("2", f"{self._clock.monotonic_s() - self._start_s:6.2f} s")

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text.strip() else text

    def _line(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()
