"""Kill a serving process over and over and judge what is left: `python -m contrib.kill --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from contrib.kill.rounds import BATCH, Report, plans, run_rounds
from contrib.kill.stamps import Violation


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m contrib.kill", description=__doc__)
    parser.add_argument("--rounds", type=int, default=500, help=f"about {BATCH} on each leaf (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first leaf (%(default)s)")
    arguments = parser.parse_args()
    # An end from outside ends the servers and the mount in good order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    total = Report()
    for plan in plans(arguments.rounds, arguments.seed):
        with tempfile.TemporaryDirectory(prefix="qedfs-kill-") as folder:
            try:
                total += run_rounds(plan, Path(folder))
            except Violation as violation:
                sys.exit(f"kill: {violation}")
        print(total, flush=True)


if __name__ == "__main__":
    main()
