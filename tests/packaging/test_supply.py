"""What is said about dependencies is true: licences, bills of materials, audits, locks, workflows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from supply import audit, licenses, sbom
from supply.locked import RUN, RUN_OTEL, packages

ROOT = Path(__file__).parents[2]


# --- locks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "run-otel", "tools", "dev"])
def test_every_locked_package_has_hashes(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 10
    assert all("--hash=sha256:" in entry for entry in entries)


@pytest.mark.parametrize("name", ["run", "run-otel", "tools"])
def test_the_build_of_the_image_gets_every_list_that_it_may_install(name: str) -> None:
    assert f"!requirements/{name}.txt" in (ROOT / ".dockerignore").read_text().splitlines()


# --- licences -----------------------------------------------------------------------------------------------------


def test_the_page_of_licences_is_up_to_date_and_all_are_allowed() -> None:
    found, of_otel = licenses.rows(), licenses.rows_of_otel()
    assert {row.name for row in found} == {package.name for package in packages()}
    assert {row.name for row in (*found, *of_otel)} == {package.name for package in packages(RUN_OTEL)}
    assert licenses.refused([*found, *of_otel]) == []
    assert licenses.PAGE.read_text() == licenses.page(found, of_otel)


@pytest.mark.parametrize(
    "expression,allowed",
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("GPL-3.0-only", False),
        ("?", False),
        ("", False),
    ],
)
def test_which_licences_are_allowed(expression: str, allowed: bool) -> None:
    row = licenses.Row("x", "1", expression)
    assert licenses.refused([row]) == ([] if allowed else [row])


# --- bills of materials -------------------------------------------------------------------------------------------


def test_the_bill_of_the_wheel_has_every_locked_package_with_its_hashes() -> None:
    text = sbom.render(sbom.wheel())
    assert text == sbom.render(sbom.wheel()), "the same for the same lock"
    bill: dict[str, Any] = json.loads(text)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    found = {(each["name"], each["version"]): each for each in bill["components"]}
    for package in packages():
        assert found[package.name, package.version]["hashes"], package
    assert any(name == "uPlot" for name, _ in found)


def test_the_bill_of_an_image_has_what_its_interpreter_found() -> None:
    found = {
        "python": "3.13.1",
        "os": {"ID": "debian"},
        "packages": [["aiohttp", "3.14.5"], ["ruamel.yaml", "0.19.1"]],
        "debian": [["libssl3", "3.0.17-1", "amd64"]],
    }
    bill = json.loads(sbom.render(sbom.image("localhost/agent-shim:ci", found)))
    assert {each["purl"] for each in bill["components"]} == {
        "pkg:pypi/aiohttp@3.14.5",
        "pkg:pypi/ruamel-yaml@0.19.1",
        "pkg:generic/python@3.13.1",
        "pkg:deb/debian/libssl3@3.0.17-1?arch=amd64",
    }
    assert bill["metadata"]["component"]["type"] == "container"


def test_the_question_to_an_image_can_be_answered_by_any_interpreter(tmp_path: Path) -> None:
    said: list[str] = []
    exec(compile(sbom._ASK, "ask", "exec"), {"print": said.append})  # noqa: S102 - what an image's interpreter is given
    assert {"python", "os", "packages", "debian"} == set(json.loads(said[0]))


def test_the_image_is_started_by_the_engine_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"python": "3.13.1", "os": {}, "packages": [], "debian": []})
    for name, images in (("podman", ""), ("docker", "built-here")):
        engine = tmp_path / name
        engine.write_text(f"#!/bin/sh\ncase $* in *{images or 'nothing'}*) echo '{answer}' ;; *) exit 125 ;; esac\n")
        engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sbom.ask("built-here")["python"] == "3.13.1"


# --- audit --------------------------------------------------------------------------------------------------------


def report(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """pip-audit's report in which every package was found and is clean, but for what is changed."""
    clean = {p.name: {"name": p.name, "version": p.version, "vulns": []} for p in packages()}
    return list((clean | changes).values())


def test_an_audit_of_all_packages_without_a_finding_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(report()) == 0
    assert "no known vulnerability" in capsys.readouterr().out


def test_a_vulnerability_is_told_with_the_version_that_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"name": "yarl", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
    assert audit.judge(report(yarl=bad)) == audit.VULNERABLE
    assert "yarl 1.0: PYSEC-1, fixed in 1.1" in capsys.readouterr().out


def test_a_package_that_was_skipped_was_not_audited(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(report(yarl={"name": "yarl", "skip_reason": "not found"})) == audit.UNKNOWN
    assert "NOT AUDITED: 1 of" in capsys.readouterr().err


def test_without_a_network_the_audit_says_that_it_could_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pip_audit")
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    assert audit.main([]) == audit.UNKNOWN
    assert "NOT AUDITED" in capsys.readouterr().err


def test_what_is_audited_is_what_the_image_runs() -> None:
    assert "requirements/run.txt" in str(RUN)
    assert "run.txt" in (ROOT / "Dockerfile").read_text()
