"""Mix everything on real mounts for a given time and watch the serving process: `python -m contrib.soak --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from contrib.kill.stamps import Violation
from contrib.soak.soak import Report, soak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m contrib.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments = parser.parse_args()
    # An end from outside ends the servers and the mounts in good order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = Report()
    with tempfile.TemporaryDirectory(prefix="qedfs-soak-") as folder:
        try:
            soak(arguments.minutes * 60, arguments.seed, Path(folder), report)
        except Violation as violation:
            # The sums of the sectors are made at the end, so they are missing here.
            sys.exit(f"{report.rounds} rounds, {report.samples[-1:]}\nsoak: {violation}")
    print(report, flush=True)


if __name__ == "__main__":
    main()
