"""Write the figures of docs/concepts/promises.md from the JSON beside it: `python -m tests.chaos.harness.pages`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.generate import command_edges, diagram
from shim.core.records import CommandState
from tests.chaos.harness.plot import Panel, plot

DOCS = Path(__file__).parents[3] / "docs"
PAGE, DATA = DOCS / "concepts" / "promises.md", DOCS / "concepts" / "promises.json"
PLOT = DOCS / "concepts" / "soak.svg"
OF_OTHER_RUNS = ("gateway", "soak")

WORDS = {
    "controller_killed": "the controller is killed and comes back",
    "controller_restarted": "the controller is stopped in an orderly way and comes back",
    "controller_forgetful": "the controller is killed and comes back without its registrations",
    "refuse_401": "handshakes are refused with 401",
    "refuse_403": "handshakes are refused with 403",
    "refuse_429": "handshakes are refused with 429 and `Retry-After`",
    "refuse_503": "handshakes are refused with 503",
    "refuse_503_later": "handshakes are refused with 503 and `Retry-After`",
    "accept_then_close": "connections are accepted and closed at once",
    "hang_handshake": "handshakes are not answered",
    "half_open": "the connection stays open, and nothing passes",
    "stalled": "pings are answered, nothing else is",
    "drop_close": "the connection is closed by a close frame",
    "drop_rst": "the connection is reset",
    "result_lost": "the connection is reset when a result arrives, before it is handled",
    "result_cut": "the connection ends right after a result was handled",
    "register_unanswered": "registrations are not answered",
    "register_in_progress": "registrations are answered late, after `register_in_progress`",
    "register_closes": "the connection is closed right after each registration",
    "not_registered": "heartbeats and results are answered `not registered`",
    "no_acks": "heartbeats are not acknowledged",
    "new_ids": "registrations yield other cluster ids than before",
    "gateway": "registrations redirect to a gateway",
    "slow": "50 ms a message and 20 kB/s",
    "delay": "messages come 0.7 s late and overtake each other",
    "duplicate": "each message comes three times",
    "reorder": "messages come in another order",
    "garbage": "frames that are no messages",
    "oversize": "frames larger than `upstream.max_message_bytes`",
    "binary": "messages in binary frames",
    "cut": "packets are dropped silently",
    "reset": "every packet is answered with a reset",
    "loss": "5 to 25 % of the packets are lost",
    "latency": "20 to 220 ms each way",
    "narrow": "64 to 264 kbit/s",
    "dns_hangs": "the name server answers nothing, and the connection is reset",
    "kill": "`kill -9` of the shim",
    "sigterm": "SIGTERM to the shim, and a new start",
    "clock": "the wall clock is set up to six hours forth and back",
    "paused": "the shim is paused (SIGSTOP) and goes on",
    "unread_log": "nobody reads the shim's log: pipe and queue are full",
    "memory_limit": "the shim has hardly more memory than it needs: the kernel may kill it",
    "crash_frame_read": "`kill -9` when a command's frame was read",
    "crash_before_commit": "`kill -9` before the command is written",
    "crash_in_commit": "`kill -9` at the COMMIT",
    "crash_after_commit": "`kill -9` after the COMMIT, before anybody knows of it",
    "crash_before_reply": "`kill -9` before the poll's reply is written",
    "crash_after_reply": "`kill -9` after the poll's reply was written",
    "crash_result_stored": "`kill -9` between a result's commit and its sending",
    "crash_result_sent": "`kill -9` right after a result was sent",
    "disk_full": "the disk is full to the last byte",
    "locked": "another process holds the database's write lock",
    "pinned_wal": "another process keeps a read transaction open: the write-ahead log grows",
    "read_only": "the shim comes back on a read-only file system",
    "newer_schema": "the shim comes back to the database of a newer one",
    "corrupted": "the database is overwritten while the shim is down",
    "truncated": "the database is cut off while the shim is down",
    "agent_dies": "an agent is killed and comes back",
    "agent_new_pod": "an agent comes back with another agent id and the same cluster id",
    "agent_forgets_id": "an agent comes back without its cluster id and registers again",
    "agent_is_away": "an agent is dead for so long that its session is not fresh; then the link reconnects",
}


def blocks(found: dict[str, Any]) -> dict[str, list[str]]:
    """The generated parts of the page, by the name in their markers."""
    return {
        "diagram": diagram(CommandState.QUEUED, CommandState, command_edges()).splitlines(),
        "run": list(_run(found)),
        "faults": list(_faults(found)),
        "commands": list(_commands(found)),
        "recovery": list(_recovery(found)),
        "herd": list(_herd(found)),
        "gateway": list(_gateway(found["gateway"])) if found.get("gateway") else [],
        "soak": list(soak_table(found["soak"])) if found.get("soak") else [],
    }


def _machine(found: dict[str, Any]) -> str:
    known = found["machine"]
    return (
        f"- {known['date']}; {known['processor']}, {known['cores']} cores, {known['system']}, Python {known['python']}"
    )


def _run(found: dict[str, Any]) -> Iterator[str]:
    minutes = sum(one["duration_s"] for one in found["rounds"]) / 60
    paces = sorted({one["pace"] for one in found["rounds"]})
    speed = " and ".join("as real ones" if pace == 1 else f"{pace:g} times as fast as real ones" for pace in paces)
    yield _machine(found)
    yield f"- {len(found['rounds'])} rounds, {minutes:.0f} minutes of faults; agents and time-outs {speed}"
    yield f"- seed {found['rounds'][0]['seed']}; the shim was started {found['shim_starts']} times"
    yield f"- broken promises that the checker found: **{len(found['violations'])}**"


def _faults(found: dict[str, Any]) -> Iterator[str]:
    yield from ("| fault | injected |", "|---|---:|")
    for kind, words in WORDS.items():
        yield f"| {words} | {found['faults'].get(kind, 0) or found.get('impossible', {}).get(kind, 0)} |"
    for way, times in found["rude_calls"].items():
        yield f"| an agent {way} | {times} |"


def _commands(found: dict[str, Any]) -> Iterator[str]:
    commands = found["commands"]
    unreported = sum(1 for violation in found["violations"] if violation["rule"] == "result")
    yield from ("| commands | |", "|---|---:|")
    yield f"| pushed by the controller | {commands['pushed']} |"
    yield f"| accepted by the shim | {commands['accepted']} |"
    yield f"| received by their agents | {commands['received']} |"
    for code, times in commands["ended_by_code"].items():
        yield f"| reported to the controller as `{code}` | {times} |"
    yield f"| **accepted and lost** | **{commands['lost']}** |"
    gone = commands["gone_with_destroyed_databases"]
    yield f"| gone with the {found['stores_lost']} databases that were destroyed, the named exception | {gone} |"
    if commands.get("wait_for_an_id_of_before"):
        waiting = commands["wait_for_an_id_of_before"]
        yield f"| waiting for a cluster id that an agent had before, so that they will end as `expired` | {waiting} |"
    yield f"| replies taken back and offered again, no attempt | {commands['offers_taken_back']} |"
    for reason, times in commands["redelivered_by_reason"].items():
        yield f"| offered again, reason: {reason} | {times} |"
    yield f"| received more than once | {commands['received_more_than_once']} |"
    yield f"| results that agents got a 2xx for | {commands['results_taken']} |"
    yield f"| **of these never at the controller** | **{unreported}** |"
    yield f"| results that the controller got more than once | {commands['results_reported_more_than_once']} |"


def _recovery(found: dict[str, Any]) -> Iterator[str]:
    yield from ("| | n | p50 | p95 | p99.9 | longest |", "|---|---:|---:|---:|---:|---:|")
    names = {
        "link_back": "online again after the controller's return",
        "half_open_found": "half-open connection given up",
        "stalled_found": "stalled application given up",
        "cut_found": "connection given up whose packets vanish",
    }
    links = {f"real settings, {found['links']['links']} links at once": found["links"]} if "links" in found else {}
    for pace, kinds in ({"real settings, virtual time": found["virtual"]} | links | found["recovery"]).items():
        for kind, d in kinds.items():
            if kind in names and d["count"]:
                times = " | ".join(f"{d[share]:.2f} s" for share in ("p50", "p95", "p99.9", "max"))
                yield f"| {names[kind]} ({pace}) | {d['count']} | {times} |"
    stops = found["stops"]
    times = " | ".join(f"{stops[share]:.2f} s" for share in ("p50", "p95", "p99.9", "max"))
    yield f"| gone after SIGTERM | {stops['count']} | {times} |"
    yield f"| the shim's event loop late, with what the machine took | | | | | {found['loop_blocked_max_s']:.2f} s |"
    yield f"| the harness's own event loop late, which does little | | | | | {found['harness_late_max_s']:.2f} s |"


def _herd(found: dict[str, Any]) -> Iterator[str]:
    yield "| outage | attempts in it | uniform, per second | busiest second | ratio | all back after |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for herd in found["herd"]:
        asked = ", then `Retry-After: 30`" if herd["asked_to_wait"] else ""
        yield (
            f"| {herd['outage_s']:g} s{asked} | {herd['attempts']} | {herd['uniform_per_s']:.0f} |"
            f" {herd['peak_per_s']:.0f} | {herd['ratio']:.2f} | {herd['back_s']:.1f} s |"
        )


def _gateway(found: dict[str, Any]) -> Iterator[str]:
    commands, stops = found["commands"], found["stops"]
    yield _machine(found)
    minutes = found["duration_s"] / 60
    yield f"- {minutes:.0f} minutes of faults, seed {found['seed']}, settled in {found['settled_s']:.1f} s"
    yield f"- broken promises that the checker found: **{len(found['violations'])}**"
    yield from ("", "| three replicas, a primary and a synchronous standby | |", "|---|---:|")
    for fault, times in found["faults"].items():
        yield f"| {fault} | {times} |"
    yield f"| commands accepted | {commands['accepted']} |"
    yield f"| received by their agents | {commands['received']} |"
    for code, times in commands["ended_by_code"].items():
        yield f"| reported to the controller as `{code}` | {times} |"
    yield f"| **accepted and lost** | **{_broken(found, 'lost')}** |"
    yield f"| received more than once | {commands['received_more_than_once']} |"
    yield f"| results that agents got a 2xx for | {commands['results_taken']} |"
    yield f"| **times that two owners of a link sent** | **{_broken(found, 'sole_owner')}** |"
    yield f"| longest stop of a replica by SIGTERM ({stops['count']}) | {stops['max']:.1f} s |"


def soak_table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show a soak."""
    commands, samples = found["commands"], found["samples"]
    settled = samples[len(samples) // 10 :]
    yield _machine(found)
    yield f"- {found['duration_s'] / 60:.0f} minutes, seed {found['seed']}; {found['agents']} agents; a poll after"
    yield f"  {found['batch']} heartbeats; every second agent pipelines these"
    yield from ("", "| one shim, nothing fails | |", "|---|---:|")
    yield f"| **calls** | **{sum(found['calls'].values()):,}** |"
    for kind, times in found["calls"].items():
        yield f"| {kind} | {times:,} |"
    yield f"| calls that were refused | {sum(found['refused'].values())} |"
    yield f"| commands acknowledged | {commands['acked']:,} |"
    yield f"| received by their agents | {commands['received']:,} |"
    yield f"| **acknowledged and lost** | **{commands['lost']}** |"
    yield f"| received more than once | {commands['received_more_than_once']} |"
    yield f"| results that agents got a 2xx for | {commands['results_taken']:,} |"
    yield f"| **of these never at the controller** | **{commands['results_lost']}** |"
    yield f"| lines in the log | {found['log']['lines']:,} |"
    yield f"| **errors and exceptions among them** | **{len(found['log']['unexplained'])}** |"
    for name, key in (("memory (PSS)", "pss_mib"), ("write-ahead log", "wal_mib")):
        values = [sample[key] for sample in settled]
        yield f"| {name} after the first tenth: from, to, at the end | {min(values)}, {max(values)}, {values[-1]} MiB |"
    files = [sample["files"] for sample in settled]
    yield f"| file descriptors after the first tenth: from, to | {min(files)}, {max(files)} |"
    yield f"| longest delay of the event loop, with what the machine took | {found['longest_lag_s']:.2f} s |"
    yield f"| the shim's loop was ready to run and had no processor | {found['waited_for_processor_s']} s |"


def drawn(found: dict[str, Any]) -> str:
    """Return the plot of a soak."""
    samples = found["samples"]

    def series(key: str) -> list[float]:
        return [sample[key] for sample in samples]

    panels = (
        Panel("memory, MiB", {"RSS": series("rss_mib"), "PSS": series("pss_mib")}),
        Panel("file descriptors", {"open": series("files")}),
        Panel("database, MiB", {"write-ahead log": series("wal_mib"), "file": series("database_mib")}),
        Panel("delay of the event loop, ms (mean of 5 s)", {"measured": series("lag_ms")}),
        Panel("time in which the loop waited for a processor, %", {"machine": series("waited_percent")}),
    )
    return plot([sample["at_s"] / 60 for sample in samples], panels)


def _broken(found: dict[str, Any], rule: str) -> int:
    return sum(1 for violation in found["violations"] if violation["rule"] == rule)


def rendered(page: str, found: dict[str, Any]) -> str:
    """The page with its generated parts made anew."""
    for name, lines in blocks(found).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = "\n".join([before + begin, *lines, end + after])
    return page


def write(found: dict[str, Any]) -> None:
    """Keep the figures, and put them into the page. Those of `OF_OTHER_RUNS` stay as they are."""
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    _keep({key: known[key] for key in OF_OTHER_RUNS if key in known} | found)


def write_gateway(found: dict[str, Any]) -> None:
    """Keep the figures of several replicas beside the others', and put them into the page."""
    _keep(json.loads(DATA.read_text()) | {"gateway": found})


def write_soak(found: dict[str, Any]) -> None:
    """Keep the figures of a soak beside the others', put them into the page, and draw them."""
    PLOT.write_text(drawn(found))
    _keep(json.loads(DATA.read_text()) | {"soak": found})


def _keep(found: dict[str, Any]) -> None:
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text(), found))


if __name__ == "__main__":
    kept = json.loads(DATA.read_text())
    PLOT.write_text(drawn(kept["soak"]))
    write(kept)
