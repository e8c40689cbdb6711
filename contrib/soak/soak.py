"""The long haul: one mount that lives all the time and is watched, and one that ends in another way each round."""

from __future__ import annotations

import random
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from contrib.kill.rounds import PATIENCE, QEDFS, run
from contrib.kill.stamps import SECTOR, Violation
from contrib.soak.served import KINDS, Bases, Served
from contrib.soak.watch import Sample, judge, sample

LOAD = 4.0
"""Seconds of load in a round."""
PAUSE = 0.1
"""Seconds between two disturbances."""
OUTAGE = 1.0
"""Seconds for which the NBD server is away."""
ENDS = ("kill", "lazy", "unmount")


@dataclass
class Report:
    """What was done. Sectors are versions of sectors, summed over all leaves of both mounts."""

    rounds: int = 0
    seconds: float = 0
    issued: int = 0
    acknowledged: int = 0
    growths: int = 0
    disturbances: int = 0
    outages: int = 0
    transferred: int = 0
    """Bytes that the watched process read and wrote, as the kernel counts them (all its system calls)."""
    ends: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDS, 0))
    samples: list[Sample] = field(default_factory=list)

    def __str__(self) -> str:
        curve = self.samples[:: max(1, len(self.samples) // 20)]
        return "\n".join(
            (
                f"rounds {self.rounds} in {self.seconds:.0f} s, ends {self.ends}",
                f"sectors issued {self.issued} ({self.issued * SECTOR >> 20} MiB), acknowledged {self.acknowledged}, lost 0",
                f"growths {self.growths}, disturbances {self.disturbances}, NBD servers killed {self.outages}",
                f"transferred by the watched process {self.transferred >> 20} MiB",
                f"RSS in MiB {' '.join(f'{s.rss / 2**20:.1f}' for s in curve)}",
                f"file descriptors {' '.join(str(s.fds) for s in curve)}",
                f"threads {' '.join(str(s.threads) for s in curve)}",
            )
        )


def soak(seconds: float, seed: int, folder: Path, report: Report, *, least: int = 1) -> None:
    """Go on in `folder`, an empty directory, until `seconds` have passed and `least` rounds are over; fill `report`.

    Raises:
        Violation: a promise was broken, or the watched process leaks; `report` tells what was done until then.
    """
    with ExitStack() as stack:
        (folder / "bases").mkdir()
        bases = Bases(folder / "bases", seed, stack)
        steady = Served(folder / "steady", bases, seed, stack)
        ending = Served(folder / "ending", bases, seed + 1, stack)
        choice = random.Random(seed)
        start = time.monotonic()
        watched = steady.mount()
        while time.monotonic() < start + seconds or report.rounds < least:
            end = ENDS[report.rounds % len(ENDS)]
            try:
                _round(report, bases, steady, ending, end, choice)
                report.samples.append(sample(watched.pid))
            except (Violation, OSError, subprocess.SubprocessError) as error:
                raise Violation(f"seed {seed}, round {report.rounds} ({end}): {error!r}") from error
            report.rounds += 1
            report.ends[end] += 1
            report.seconds = time.monotonic() - start
        io = psutil.Process(watched.pid).io_counters()
        report.transferred = io.read_chars + io.write_chars
        _unmount(steady, watched)
        steady.check_leaves()
        for served in (steady, ending):
            served.count()
            report.issued += served.issued
            report.acknowledged += served.acknowledged
            report.growths += sum(served.grown.values())
    judge(report.samples)


def _round(report: Report, bases: Bases, steady: Served, ending: Served, end: str, choice: random.Random) -> None:
    server = ending.mount()
    for served in (steady, ending):
        served.add_guest(KINDS[report.rounds // len(ENDS) % len(KINDS)])
    steady.start(report.rounds * 2, LOAD)
    ending.start(report.rounds * 2 + 1, 0 if end == "kill" else LOAD)
    _disturb(report, bases, steady, ending, LOAD * choice.uniform(0.4, 0.8))
    if end == "kill":
        server.kill()
    elif end == "lazy":
        run(*QEDFS, "unmount", "--lazy", str(ending.point))
    ending.ended()
    steady.ended()
    if end == "unmount":
        ending.remove_guest()
        _unmount(ending, server)
    elif server.wait(PATIENCE) and end == "lazy":
        raise Violation(f"the server ended with status {server.returncode}")
    ending.detach()
    ending.check_leaves()
    ending.drop_guest()
    steady.remove_guest()
    for kind in KINDS:
        steady.judge(kind, settle=False)
    steady.check_copies()


def _disturb(report: Report, bases: Bases, steady: Served, ending: Served, seconds: float) -> None:
    """Disturb both mounts while the NBD server goes, and comes back."""
    start = time.monotonic()
    stopped: float | None = None
    up = True
    # However slow a disturbance is, the server goes once, and comes back.
    while time.monotonic() < start + seconds or stopped is None or not up:
        now = time.monotonic()
        if stopped is None and now >= start + seconds / 4:
            bases.stop_server()
            stopped, up = now, False
            report.outages += 1
        elif stopped is not None and not up and now >= stopped + OUTAGE:
            bases.start_server()
            up = True
        for served in (steady, ending):
            served.disturb()
            report.disturbances += 1
        time.sleep(PAUSE)


def _unmount(served: Served, server: subprocess.Popen[bytes]) -> None:
    run(*QEDFS, "unmount", str(served.point))
    if server.wait(PATIENCE):
        raise Violation(f"the server ended with status {server.returncode}")
    served.detach()
