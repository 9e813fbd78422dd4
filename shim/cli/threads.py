"""Work that a command does not wait for longer than it wants to.

`getaddrinfo` cannot be cancelled, and takes half a minute or more if the name server does not answer. Python waits at
its end for the threads of a usual executor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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


class Interruption:
    """Flag of a signal handler. It takes no lock, unlike `threading.Event`: the interrupted code may hold that lock."""

    came = False


def within(limit_s: float, work: Callable[[], T]) -> T:
    """Return the result of a call. Raises `TimeoutError` if it takes longer than `limit_s`, and leaves it alone."""
    try:
        done: T = DaemonThreads().submit(work).result(limit_s)
    except TimeoutError:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None
    return done


def is_interrupt(error: BaseException) -> bool:
    """Return True for an exception that Ctrl-C caused.

    There are moments in `threading` at which Ctrl-C leaves a lock open that the code around it closes. Then Python
    raises `RuntimeError`, whose context is the `KeyboardInterrupt`.
    """
    context: BaseException | None = error
    while context is not None and not isinstance(context, KeyboardInterrupt):
        context = context.__context__
    return context is not None


@contextmanager
def until_interrupted() -> Iterator[None]:
    """End the block without an exception when Ctrl-C is pressed."""
    try:
        yield
    except BaseException as error:
        if not is_interrupt(error):
            raise


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop, like `asyncio.run`, without waiting for its threads at the end."""
    import asyncio  # not needed by `health`, which must be cheap

    async def with_daemon_threads() -> T:
        """Await the coroutine with daemon threads for what blocks."""
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        return await main

    return asyncio.run(with_daemon_threads())
