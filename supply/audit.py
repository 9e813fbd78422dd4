"""`make audit`: known vulnerabilities of what the image runs, by pip-audit, or exit code 2 if they are unknown.

pip-audit calls a package that its source of advisories does not have "skipped" and says "no known vulnerabilities
found": behind a mirror without that service every package is. Here such a package counts as not audited.

Exit codes: 0 every package was audited and none has a known vulnerability; 1 some have; 2 some could not be audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from supply.locked import RUN, packages

VULNERABLE = 1
UNKNOWN = 2
_TIMEOUT_S = 120


def main(args: Sequence[str]) -> int:
    """Audit `requirements/run.txt`; `args` go to pip-audit (`--vulnerability-service osv`, say)."""
    command = [
        *(sys.executable, "-m", "pip_audit", "--requirement", str(RUN), "--require-hashes", "--disable-pip"),
        *("--format", "json", "--progress-spinner", "off", *args),
    ]
    try:
        done = subprocess.run(  # noqa: S603 - our own command, with the arguments of whoever runs make
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _unknown(f"the source of advisories did not answer within {_TIMEOUT_S} s")
    try:
        report: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return _unknown(f"pip-audit has no report: {last[0]}")
    return judge(report)


def judge(report: list[dict[str, Any]]) -> int:
    """Print the result of pip-audit's report, and return the exit code."""
    wanted = {package.name for package in packages()}
    audited = {entry["name"] for entry in report if "skip_reason" not in entry}
    found = [(entry["name"], entry["version"], each) for entry in report for each in entry.get("vulns", ())]
    for name, version, each in found:
        fixed = ", ".join(each.get("fix_versions", ())) or "no version"
        print(f"{name} {version}: {each['id']}, fixed in {fixed}")
    if found:
        return VULNERABLE
    if missing := sorted(wanted - audited):
        return _unknown(f"{len(missing)} of {len(wanted)} packages are unknown to it: {', '.join(missing)}")
    print(f"{len(audited)} packages audited, no known vulnerability")
    return 0


def _unknown(reason: str) -> int:
    print(f"NOT AUDITED: {reason}", file=sys.stderr)
    print("Run it where the advisories of PyPI or OSV can be reached.", file=sys.stderr)
    return UNKNOWN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
