"""Schemathesis makes up requests from docs/reference/openapi.yaml and checks a running shim against it."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.support.processes import TOKEN, UNMEASURED, world

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "openapi.yaml"
EXAMPLES = int(os.environ.get("AGENT_SHIM_FUZZ_INPUTS", "10000")) // 500
# Its systematic phase alone makes 1,100 requests: that is for the long run.
PHASES = "examples,fuzzing" if EXAMPLES <= 20 else "examples,coverage,fuzzing"
# Left out: bodies are read leniently on purpose, on loopback no token is asked for with `listen.auth: auto`, and that
# an id must be printable is more than the document's patterns can say.
EXCLUDED = "negative_data_rejection,ignored_auth,missing_required_header,positive_data_acceptance"


@pytest.mark.timeout(120 + 20 * EXAMPLES)
async def test_the_running_shim_answers_as_its_document_says(tmp_path: Path) -> None:
    async with world(tmp_path, {"poll": {"hold": "off"}}) as (shim, _):
        await shim.start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", str(DOCUMENT), "--url", shim.url),
            *("--header", f"Authorization: Bearer {TOKEN}", "--exclude-checks", EXCLUDED),
            *("--max-examples", str(EXAMPLES), "--seed", "1", "--phases", PHASES),
            *("--continue-on-failure", "--warnings", "off", "--request-timeout", "30", "--no-color"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
            env=os.environ | UNMEASURED,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()[-6000:]
        assert not [line for line in shim.lines if "Traceback" in line]
        assert await shim.stop() == 0
