"""Places of clusters in the rollout: the hash that others can compute, and lists of names as people have them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from shim.cli.commands import cli
from shim.cli.rollout.placement import place, places
from shim.cli.rollout.sources import in_parallel
from shim.cli.threads import Interruption
from shim.config.settings import Rollout
from shim.core.failover import bucket

ROOT = Path(__file__).parents[3]
PROTOCOL = (ROOT / "docs" / "reference" / "protocol.md").read_text()


def preview(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["rollout", "preview", *args], input=stdin)
    return done.exit_code, done.stdout, done.stderr


def vectors() -> list[tuple[str, str, str]]:
    """(name, hexadecimal digits, hash) in the protocol's page."""
    return re.findall(r"^\s*\| `([^`]+)` \| `([0-9a-f]{16})` \| ([\d.]+) \|$", PROTOCOL, re.MULTILINE)


def test_the_documented_vectors_are_those_of_the_shim() -> None:
    found = vectors()
    assert len(found) >= 4
    assert any(not name.isascii() for name, _, _ in found)
    for name, digits, number in found:
        assert bucket(name) == int(digits, 16) / 2**64 * 100
        assert f"{bucket(name):.4f}" == number


@pytest.mark.needs("sh", "awk", "sha256sum")
def test_the_documented_shell_line_computes_the_same() -> None:
    line = next(each for each in PROTOCOL.splitlines() if "sha256sum" in each).strip()
    for name, _, number in vectors():
        done = subprocess.run(["sh", "-c", f"name='{name}'; {line}"], capture_output=True, check=True, timeout=30)
        assert done.stdout.decode().strip() == number, name


def test_lists_come_before_the_hash() -> None:
    lists = Rollout(include=("late*",), exclude=("*-b",))
    assert place("late-a", (0, 10), lists).steps == {"0": True, "10": True}
    assert place("late-a", (0,), lists).decided_by == "include"
    assert place("late-b", (0, 100), lists).steps == {"0": False, "100": False}
    assert place("late-b", (0,), lists).decided_by == "exclude"
    assert place("prod-cluster", (6, 7), lists).steps == {"6": False, "7": True}


def test_a_name_that_is_given_twice_is_one_place() -> None:
    found = places(["staging", "prod-cluster", "staging"], (10,), Rollout())
    assert [(each.cluster, each.given) for each in found] == [("prod-cluster", 1), ("staging", 2)]
    code, out, _ = preview("staging", "prod-cluster", "staging")
    assert code == 0
    assert re.search(r"^staging +91\.05 +out +out +in +given 2 times$", out, re.MULTILINE)
    assert "2 clusters: in are 1 at 10 %, 1 at 50 %, 2 at 100 %" in out


def test_a_larger_percentage_only_adds_clusters() -> None:
    names = [f"cluster-{number}" for number in range(300)]
    steps = [{each.cluster for each in places(names, (step,), Rollout()) if each.steps[f"{step}"]} for step in (10, 50)]
    assert steps[0] < steps[1] < set(names)


@pytest.mark.parametrize(
    "text",
    [
        b"prod-cluster\nstaging\n",
        b"prod-cluster\r\n\r\nstaging\r\n",
        b"\xef\xbb\xbfprod-cluster\nstaging",
        b"\n\n  prod-cluster \n\tstaging\n\n",
        b"# all of them\nprod-cluster\n #\n # second\nstaging\n",
    ],
)
def test_files_as_people_have_them(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_bytes(text)
    for code, out, err in (
        preview("--from-file", str(path), "--json"),
        preview("--from-file", "-", "--json", stdin=text),
    ):
        assert (code, err) == (0, "")
        assert [each["cluster"] for each in json.loads(out)] == ["prod-cluster", "staging"]


@pytest.mark.needs("bash")
def test_a_pipe_is_a_file() -> None:
    line = f"{sys.executable} -m shim rollout preview --json --from-file <(sleep 0.2; echo staging; echo prod-cluster)"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60, check=True, cwd=ROOT)
    assert [round(each["hash"], 2) for each in json.loads(done.stdout)] == [6.12, 91.05]


