"""The hot path against qemu-storage-daemon's FUSE export: the same image, interleaved rounds, medians and ratios.

python contrib/bench/hotpath.py [--rounds N] [--seconds S] [--folder DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
FULL = 1024 * MIB
"""Bytes of the image for reads and overwrites: large against any cache but the page cache."""
FRESH_CLUSTERS = 2000
"""Clusters allocated by one round of allocating writes."""
CLUSTER = 64 << 10
QEDFS = (sys.executable, "-m", "qedfs")


@dataclass(frozen=True)
class Job:
    """One fio job. `reach` is the ratio aimed at for each of qedfs's `direct_io` settings that is measured."""

    name: str
    fio: tuple[str, ...]
    reach: dict[str, float]
    fresh: bool = False
    """Each round works on a new leaf over a raw backing, each I/O in a cluster of its own."""


READ = ("--rw=randread", "--bs=4k", "--direct=1")
WRITE = ("--rw=randwrite", "--bs=4k", "--direct=1")
QUEUE = ("--ioengine=libaio", "--iodepth=16")
ALLOCATE = (
    "--rw=randwrite",
    "--bs=4k",
    "--direct=1",
    "--blockalign=64k",
    f"--number_ios={FRESH_CLUSTERS}",
    "--norandommap=0",
)
JOBS = (
    Job("4K random read, O_DIRECT, depth 1", (*READ, "--ioengine=psync"), {"auto": 1.5}),
    Job("4K random read, O_DIRECT, depth 16", (*READ, *QUEUE), {"auto": 1.5}),
    Job("4K random overwrite, O_DIRECT, depth 1", (*WRITE, "--ioengine=psync"), {"auto": 1.0, "on": 1.5}),
    Job("4K random overwrite, O_DIRECT, depth 16", (*WRITE, *QUEUE), {"auto": 1.2, "on": 1.5}),
    Job("1 MiB sequential read, O_DIRECT", ("--rw=read", "--bs=1m", "--direct=1", "--ioengine=psync"), {"auto": 2.0}),
    Job(
        "1 MiB sequential read, buffered",
        ("--rw=read", "--bs=1m", "--direct=0", "--ioengine=psync", "--invalidate=1"),
        {"auto": 2.0},
    ),
    Job("allocating 4K write over a raw backing, depth 1", (*ALLOCATE, "--ioengine=psync"), {"auto": 3.0}, fresh=True),
    Job("allocating 4K write over a raw backing, depth 16", (*ALLOCATE, *QUEUE), {"auto": 3.0}, fresh=True),
)


def run(*command: str | Path) -> str:
    """Run a command to its end and return what it printed; raise with its words when it fails."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@contextlib.contextmanager
def qedfs(leaf: Path, folder: Path, direct_io: str) -> Iterator[Path]:
    """Mount `leaf` by qedfs; yield the raw file."""
    mountpoint = folder / "mnt"
    mountpoint.mkdir(exist_ok=True)
    run(*QEDFS, "mount", "-o", f"direct_io={direct_io}", leaf, mountpoint)
    try:
        yield mountpoint / f"{leaf.stem}.raw"
    finally:
        run(*QEDFS, "unmount", mountpoint)


@contextlib.contextmanager
def storage_daemon(leaf: Path, folder: Path) -> Iterator[Path]:
    """Export `leaf` by qemu-storage-daemon; yield the raw file."""
    export = folder / "export.raw"
    export.touch()
    daemon = subprocess.Popen(
        (
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={leaf}"),
            *("--blockdev", "driver=qed,node-name=disk,file=file"),
            *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={export},writable=on"),
        ),
        stdin=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 10
        while not export.stat().st_size:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("qemu-storage-daemon: does not export the image")
            time.sleep(0.01)
        yield export
    finally:
        daemon.terminate()
        daemon.wait(30)


def fio(job: Job, file: Path, seconds: float) -> float:
    """Run one job and return its I/Os per second."""
    limits = () if job.fresh else ("--time_based", f"--runtime={seconds}")
    size = FRESH_CLUSTERS * CLUSTER if job.fresh else FULL
    result = json.loads(
        run(
            *("fio", "--name=job", f"--filename={file}", f"--size={size}", "--output-format=json", "--thread"),
            *("--allow_file_create=0", "--fallocate=none", "--randrepeat=0", *job.fio, *limits),
        )
    )
    return sum(float(result["jobs"][0][kind]["iops"]) for kind in ("read", "write"))


def measure(job: Job, setting: str, full: Path, folder: Path, seconds: float) -> tuple[float, float]:
    """Return one round: I/Os per second of qedfs and of the peer."""
    figures = []
    for peer in (False, True):
        leaf = fresh_leaf(folder) if job.fresh else full
        with storage_daemon(leaf, folder) if peer else qedfs(leaf, folder, setting) as file:
            if not job.fresh:
                warm(leaf)
            figures.append(fio(job, file, seconds))
    return figures[0], figures[1]


def warm(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


def fresh_leaf(folder: Path) -> Path:
    leaf = folder / "fresh.qed"
    leaf.unlink(missing_ok=True)
    warm(folder / "base.raw")
    run("qemu-img", "create", "-q", "-f", "qed", "-b", folder / "base.raw", "-F", "raw", leaf)
    return leaf


def make_images(folder: Path) -> Path:
    """Make a full image of random data, and a raw base."""
    with (folder / "base.raw").open("wb") as base:
        for _ in range(FRESH_CLUSTERS * CLUSTER // MIB + 1):
            base.write(os.urandom(MIB))
    with (folder / "full.raw").open("wb") as raw:
        for _ in range(FULL // MIB):
            raw.write(os.urandom(MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qed", folder / "full.raw", folder / "full.qed")
    (folder / "full.raw").unlink()
    return folder / "full.qed"


def sparse_mount(folder: Path) -> None:
    """Print how long a 32 TiB sparse leaf takes to mount, and what its process weighs."""
    leaf = folder / "sparse.qed"
    run("qemu-img", "create", "-q", "-f", "qed", leaf, "32T")
    start = time.monotonic()
    with qedfs(leaf, folder, "auto") as file:
        took = time.monotonic() - start
        pid = os.getxattr(file.parent, "user.qedfs.pid").decode()
        resident = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line)
        print(f"mounting a sparse 32 TiB leaf: {took:.2f} s, {int(resident.split()[1]) >> 10} MiB resident")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per job, side and round")
    parser.add_argument("--folder", type=Path, default=None, help="where the images go (3 GiB)")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qedfs-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        full = make_images(folder)
        version = run("qemu-storage-daemon", "--version").splitlines()[0]
        print(
            f"Linux {platform.release()}, {os.cpu_count()} cores, Python {platform.python_version()}; peer: {version}"
        )
        print(f"medians of {arguments.rounds} rounds, I/Os per second\n")
        print("| job | direct_io | qedfs | peer | ratio | reach |\n|---|---|---:|---:|---:|---:|")
        for job in JOBS:
            if arguments.only not in job.name:
                continue
            for setting, reach in job.reach.items():
                rounds = [measure(job, setting, full, folder, arguments.seconds) for _ in range(arguments.rounds)]
                ours, theirs = (statistics.median(side) for side in zip(*rounds, strict=True))
                ratio = statistics.median(a / b for a, b in rounds)
                print(f"| {job.name} | {setting} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} | ≥ {reach} |", flush=True)
        print()
        sparse_mount(folder)


if __name__ == "__main__":
    main()
