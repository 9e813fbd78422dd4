"""The configuration is read again after a change or on request, one reading at a time."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from shim.config import loader
from shim.config.files import FileWatcher
from shim.config.reloader import ConfigReloader
from shim.config.settings import Settings
from shim.errors import ConfigError, Fault

PATIENCE_S = 30.0


class Stage:
    """A reloader of one file whose readings the test lets end."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "shim.yaml"
        self.file.write_text("mode: websocket\n")
        self.applied: list[str] = []
        self.rejected: list[list[str]] = []
        self.readings = 0
        self.fault: Exception | None = None
        self.may_end = threading.Event()
        self.may_end.set()
        self.began = threading.Event()
        self.stopping = asyncio.Event()
        self.reloader = ConfigReloader(
            self.load,
            FileWatcher(),
            str(self.file),
            lambda settings: self.applied.append(settings.mode),
            self.rejected.append,
            self.stopping,
            until_tick_s=lambda every_s: every_s,
        )

    def load(self) -> Settings:
        self.readings += 1
        text = self.file.read_text()
        self.began.set()
        assert self.may_end.wait(PATIENCE_S)
        if self.fault is not None:
            raise self.fault
        mode = text.removeprefix("mode: ").strip()
        return loader.load(None, {}, ["upstream.url=http://127.0.0.1:9", "upstream.token=t", f"mode={mode}"])


async def test_requests_during_a_reading_are_served_by_it_unless_the_file_has_changed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.may_end.clear()
    reading = asyncio.create_task(stage.reloader.reload())
    await asyncio.to_thread(stage.began.wait, PATIENCE_S)
    for _ in range(3):
        stage.reloader.request()
        await stage.reloader.reload()
    stage.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        await reading
    assert (stage.readings, stage.applied) == (1, ["websocket"])


async def test_a_file_that_changes_during_a_reading_is_read_again_if_that_is_requested(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.may_end.clear()
    reading = asyncio.create_task(stage.reloader.reload())
    await asyncio.to_thread(stage.began.wait, PATIENCE_S)
    other = tmp_path / "other"
    other.write_text("mode: auto\n")
    other.replace(stage.file)
    stage.reloader.request()
    stage.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        await reading
    assert stage.applied == ["websocket", "auto"]


async def test_a_file_that_cannot_be_used_is_rejected_with_its_faults(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.fault = ConfigError([Fault("mode", "unknown")])
    await stage.reloader.reload()
    stage.fault = RecursionError()
    await stage.reloader.reload()
    assert stage.applied == []
    assert [len(faults) for faults in stage.rejected] == [1, 1]
    assert "mode" in stage.rejected[0][0]
    assert "RecursionError" in stage.rejected[1][0]


async def test_nothing_is_read_during_a_stop(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.reloader.request()
    stage.stopping.set()
    await stage.reloader.watch(lambda: "", lambda: None)
    assert stage.readings == 0


async def test_a_request_before_the_watch_is_served_when_it_begins(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.reloader.request()
    watching = asyncio.create_task(stage.reloader.watch(lambda: "", lambda: None))
    await asyncio.to_thread(stage.began.wait, PATIENCE_S)
    stage.stopping.set()
    async with asyncio.timeout(PATIENCE_S):
        await watching
    assert stage.applied == ["websocket"]
