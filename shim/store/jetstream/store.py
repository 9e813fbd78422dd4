"""The command store on NATS JetStream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from shim import settings
from shim.core.records import Loaded, Operation
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store.delivery import Post, deliver, store_error
from shim.store.jetstream.keeper import Keeper
from shim.store.jetstream.layout import Layout
from shim.store.jetstream.server import Server
from shim.store.jetstream.worker import Limits, Submission, Worker
from shim.store.writer import CommitProbe


class NatsStore:
    """A `ports.CommandStore` in the streams of `layout` on the servers of `configured.url`.

    Each submission is atomic: it is part of one record of a journal, which counts when its last message is stored, and
    then `done` is told; the rows that the record names are written afterwards, and again by the next opening where a
    crash came between. One case is open by nature: where the server stored a record but its answer was lost, `done` is
    told a `StoreError` and the next record takes it back; should this process die before that, it stands.

    Whoever opens the store takes it over: an earlier user's submissions fail from then on. Who has a lower fencing
    token (`fence`) than the one before is refused.
    """

    def __init__(
        self,
        configured: settings.Store,
        post: Post,
        probe: CommitProbe | None = None,
        layout: Layout | None = None,
        limits: Limits | None = None,
        fence: int = 0,
    ) -> None:
        self._configured = configured
        self._post = post
        self._probe = probe
        self._layout = layout or Layout()
        self._limits = limits or Limits()
        self._fence = fence
        self._gate = threading.Lock()
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None

    def make_server(self) -> Server:
        """The connection; a test stands between it and the rest."""
        return Server(self._configured)

    def open(self) -> Loaded:
        """See `ports.CommandStore`."""
        opened: Future[Loaded] = Future()
        started: Future[Worker] = Future()
        # A daemon, so that a process which dies without `close()` does not hang; the servers have what was committed.
        thread = threading.Thread(target=self._run, args=(started, opened), name="store-nats", daemon=True)
        thread.start()
        try:
            worker = started.result()
            loaded = opened.result()
        except BaseException:
            thread.join()
            raise
        with self._gate:
            self._worker, self._thread = worker, thread
        return loaded

    def _run(self, started: Future[Worker], opened: Future[Loaded]) -> None:
        async def main() -> None:
            server = self.make_server()
            try:
                keeper = Keeper(server, self._layout, self._configured.replicas, self._fence)
                try:
                    worker = Worker(keeper, self._post, self._probe, self._limits)
                except Exception as error:  # noqa: BLE001 - who opens the store must be told, whatever it was
                    started.set_exception(store_error(error))
                    return
                started.set_result(worker)
                await worker.run(opened)
            finally:
                await server.close()

        with asyncio.Runner() as runner:
            runner.run(main())

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """See `ports.CommandStore`; a store that is not open answers with a `StoreError`."""
        submission: Submission = (tuple(operations), done)
        with self._gate:
            if self._worker is not None:
                self._worker.submit(submission)
                return
        if done is not None:
            deliver(self._post, [partial(done, StoreError("the store is not open"))])

    def close(self) -> None:
        """See `ports.CommandStore`; may be called from any thread. Bounded also without a server."""
        with self._gate:
            worker, self._worker = self._worker, None
            thread, self._thread = self._thread, None
        if worker is not None and thread is not None:
            worker.close()
            thread.join()
