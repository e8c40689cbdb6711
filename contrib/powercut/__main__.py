"""The long form of the power-cut simulation: `python -m contrib.powercut --help`."""

from __future__ import annotations

import argparse
import sys

import trio

from qedfs.errors import QedfsError
from tests.powercut.commit_model import Broken
from tests.powercut.commit_model import explore as explore_model
from tests.powercut.exploring import Effort, explore
from tests.powercut.workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m contrib.powercut", description=__doc__)
    parser.add_argument(
        "--limit", type=int, default=1 << 16, help="combinations up to which all are made (%(default)s)"
    )
    parser.add_argument("--samples", type=int, default=5000, help="in a window with more (%(default)s)")
    parser.add_argument("--lives", type=int, default=1000, help="second lives in each workload at most (%(default)s)")
    parser.add_argument("--cuts", type=int, default=100, help="samples in each window of a second life (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (%(default)s)")
    parser.add_argument("--only", choices=list(WORKLOADS), help="one workload")
    parser.add_argument("--no-model", action="store_true", help="leave the model of the commit out (minutes)")
    arguments = parser.parse_args()
    effort = Effort(arguments.limit, arguments.samples, arguments.lives, arguments.cuts)
    for name in [arguments.only] if arguments.only else WORKLOADS:
        try:
            print(f"{name:26}", trio.run(_one, name, effort, arguments.seed), flush=True)
        except (AssertionError, QedfsError) as error:
            sys.exit(f"powercut: {name}: {error}")
    if not arguments.no_model and not arguments.only:
        try:
            states, depth = explore_model(failures=1, crashes=1)
            explore_model("no flush 4")  # covered by that of step 2: docs/durability.md
        except Broken as broken:
            sys.exit(f"powercut: model of the commit: {broken}")
        print(f"{'model of the commit':26} {states} states, {depth} steps deep, complete")


async def _one(name: str, effort: Effort, seed: int) -> object:
    return await explore(await WORKLOADS[name](), effort, seed)


if __name__ == "__main__":
    main()
