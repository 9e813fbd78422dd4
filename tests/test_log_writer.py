"""Log lines reach their reader in order, and never make the process wait for it."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from shim.log import MAX_QUEUED_BYTES, LineWriter

LINE = "x" * 999


def tell(count: int) -> str:
    return f"dropped {count}"


class Pipe:
    """A pipe with both its ends."""

    def __init__(self) -> None:
        self.read_fd, write_fd = os.pipe()
        self.stream: TextIO = os.fdopen(write_fd, "w")

    def lines(self, count: int) -> list[str]:
        """Read so many lines."""
        data = b""
        while data.count(b"\n") < count:
            data += os.read(self.read_fd, 65_536)
        return data.decode().splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.read_fd)  # a write that is blocked fails now, and its thread ends
    for thread in threading.enumerate():
        if thread.name == "log":
            thread.join(5)
    made.stream.close()


def fill(writer: LineWriter) -> int:
    """Queue more than there is room for; returns how many lines."""
    count = 2 * MAX_QUEUED_BYTES // len(LINE)
    for _ in range(count):
        writer.put(LINE)
    return count


def test_a_pipe_that_nobody_reads_blocks_neither_logging_nor_the_end(pipe: Pipe) -> None:
    writer = LineWriter(pipe.stream, tell)
    fill(writer)
    assert writer.dropped > 0
    assert not writer.flush(0.01)
    writer.close(0.2)  # without a limit of its own this would last as long as the pipe is full


def test_dropped_lines_are_counted_and_reported_once_somebody_reads(pipe: Pipe) -> None:
    counted: list[int] = []
    writer = LineWriter(pipe.stream, tell)
    writer.on_drop = lambda: counted.append(1)
    put = fill(writer)
    kept = put - writer.dropped
    lines = pipe.lines(kept + 1)
    assert lines[:kept] == [LINE] * kept
    assert lines[kept] == f"dropped {writer.dropped}"
    assert len(counted) == writer.dropped
    writer.put("after")
    assert pipe.lines(1) == ["after"]
    writer.close(5)


def test_a_non_blocking_pipe_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.stream.fileno(), False)
    writer = LineWriter(pipe.stream, tell)
    for number in range(500):
        writer.put(f"{number} {LINE}")
    assert [int(line.split()[0]) for line in pipe.lines(500)] == list(range(500))
    writer.close(5)


def test_a_reader_that_has_gone_is_survived_and_counted() -> None:
    pipe = Pipe()
    os.close(pipe.read_fd)
    writer = LineWriter(pipe.stream, tell)
    writer.put("lost")
    assert writer.flush(5)
    assert writer.dropped == 1
    writer.close(5)
    pipe.stream.close()


def test_a_full_disk_is_survived_and_counted() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123 - a device
        writer = LineWriter(full, tell)
        writer.put("lost")
        assert writer.flush(5)
        assert writer.dropped == 1
        writer.close(5)


class Failing(io.StringIO):
    """A stream without a descriptor that fails while it is told to."""

    broken = True

    def write(self, text: str) -> int:
        if self.broken:
            raise OSError
        return super().write(text)


def test_what_was_dropped_is_reported_after_the_next_line_that_is_written() -> None:
    stream = Failing()
    writer = LineWriter(stream, tell)
    writer.put("a")
    writer.put("b")
    assert writer.flush(5)
    stream.broken = False
    writer.put("c")
    assert writer.flush(5)
    assert stream.getvalue() == "c\ndropped 2\n"
    writer.close(5)


def test_a_closed_writer_drops() -> None:
    stream = io.StringIO()
    writer = LineWriter(stream, tell)
    writer.put("a")
    writer.close(5)
    writer.put("b")
    writer.close(5)
    assert (stream.getvalue(), writer.dropped) == ("a\n", 1)


def test_many_threads_may_log(pipe: Pipe) -> None:
    writer = LineWriter(pipe.stream, tell)
    threads = [threading.Thread(target=lambda: [writer.put(LINE) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert pipe.lines(400) == [LINE] * 400
    for thread in threads:
        thread.join()
    writer.close(5)


def test_without_a_stream_everything_is_dropped() -> None:
    writer = LineWriter(None, tell)
    writer.put("a")
    assert writer.flush(5)
    assert writer.dropped == 1
    writer.close(5)
