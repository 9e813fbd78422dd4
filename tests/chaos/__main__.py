"""`python -m tests.chaos`: play rounds, judge them, print a table. Exit code 1 if a promise was broken."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.harness.agents import NAMELESS
from tests.chaos.harness.checker import case, check
from tests.chaos.harness.events import read
from tests.chaos.harness.links import measured
from tests.chaos.harness.pages import write
from tests.chaos.harness.report import figures, simulated, table
from tests.chaos.harness.runner import Plan, Played, Round
from tests.chaos.harness.schedule import MEMORY_LIMIT, NETWORK, STORE, Decks
from tests.support import disks, memory, network

FIGURES = Path("build/faults.json")
SHORT = ((60.0, 10.0),) * 3
LONG = ((120.0, 10.0), (480.0, 1.0)) * 6


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="play what was played before; default: a new one")
    parser.add_argument("--long", action="store_true", help="an hour instead of a few minutes")
    parser.add_argument("--rounds", type=int, help="only so many of the rounds; with --long they are 2 and 8 minutes")
    parser.add_argument("--seconds", type=float, help="one round of this length")
    parser.add_argument("--pace", type=float, default=10.0, help="with --seconds: how much faster than real")
    parser.add_argument("--links", action="store_true", help="many links at real pace beside; --long has them anyway")
    parser.add_argument("--only", default="", help="only faults of these kinds (comma-separated)")
    parser.add_argument("--json", type=Path, default=FIGURES, help=f"write the figures there; default: {FIGURES}")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/concepts/promises.md")
    parser.add_argument("--keep", type=Path, help="keep histories, logs and databases there")
    parser.add_argument("--judge", type=Path, help="play nothing: judge the histories that were kept there")
    return parser.parse_args(given)


def impossible(folder: Path) -> dict[str, str]:
    """Return the faults that this machine does not permit, with the reasons."""
    disk = "" if disks.permitted(folder) else "a small disk is not permitted here"
    reasons = {**dict.fromkeys(NETWORK.kinds, network.permitted()), **dict.fromkeys(STORE.kinds, disk)}
    reasons[MEMORY_LIMIT] = memory.permitted()
    return {kind: reason for kind, reason in reasons.items() if reason}


async def play(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Play all rounds, one after another, and the many links beside them; returns the figures."""
    left_out = impossible(folder)
    hosts = None if NETWORK.kinds[0] in left_out else network.TwoHosts()
    async with asyncio.TaskGroup() as group:
        links = group.create_task(play_links(options, folder, hosts))
        played = group.create_task(play_rounds(options, folder, hosts, left_out))
    return figures(played.result()) | links.result() | {"impossible": left_out}


async def play_links(options: argparse.Namespace, folder: Path, hosts: network.TwoHosts | None) -> dict[str, Any]:
    """Play many links at real pace, if they are wanted."""
    if not options.links:
        return {}
    place = folder / "links"
    place.mkdir()
    return {"links": await measured(place, hosts)}


async def play_rounds(
    options: argparse.Namespace, folder: Path, hosts: network.TwoHosts | None, left_out: dict[str, str]
) -> list[Played]:
    """Play all rounds, one after another."""
    small_disks, limits = STORE.kinds[0] not in left_out, MEMORY_LIMIT not in left_out
    decks = Decks(options.seed, network=hosts is not None, store=small_disks, memory=limits)
    rounds = ((options.seconds, options.pace),) if options.seconds else LONG if options.long else SHORT
    rounds = rounds[: options.rounds]
    played = []
    for number, (duration_s, pace) in enumerate(rounds):
        faults = decks.run(duration_s, pace, rare=number % 2 == 1)
        if options.only:
            faults = [fault for fault in faults if fault.kind in options.only.split(",")]
        plan = Plan(options.seed + number, duration_s, pace, faults, commands_per_s=25 if pace > 1 else 5)
        place = folder / f"round-{number}"
        place.mkdir(parents=True)
        async with aiohttp.ClientSession() as session:
            one = await Round(plan, place, session, hosts).play()
        (place / "shim.log").write_text("\n".join(one.log))
        print(
            f"round {number + 1} of {len(rounds)}: {len(faults)} faults, settled in {one.settled_s:.1f} s", flush=True
        )
        played.append(one)
    return played


def judge(kept: Path) -> int:
    """Say what is wrong with kept histories."""
    histories = sorted(kept.rglob("history.jsonl"))
    found = [(path, violation) for path in histories for violation in check(case(read(path), NAMELESS))]
    for path, violation in found:
        print(f"{path.parent.name}: {violation}")
    print(f"histories: {len(histories)}; violations: {len(found)}")
    return 1 if found or not histories else 0


def main(given: Sequence[str]) -> int:
    options = arguments(given)
    if options.judge is not None:
        return judge(options.judge)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1_000_000)
        given = [*given, "--seed", str(options.seed)]
    reason = network.permitted()
    if not reason:
        code = network.reenter("tests.chaos", given)
        if code is not None:
            return code
    logging.getLogger().addHandler(logging.NullHandler())  # the shims in virtual time have much to say
    limits = memory.permitted()
    print(f"seed {options.seed}; network faults: {reason or 'yes'}; memory limits: {limits or 'yes'}", flush=True)
    options.links = options.links or options.long
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(play(options, folder)) | simulated()
    print("\n".join(table(found)))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.docs:
        write(found)
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
