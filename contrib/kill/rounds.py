"""Rounds of `mount, load, kill -9, check, judge` on one leaf over an NBD server that takes its time.

The kill comes in the midst of the load, or after it, while the server ends in good order. After every kill: the loads have
ended, the dead mount is detached, `qemu-img check` finds leaked clusters at most, the leaf can be mounted again at once (so
its locks are gone), and every sector reads as the ledger allows. At the end the leaf is unmounted in good order, checked
once more, and read by QEMU, which must agree.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from contrib.boot.server import listens
from contrib.kill.load import MAPPED, TURNS
from contrib.kill.stamps import PAGE_SECTORS, SECTOR, Ledger, Violation, content

ROOT = Path(__file__).resolve().parents[2]
QEDFS = (sys.executable, "-m", "qedfs")
PATIENCE = 30.0
"""Seconds for anything that is waited for."""
CHUNK = 1 << 20
REQUESTS_PER_SECOND = 1000
"""Of the server of the backing."""
LOAD_SECONDS = (0.0, 0.6)
"""Between which the server is killed after the start of the load."""
ENDING = 4
"""Every so many rounds the kill meets the server as it writes back, commits and closes."""
END_SECONDS = (0.0, 0.2)
"""Between which it is killed after it was asked to end."""


@dataclass(frozen=True)
class Plan:
    """A leaf and what happens to it. `size` is in bytes; `serve` is the command before `mount` (qedfs, or a broken one)."""

    seed: int
    rounds: int
    size: int = 16 << 20
    cluster_size: int = 65536
    table_size: int = 2
    serve: Sequence[str] = QEDFS


@dataclass
class Report:
    """What the rounds did. Counts of versions of sectors, summed over the rounds."""

    rounds: int = 0
    issued: int = 0
    acknowledged: int = 0
    leaks: int = 0
    """Rounds after which there were leaked clusters."""

    def __add__(self, other: Report) -> Report:
        return Report(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


BATCH = 10
"""Rounds on one leaf, before so much has been copied that little is left to go wrong."""
GEOMETRIES = ((65536, 2), (4096, 2), (16384, 4), (65536, 4), (4096, 16))
"""Cluster sizes in bytes and table sizes in clusters."""


def plans(rounds: int, seed: int) -> Iterator[Plan]:
    """Yield plans that come to `rounds` rounds, one leaf each, of all geometries in turn."""
    for number, done in enumerate(range(0, rounds, BATCH)):
        cluster_size, table_size = GEOMETRIES[number % len(GEOMETRIES)]
        yield Plan(seed + number, min(BATCH, rounds - done), cluster_size=cluster_size, table_size=table_size)


def run_rounds(plan: Plan, folder: Path) -> Report:
    """Run all rounds of `plan` in `folder`, an empty directory.

    Raises:
        Violation: a promise was broken; the message names seed and round.
    """
    with ExitStack() as stack:
        rounds = _Rounds(plan, folder, stack)
        for number in range(plan.rounds):
            try:
                rounds.round(number)
            except Violation as violation:
                raise Violation(f"seed {plan.seed}, round {number}: {violation}") from violation
        rounds.finish()
    return rounds.report


class _Rounds:
    def __init__(self, plan: Plan, folder: Path, stack: ExitStack) -> None:
        self.report = Report()
        self._plan = plan
        self._folder = folder
        self._random = random.Random(plan.seed)
        self._sectors = plan.size // SECTOR
        self._ledger = Ledger(folder / "ledger", self._sectors, plan.seed)
        self._mapped = np.arange(self._sectors) // PAGE_SECTORS % TURNS == MAPPED
        self._leaf = folder / "vm.qed"
        self._point = folder / "mnt"
        self._point.mkdir()
        (folder / "base.raw").write_bytes(content(plan.seed, np.arange(self._sectors), 0))
        socket = stack.enter_context(nbd_server(folder))
        run(
            *(*QEDFS, "create", "-b", f"nbd+unix:///?socket={socket}", "-F", "raw"),
            *("--cluster-size", str(plan.cluster_size), "--table-size", str(plan.table_size), str(self._leaf)),
        )
        self._loads = stack.enter_context(loads(self._point / "vm.raw", folder, self._sectors, plan.seed))

    def round(self, number: int) -> None:
        with mounted(self._plan.serve, self._leaf, self._point) as server:
            self._judge_all()
            before = int(self._ledger.issued.sum())
            seed, seconds = self._plan.seed * 1000 + number, self._random.uniform(*LOAD_SECONDS)
            if number % ENDING == ENDING - 1:
                complaints = self._loads.run(seed, max(seconds, 0.001))
                server.terminate()
                time.sleep(self._random.uniform(*END_SECONDS))
                server.kill()
            else:
                self._loads.start(seed)
                time.sleep(seconds)
                server.kill()
                complaints = self._loads.ended()
            server.wait()
        self.report.issued += int(self._ledger.issued.sum()) - before
        self.report.acknowledged += int(self._ledger.acknowledged.sum()) - before
        self._check()
        if complaints:
            raise Violation(f"loads ended badly: {complaints}")
        self.report.rounds += 1

    def finish(self) -> None:
        """End in good order; QEMU reads the same."""
        with mounted(self._plan.serve, self._leaf, self._point) as server:
            self._judge_all()
            run(*QEDFS, "unmount", str(self._point))
            if server.wait(PATIENCE):
                raise Violation(f"the server ended with status {server.returncode}")
        self._check()
        raw = self._folder / "by-qemu.raw"
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", str(self._leaf), str(raw))
        self._judge(0, raw.read_bytes())

    def _check(self) -> None:
        done = subprocess.run(
            ["qemu-img", "check", "-f", "qed", str(self._leaf)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode not in (0, 3):  # consistent, or leaked clusters only
            raise Violation(f"qemu-img check: {done.returncode}: {done.stdout}{done.stderr}")
        self.report.leaks += done.returncode == 3

    def _judge_all(self) -> None:
        """Judge every sector as the mount shows it, without a copy, and take what is there as the state from now on."""
        disk = self._point / "vm.raw"
        os.setxattr(disk, "user.qedfs.mode", b"cow")
        fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, CHUNK) as buffer:
                for pos in range(0, self._plan.size, CHUNK):
                    if os.preadv(fd, [buffer], pos) != CHUNK:
                        raise Violation(f"a short read at {pos}")
                    self._judge(pos // SECTOR, buffer[:])
        finally:
            os.close(fd)
        os.setxattr(disk, "user.qedfs.mode", b"cor")

    def _judge(self, first: int, data: bytes) -> None:
        part = slice(first, first + len(data) // SECTOR)
        lowest = self._ledger.acknowledged[part]
        versions = self._ledger.judge(first, data, lowest, mixed=self._mapped[part])
        self._ledger.settle(first, versions)


class Loads:
    """The server of loads (`load.py`)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, seed: int, seconds: float = 0) -> None:
        """Start all loads, for some seconds or until the disk goes."""
        assert self._process.stdin
        self._process.stdin.write(f"{seed} {seconds}\n")
        self._process.stdin.flush()

    def run(self, seed: int, seconds: float) -> dict[str, int]:
        """Run all loads for some seconds; they end in the middle of what they do. Return as `ended`."""
        self.start(seed, seconds)
        return self.ended()

    def ended(self) -> dict[str, int]:
        """Return who ended otherwise than they should, and how."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise Violation("a load hangs on the dead mount")
        found: dict[str, int] = json.loads(self._process.stdout.readline())
        return found


@contextmanager
def loads(disk: Path, folder: Path, sectors: int, salt: int) -> Iterator[Loads]:
    command = [sys.executable, "-m", "contrib.kill.load", *map(str, (disk, folder / "ledger", sectors, salt))]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # it forks
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Loads(process)
            assert process.stdin
            process.stdin.close()
            process.wait(PATIENCE)
        finally:
            process.kill()


@contextmanager
def nbd_server(folder: Path) -> Iterator[Path]:
    socket = folder / "nbd.socket"
    # Slow enough that a kill meets fetches under way. (nbdkit ends by an assertion when its client is killed.)
    slowly = ["--object", f"throttle-group,id=slow,x-iops-total={REQUESTS_PER_SECOND}"]
    image = f"driver=throttle,throttle-group=slow,file.driver=file,file.filename={folder}/base.raw"
    command = ["qemu-nbd", "--read-only", "--persistent", "--shared=16", f"--socket={socket}", *slowly, "--image-opts"]
    with subprocess.Popen([*command, image]) as process:
        try:
            wait_until(lambda: listens(socket) or process.poll() is not None, "qemu-nbd")
            yield socket
        finally:
            process.kill()


@contextmanager
def mounted(serve: Sequence[str], leaf: Path, point: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Serve `leaf` while inside; what is left of the mount afterwards is detached."""
    command = [*serve, "mount", "-f", "--log-file", f"{point}.log", str(leaf), str(point)]
    with subprocess.Popen(command, cwd=ROOT) as server:
        try:
            wait_until(lambda: os.path.ismount(point) or server.poll() is not None, "the mount")
            if server.poll() is not None:
                raise Violation(f"cannot be mounted again (status {server.returncode}): {_tail(Path(f'{point}.log'))}")
            yield server
        finally:
            server.kill()
            server.wait()
            subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True, timeout=PATIENCE)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1000:] if log.exists() else ""


def wait_until(condition: object, what: str) -> None:
    assert callable(condition)
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise Violation(f"{what} does not come up")
        time.sleep(0.005)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=ROOT)
    if done.returncode:
        raise Violation(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
