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

import aiohttp

from tests.chaos.harness.agents import NAMELESS
from tests.chaos.harness.checker import case, check
from tests.chaos.harness.events import read
from tests.chaos.harness.pages import write
from tests.chaos.harness.report import figures, simulated, table
from tests.chaos.harness.runner import Plan, Played, Round
from tests.chaos.harness.schedule import Decks
from tests.support import disks, network

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
    parser.add_argument("--only", default="", help="only faults of these kinds (comma-separated)")
    parser.add_argument("--json", type=Path, default=FIGURES, help=f"write the figures there; default: {FIGURES}")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/concepts/promises.md")
    parser.add_argument("--keep", type=Path, help="keep histories, logs and databases there")
    parser.add_argument("--judge", type=Path, help="play nothing: judge the histories that were kept there")
    return parser.parse_args(given)


async def play(options: argparse.Namespace, folder: Path) -> list[Played]:
    """All rounds, one after another."""
    hosts = None if network.permitted() else network.TwoHosts()
    small_disks = disks.permitted(folder)
    decks = Decks(options.seed, network=hosts is not None, store=small_disks)
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
    print(f"seed {options.seed}; network faults: {reason or 'yes'}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = figures(asyncio.run(play(options, folder))) | simulated()
    print("\n".join(table(found)))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.docs:
        write(found)
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