@pytest.mark.parametrize(
    "text, expected",
    [
        (b"prod\nb\xfcro\n", "line 2: not UTF-8"),
        ("prod\n".encode("utf-16"), "is UTF-16"),
        (b"prod\n\0\0\n", "line 2: a NUL byte"),
        (b"\n \r\n", "names no cluster"),
        (b"x" * (17 << 20), "is larger than 16 MiB"),
    ],
)
def test_what_is_no_list_of_names(text: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_bytes(text)
    code, out, err = preview("--from-file", str(path))
    assert (code, out) == (64, "")  # 1 would mean to wait
    assert expected in err
    assert str(path) in err


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in preview("--from-file", str(tmp_path / "gone"))[2]
    assert "cannot be read: Is a directory" in preview("--from-file", str(tmp_path))[2]


@pytest.mark.parametrize(
    "args, expected",
    [
        ((), "give either NAMES"),
        (("a", "--from-file", "b"), "give either NAMES"),
        (("a", "--percent", "10,x"), "is no list of numbers"),
        (("a", "--percent", "nan"), "between 0 and 100"),
        (("a", "--percent", "101"), "between 0 and 100"),
        (("a\udcff",), "is not UTF-8"),
        (("a", "--include", "a\udcff"), "is not UTF-8"),
        (("--nonsense",), "No such option"),
    ],
)
def test_faults_on_the_command_line_have_an_exit_code_of_their_own(args: tuple[str, ...], expected: str) -> None:
    code, out, err = preview(*args)
    assert (code, out) == (64, "")  # 2 would mean to go back
    assert expected in err


def rollout(*args: str, stdout: str = "") -> tuple[int, str]:
    """Run the command with a shell's redirection."""
    shell = f'exec "$0" -m shim rollout "$@" {stdout}'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, *args], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("report", "--urls", "{gone}"),
        ("report", "--urls", "{empty}"),
        ("step", "--urls", "{one}", "--expect", "{gone}"),
        ("step", "--urls", "{one}", "--expect", "{empty}"),
        ("step", "--urls", "{one}", "--expect", "{one}"),
        ("preview", "--from-file", "{one}"),
        ("report", "--kubeconfig-glob", "{gone}"),
        ("report", "--kubeconfig-glob", "~nobody-of-this-name/*.yaml"),
        ("report", "--kubeconfig-glob", "{gone}/**x/["),
        ("report", "--prometheus", "http://127.0.0.1:1", "--token-file", "{gone}"),
    ],
)
def test_files_without_which_there_is_no_verdict_exit_with_64(args: tuple[str, ...], tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("gone", "empty", "one")}
    files["empty"].touch()
    files["one"].write_text("one http://127.0.0.1:1\n")
    code, err = rollout(*(each.format_map(files) for each in args))
    assert code == 64, err
    assert err.startswith("Error: ")


def test_a_verdict_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("one http://127.0.0.1:1\n")
    for form in ("--html", "--json"):
        code, err = rollout("report", "--urls", str(tmp_path / "one"), form, stdout=">/dev/full")
        assert (code, err) == (64, "Error: the output cannot be written: No space left on device\n")


def test_a_verdict_whose_reader_has_gone_is_none(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("one http://127.0.0.1:1\n")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "shim", "rollout", "report", "--urls", str(tmp_path / "one")]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (64, b"")


@pytest.mark.parametrize("part", ["report", "step"])
def test_an_interrupted_report_has_no_verdict(part: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        (tmp_path / "one").write_text(f"one http://127.0.0.1:{silent.getsockname()[1]}\n")
        command = [sys.executable, "-m", "shim", "rollout", part, "--urls", str(tmp_path / "one"), "--timeout", "300"]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child,
            silent.accept()[0],  # the command has asked, and waits for an answer
        ):
            child.send_signal(signal.SIGINT)
            out, _ = child.communicate(timeout=60)
        assert (child.returncode, out) == (64, "")


def test_a_signal_is_noticed_whenever_it_comes() -> None:
    """One that came just before the main thread waited for the pool was noticed when the pool had ended."""
    for attempt in range(300):
        interruption = Interruption()

        def read(item: int, interruption: Interruption = interruption) -> int:
            """Interrupt this process at a random moment, and wait as a kubectl does."""
            until_s = time.monotonic() + item / 1e6
            while time.monotonic() < until_s:
                pass
            os.kill(os.getpid(), signal.SIGINT)
            until_s = time.monotonic() + 30
            while not interruption.came and time.monotonic() < until_s:
                time.sleep(0.001)
            assert interruption.came
            return item

        with pytest.raises(KeyboardInterrupt):
            in_parallel([attempt], 1, read, interruption)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_nothing_while_the_pool_may_hold_a_lock(number: signal.Signals) -> None:
    """An exception between two instructions of `threading` left a lock taken: the report waited for ever."""
    before, interruption, called = signal.getsignal(number), Interruption(), []

    def read(item: int) -> int:
        called.append(item)
        handler = signal.getsignal(number)
        assert callable(handler)
        handler(number, None)
        return item

    with pytest.raises(KeyboardInterrupt):
        in_parallel([1, 2, 3], 1, read, interruption)
    assert called == [1]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_report_leaves_no_kubectl_behind(number: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/begun\nexec sleep 600\n")
    kubectl.chmod(0o755)
    command = [sys.executable, "-m", "shim", "rollout", "report", "--contexts", "a", "--timeout", "300"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        pid = int((tmp_path / "begun").read_text())
        child.send_signal(number)
        out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (64, b"")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_names_that_could_control_a_terminal_are_shown_without_that() -> None:
    assert "\x1b" not in preview("a\x1b[31m")[1]
    assert json.loads(preview("a\x1b[31m", "--json")[1])[0]["cluster"] == "a\x1b[31m"
