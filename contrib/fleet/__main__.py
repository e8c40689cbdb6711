"""Boot fleets of hosts from one web server far away, through a cache near them, and count: `python -m contrib.fleet --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from contrib.bench.rig import BenchError, need
from contrib.fleet.story import (
    Fleet,
    Plan,
    Wave,
    fleet,
    replace_the_base,
    stop_the_origin,
)
from contrib.fleet.trace import MIB


def main() -> None:
    plan = Plan()
    parser = argparse.ArgumentParser(prog="python -m contrib.fleet", description=__doc__)
    parser.add_argument("--hosts", default="1,4,16", help="how many boot at once (%(default)s)")
    parser.add_argument("--size", type=int, default=plan.size // MIB, help="MiB of the base (%(default)s)")
    parser.add_argument("--slice", type=int, default=plan.slice >> 10, help="KiB of a slice (%(default)s)")
    parser.add_argument("--rate", type=float, default=plan.rate * 8 / 1e6, help="Mbit/s of the link (%(default)s)")
    parser.add_argument(
        "--round-trip", type=float, default=plan.round_trip * 1000, help="milliseconds of the link (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where the images go")
    arguments = parser.parse_args()
    # An end from outside ends the servers and the mounts in good order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = Plan(
        size=arguments.size * MIB,
        slice=arguments.slice << 10,
        rate=arguments.rate * 1e6 / 8,
        round_trip=arguments.round_trip / 1000,
    )
    try:
        need("nginx", "fusermount3")
        with (
            tempfile.TemporaryDirectory(prefix="qedfs-fleet-", dir=arguments.folder) as folder,
            fleet(Path(folder), plan) as made,
        ):
            clusters, slices = made.touched(64 << 10) / MIB, made.touched(plan.slice) / MIB
            print(
                f"A boot reads {len(made.trace)} times, in {clusters:.0f} MiB of clusters, {slices:.0f} MiB of slices.\n"
            )
            print(
                "| hosts | way | slowest boot | longest read | asked of the origin | MiB from the origin |", flush=True
            )
            print("|---|---|---:|---:|---:|---:|")
            for count in map(int, arguments.hosts.split(",")):
                for way, wave in boots(made, count):
                    print(line(f"{count} | {way}", wave), flush=True)
            tell(made)
    except BenchError as error:
        sys.exit(f"fleet: {error}")


def boots(made: Fleet, count: int) -> Iterator[tuple[str, Wave]]:
    """Boot so many hosts in each way."""
    yield "no cache", made.wave(count, made.far)
    with made.cached() as name:
        yield "an empty cache", made.wave(count, name)
        yield "the same again", made.wave(count, name)
    with made.cached(lock=False) as name:
        yield "an empty cache without a lock", made.wave(count, name)


def tell(made: Fleet) -> None:
    """Print what the other stories have come to."""
    print(line("1 | an origin that is away, a cache that is not", stop_the_origin(made)), flush=True)
    replaced = replace_the_base(made)
    print(f"\nBase replaced. Running, refused after {replaced.seconds:.1f} s: {replaced.running}")
    print(
        f"Mounted anew: {replaced.mounted}\nA new leaf: booted from the new content in {replaced.fresh.seconds:.1f} s"
    )


def line(title: str, wave: Wave) -> str:
    slowest, longest = (max(map(which, wave.boots)) for which in SHOWN)
    return f"| {title} | {slowest:.1f} s | {longest:.2f} s | {wave.origin.answers} | {wave.origin.bytes / MIB:.0f} |"


SHOWN: tuple[Callable[..., float], ...] = (lambda boot: boot.seconds, lambda boot: boot.longest)


if __name__ == "__main__":
    main()
