"""What is imported for a running shim, and what is not kept of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IMPORTS = """
import os, ssl, sys
make = ssl.create_default_context
os.environ["FROZENLIST_NO_EXTENSIONS"] = ""
from shim import launch
assert launch.import_app().__name__ == "App"
import frozenlist
from aiohttp import connector
context = connector._SSL_CONTEXT_VERIFIED
assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname, "it must trust nobody, not everybody"
assert context.cert_store_stats() == {"x509": 0, "crl": 0, "x509_ca": 0}
assert frozenlist.FrozenList is frozenlist.PyFrozenList
assert ssl.create_default_context is make
assert os.environ["FROZENLIST_NO_EXTENSIONS"] == ""
"""
FORGETS = """
import gc, sys
from shim.config import loader
for _ in range(2):
    assert loader.load(sys.argv[1], {}, ()).log.level == "debug"
    assert "yaml" in sys.modules
    loader.forget_yaml()
    gc.collect()
    kept = [each for each in gc.get_objects() if isinstance(each, type) and each.__module__.startswith("yaml")]
    assert not kept and not {"yaml", "shim.config.yaml_file"} & sys.modules.keys(), kept
"""


def assert_ends_well(program: str, *args: str) -> None:
    """Run a program in a process that has imported nothing else."""
    ended = subprocess.run(
        [sys.executable, "-c", program, *args], check=False, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


def test_certificates_and_lists_that_only_aiohttp_would_load_are_left_out() -> None:
    assert_ends_well(IMPORTS)


def test_the_yaml_library_is_gone_after_a_file_was_read_and_reads_it_again(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("upstream: {url: 'https://api.vendor.test', token: t}\nlog: {level: debug}\n")
    assert_ends_well(FORGETS, str(file))
