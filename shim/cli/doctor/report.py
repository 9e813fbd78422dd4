"""Report of an examination: one line per check, with a remedy for each fault."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from shim.core.text import printable
from shim.redaction import Redaction


class Status(Enum):
    """Outcome of a check."""

    PASS = "PASS"  # noqa: S105 - no password
    WARN = "WARN"  # it works, or may work, but needs attention
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check. `remedy` says what to do; it is empty if nothing is wrong."""

    check: str
    status: Status
    text: str
    remedy: str = ""


def passed(check: str, text: str) -> Finding:
    """Return a finding without a fault."""
    return Finding(check, Status.PASS, text)


def warned(check: str, text: str, todo: str = "") -> Finding:
    """Return a finding that needs attention."""
    return Finding(check, Status.WARN, text, todo)


def failed(check: str, text: str, todo: str) -> Finding:
    """Return a finding that prevents the shim from working."""
    return Finding(check, Status.FAIL, text, todo)


class Report:
    """All findings in the order of the checks. Secrets known to `redaction` are masked."""

    def __init__(self, redaction: Redaction) -> None:
        self.redaction = redaction
        self._findings: list[Finding] = []

    def add(self, findings: Iterable[Finding]) -> None:
        """Add the findings of a check."""
        for each in findings:
            text, todo = self.redaction.text(each.text), self.redaction.text(each.remedy)
            self._findings.append(Finding(each.check, each.status, text, todo))

    @property
    def ok(self) -> bool:
        """Return True if no check failed."""
        return not any(finding.status is Status.FAIL for finding in self._findings)

    def lines(self) -> list[str]:
        """Format for people: `PASS check  text`, and the remedy on a line of its own."""
        width = max((len(finding.check) for finding in self._findings), default=0)
        lines = []
        for finding in self._findings:
            lines.append(f"{finding.status.value}  {finding.check:<{width}}  {printable(finding.text)}")
            if finding.remedy:
                lines.append(f"      {'':<{width}}  -> {printable(finding.remedy)}")
        return lines

    def json(self) -> str:
        """Format for programs: `{"ok": bool, "findings": [{"check", "status", "text", "todo"}]}`."""
        findings = [
            {"check": each.check, "status": each.status.value, "text": each.text, "todo": each.remedy}
            for each in self._findings
        ]
        return json.dumps({"ok": self.ok, "findings": findings}, indent=2)
