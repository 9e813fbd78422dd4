"""Work that a command does not wait for longer than it wants to.

`getaddrinfo` cannot be cancelled, and takes half a minute or more if the name server does not answer. Python waits at
its end for the threads of a usual executor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonThreads(ThreadPoolExecutor):
    """An executor with a daemon thread for each call, so that neither it nor the process waits for them."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function in a thread of its own."""
        future: Future[Any] = Future()

        def work() -> None:
            """Call the function and pass on its result, or the exception that it raised."""
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised to the caller
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


def within(limit_s: float, work: Callable[[], T]) -> T:
    """Return the result of a call. Raises `TimeoutError` if it takes longer than `limit_s`, and leaves it alone."""
    try:
        done: T = DaemonThreads().submit(work).result(limit_s)
    except TimeoutError:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None
    return done


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop, like `asyncio.run`, without waiting for its threads at the end."""
    import asyncio  # not needed by `health`, which must be cheap

    async def with_daemon_threads() -> T:
        """Await the coroutine with daemon threads for what blocks."""
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        return await main

    return asyncio.run(with_daemon_threads())
