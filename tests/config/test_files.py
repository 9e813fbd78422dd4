"""Files that are read because the configuration names them: only regular ones, and never waited for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from shim.config.files import read_regular, reason, require_regular


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"secret\n")
    (tmp_path / "link").symlink_to("token")
    assert read_regular(tmp_path / "link", 7) == b"secret\n"
    require_regular(str(tmp_path / "link"))


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 8)
    with pytest.raises(OSError, match="larger than 7 bytes"):
        read_regular(tmp_path / "large", 7)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "device"])
def test_everything_else_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(OSError, match="not a regular file") as caught:
        read_regular(path, 100)
    assert reason(caught.value) == "not a regular file"
    with pytest.raises(OSError, match="not a regular file"):
        require_regular(path)


def test_reasons_do_not_show_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as missing:
        read_regular(tmp_path / "none", 100)
    assert reason(missing.value) == "No such file or directory"
    with pytest.raises(ValueError, match="null byte") as odd:
        read_regular("a\0b", 100)
    assert reason(odd.value) == "not a path"
