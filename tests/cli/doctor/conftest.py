"""The real `agent-shim doctor`, run against real servers; whatever it prints, no secret is in it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from shim.cli.commands import cli

TOKEN = "canary-token-of-the-upstream"
PASSWORD = "canary-password-of-the-proxy"
QUERY = "canary-query-of-the-upstream-url"


class Diagnosis:
    """What doctor said: exit code, findings by check."""

    def __init__(self, code: int, text: str) -> None:
        assert "canary" not in text, text
        self.code = code
        told = json.loads(text)
        assert told["ok"] is (code == 0), text
        self.findings: dict[str, dict[str, str]] = {each["check"]: each for each in told["findings"]}
        self.order = list(self.findings)

    def expect(self, check: str, status: str, *parts: str) -> None:
        """The line of a check; what is not PASS says what to do."""
        assert check in self.findings, self.order
        finding = self.findings[check]
        whole = f"{finding['text']} -> {finding['todo']}"
        assert finding["status"] == status, (check, finding)
        assert all(part in whole for part in parts), (whole, parts)
        assert finding["todo"] or status == "PASS" or check == "store", finding

    @property
    def failing(self) -> list[str]:
        return [check for check, finding in self.findings.items() if finding["status"] == "FAIL"]


class Doctor:
    """Writes a configuration and runs doctor on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "doctor.yaml"
        self.environment: dict[str, str] = {}

    async def run(self, *options: str, **sections: Any) -> tuple[int, str]:
        """Exit code and output."""
        config: dict[str, Any] = {
            "store": {"path": str(self.folder / "agent-shim.db")},
            "listen": {"port": 0},
            "admin": {"port": 0},
        }
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values} if isinstance(values, dict) else values
        self.path.write_text(yaml.safe_dump(config))
        # in a thread, because the command has an event loop of its own and the servers are on that of the test
        arguments = ["doctor", "--config", str(self.path), *options]
        result = await asyncio.to_thread(CliRunner().invoke, cli, arguments, env=self.environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.stderr == ""
        return result.exit_code, result.stdout

    async def examine(self, *options: str, **sections: Any) -> Diagnosis:
        """What it finds."""
        return Diagnosis(*await self.run("--json", *options, **sections))


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


def upstream(url: str, **more: Any) -> dict[str, Any]:
    """A section that carries secrets wherever it can."""
    return {"url": f"{url}?key={QUERY}", "token": TOKEN, "connect_timeout_s": 5, **more}
