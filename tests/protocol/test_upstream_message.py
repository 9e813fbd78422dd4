"""Results are no longer than the controller takes (docs/reference/protocol.md#2-upstream-side-the-websocket)."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol.upstream_message import fit

TEXT = st.text(max_size=3000) | st.sampled_from(["\x00" * 2000, "ü" * 2000, '"' * 2000, "x" * 5000])


def size(payload: dict[str, Any]) -> int:
    return len(msgspec.json.encode(payload))


def test_what_fits_is_left_alone() -> None:
    payload = {"command_id": "k1", "output": "x" * 100}
    assert fit(payload, 200) is payload


def test_the_longer_text_is_cut_and_the_loss_is_told() -> None:
    cut = fit({"command_id": "k1", "success": False, "output": "x" * 10_000, "error": "y" * 100}, 4000)
    assert cut["error"] == "y" * 100
    assert len(cut["output"]) > 3000
    assert cut["metadata"] == {"output_truncated_bytes": 10_000 - len(cut["output"])}
    assert (cut["command_id"], cut["success"]) == ("k1", False)


def test_metadata_beyond_measure_is_dropped() -> None:
    cut = fit({"command_id": "k1", "output": "short", "metadata": {"log": "x" * 10_000}}, 4000)
    assert cut["output"] == "short"
    assert set(cut["metadata"]) == {"metadata_dropped_bytes"}


@given(
    st.dictionaries(st.sampled_from(["output", "error"]), TEXT), st.dictionaries(st.text(max_size=5), TEXT, max_size=3)
)
def test_never_longer_and_never_more_than_a_beginning(texts: dict[str, str], metadata: dict[str, str]) -> None:
    payload = {"command_id": "k1", "success": True, **texts, "metadata": metadata}
    cut = fit(payload, 2000)
    assert size(cut) <= 2000
    for key, text in texts.items():
        assert text.startswith(cut[key])
    assert cut["command_id"] == "k1"
