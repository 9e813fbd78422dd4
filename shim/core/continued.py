"""A coroutine that goes on with the result of another one."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

_First = TypeVar("_First")
_Result = TypeVar("_Result")


class Continued(Coroutine[Any, Any, _Result], Generic[_First, _Result]):
    """Coroutine that awaits `first` and returns `finish` of its result. Closing it closes `first` as well.

    A coroutine function that took `first` as its argument would leave it open if it was closed before it started, and
    Python would report that `first` was never awaited.
    """

    def __init__(self, first: Coroutine[Any, Any, _First], finish: Callable[[_First], _Result]) -> None:
        self._first = first
        self._whole = self._run(finish)

    async def _run(self, finish: Callable[[_First], _Result]) -> _Result:
        return finish(await self._first)

    def __await__(self) -> Generator[Any, Any, _Result]:
        return self._whole.__await__()

    def send(self, value: Any, /) -> Any:
        return self._whole.send(value)

    def throw(self, *error: Any) -> Any:
        return self._whole.throw(*error)

    def close(self) -> None:
        self._whole.close()
        self._first.close()
