"""What an examination found: one line per check, with what to do where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from shim.core.text import printable
from shim.log import Redaction


class Status(Enum):
    """How a check ended."""

    PASS = "PASS"  # noqa: S105 - no password
    WARN = "WARN"  # it works, or may work, and a person should know
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check; `todo` says what helps, `""` where nothing is wrong."""

    check: str
    status: Status
    text: str
    remedy: str = ""


def passed(check: str, text: str) -> Finding:
    """It is as it should be."""
    return Finding(check, Status.PASS, text)


def warned(check: str, text: str, todo: str = "") -> Finding:
    """A person should know."""
    return Finding(check, Status.WARN, text, todo)


def failed(check: str, text: str, todo: str) -> Finding:
    """It cannot work like this."""
    return Finding(check, Status.FAIL, text, todo)


class Report:
    """All findings, in the order in which they were made. No secret that `redaction` knows is shown."""

    def __init__(self, redaction: Redaction) -> None:
        self.redaction = redaction
        self._findings: list[Finding] = []

    def add(self, findings: Iterable[Finding]) -> None:
        """Take in what a check found."""
        for each in findings:
            text, todo = self.redaction.text(each.text), self.redaction.text(each.remedy)
            self._findings.append(Finding(each.check, each.status, text, todo))

    @property
    def ok(self) -> bool:
        """True when nothing failed."""
        return not any(finding.status is Status.FAIL for finding in self._findings)

    def lines(self) -> list[str]:
        """For a person: `PASS check  text`, and what to do on a line of its own."""
        width = max((len(finding.check) for finding in self._findings), default=0)
        lines = []
        for finding in self._findings:
            lines.append(f"{finding.status.value}  {finding.check:<{width}}  {printable(finding.text)}")
            if finding.remedy:
                lines.append(f"      {'':<{width}}  -> {printable(finding.remedy)}")
        return lines

    def json(self) -> str:
        """For a program: `{"ok": bool, "findings": [{"check", "status", "text", "todo"}]}`."""
        findings = [
            {"check": each.check, "status": each.status.value, "text": each.text, "todo": each.remedy}
            for each in self._findings
        ]
        return json.dumps({"ok": self.ok, "findings": findings}, indent=2)
