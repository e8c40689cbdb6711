"""Migrate a machine that writes records, with and without faults, and judge that none is lost: `python -m contrib.migration --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from contrib.boot.guest import BootError, default_folder, made
from contrib.migration.faults import BEFORE, DURING, Fault
from contrib.migration.guest import MigrationError
from contrib.migration.story import Told, lose_the_disk, tell_story


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m contrib.migration", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="rounds without a fault (%(default)s)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (%(default)s)")
    parser.add_argument(
        "--on-qedfs", action="store_true", help="the source is on a mount, too, and exported by qedfs serve"
    )
    parser.add_argument("--faults", action="store_true", help="also every fault; minutes")
    arguments = parser.parse_args()
    # An end from outside ends both machines, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    failures = 0
    print(
        "| seed | fault | outcome | downtime | streaming | records | lost |\n|---|---|---|---|---|---|---|", flush=True
    )
    try:
        for seed, told in rounds(arguments.first, arguments.seeds, arguments.faults, arguments.on_qedfs):
            failures += told.lost != 0
            print(line(seed, told), flush=True)
    except BootError as error:
        sys.exit(f"migration: {error}")
    sys.exit(failures > 0)


def rounds(first: int, seeds: int, faults: bool, on_qedfs: bool) -> Iterator[tuple[int, Told]]:
    """Give what each attempt of each round tells; a round that fails tells that instead."""
    guest = made(default_folder())
    plans: list[tuple[int, Sequence[Fault], Fault | None]] = [(seed, (), None) for seed in range(first, first + seeds)]
    if faults:
        plans += [(first, BEFORE, None), *((first, (), fault) for fault in DURING)]
    for seed, stays, move in plans:
        with tempfile.TemporaryDirectory(prefix="qedfs-migration-", ignore_cleanup_errors=True) as folder:
            try:
                story = tell_story(guest, Path(folder), seed, stays, move, on_qedfs=on_qedfs)
                yield from ((seed, told) for told in story)
            except (MigrationError, BootError) as error:
                yield seed, Told("none" if move is None else str(move), f"FAILED: {error}", lost=1)
    if faults:
        with tempfile.TemporaryDirectory(prefix="qedfs-migration-", ignore_cleanup_errors=True) as folder:
            try:
                yield first, lose_the_disk(guest, Path(folder), first)
            except (MigrationError, BootError) as error:
                yield first, Told("qedfs is killed", f"FAILED: {error}", lost=1)


def line(seed: int, told: Told) -> str:
    """Return one line of the table."""
    times = ["–" if value is None else f"{value:.2f} s" for value in (told.downtime, told.streaming)]
    counts = [str(told.records), str(told.lost)] if told.records else ["–", str(told.lost)]
    return "| " + " | ".join([str(seed), told.fault, told.outcome, *times, *counts]) + " |"


if __name__ == "__main__":
    main()
