"""One boot from end to end: base on a server, leaf over it, mount, boot from the mount, unmount, judge."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from contrib.boot import judge, web, workload
from contrib.boot.guest import DISK_BYTES, BootError, Guest, run
from contrib.boot.hypervisors import Disk, Drive, run_guest
from contrib.boot.server import serving

MODES = ("cow", "cor", "stream")
QEDFS = (sys.executable, "-m", "qedfs")


@dataclass(frozen=True)
class Options:
    """How to boot: `hypervisor` is one of HYPERVISORS, `server` of SERVERS or `web.SERVER` (a qcow2 by https, then without a `transport`), `mode` one of MODES. `through` is `qedfs` (a raw file in a mount) or `qemu` (QEMU's own QED driver, for comparison)."""

    hypervisor: str = "q35"
    drive: Drive = field(default_factory=Drive)
    server: str = "qemu-nbd"
    transport: str = "unix"
    mode: str = "cor"
    through: str = "qedfs"
    timeout: float = 180.0
    """Seconds the guest may take."""


@dataclass(frozen=True)
class Base:
    """What a leaf is made over."""

    url: str
    format: str = "raw"
    environment: dict[str, str] = field(default_factory=dict)
    """What qedfs needs to read it."""
    judged_by: Path | None = None
    """The same as a file, for the judges, where QEMU's tools cannot read the URL."""


@dataclass
class Report:
    """What a run that passed every check has measured."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of each step, in their order."""
    backing_bytes_read: int | None = None
    """As qedfs counts them; None for QEMU, which does not."""
    local_bytes: int | None = None
    """Of the disk, without need of the backing when the guest was off; likewise."""
    leaf_bytes: int = 0
    """Room the leaf takes in its file system, after the run."""

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[step] = time.monotonic() - start


def boot(guest: Guest, options: Options, folder: Path) -> Report:
    """Boot `guest` once from a new leaf in the empty `folder`, and check everything that must hold afterwards.

    Raises:
        BootError: a step fails or a check does not hold; notes have the end of the guest's console and the log of qedfs.
            No process and no mount of ours is left.
    """
    report = Report()
    leaf = folder / "vm.qed"
    token = os.urandom(8).hex()
    base_before = judge.sha256_of(guest.disk)
    with served(guest.disk, options, folder) as base:
        with WAYS[options.through](leaf, base, options.mode, report) as disk, report.timed("boot"):
            run_guest(options.hypervisor, guest, disk, options.drive, token, folder, options.timeout)
        with report.timed("check"):
            # QEMU would repair what is wrong when it names another base.
            run(*QEDFS, "check", leaf)
            if base.judged_by is not None:
                run("qemu-img", "rebase", "-u", "-f", "qed", "-b", base.judged_by, "-F", base.format, leaf)
            judge.check_leaf(leaf)
            judge.check_files(leaf, workload.sums_after(guest.sums(), token), folder)
    if judge.sha256_of(guest.disk) != base_before:
        raise BootError(f"{guest.disk}: the base has changed")
    report.leaf_bytes = leaf.stat().st_blocks * 512
    return report


@contextmanager
def served(image: Path, options: Options, folder: Path) -> Iterator[Base]:
    if options.server == web.SERVER:
        with web.serving(image, folder) as (url, authority):
            yield Base(url, "qcow2", {"SSL_CERT_FILE": str(authority)}, authority.with_name(web.NAME))
    else:
        with serving(image, options.server, options.transport, folder) as url:
            yield Base(url)


@contextmanager
def through_qedfs(leaf: Path, base: Base, mode: str, report: Report) -> Iterator[Disk]:
    """Make `leaf` over `base`, mount it beside itself (a leaf that streams does so all the while), and unmount it after use."""
    mountpoint, log = leaf.with_name("mnt"), leaf.with_name("mount.log")
    mountpoint.mkdir()
    qedfs = ("env", *(f"{name}={value}" for name, value in base.environment.items()), *QEDFS)
    with report.timed("create"):
        run(*qedfs, "create", "--mode", mode, "-b", base.url, "-F", base.format, leaf)
    try:
        with report.timed("mount"):
            options = ("-o", "idle=always", "--log-file", log)
            run(*qedfs, "mount", *options, leaf, mountpoint)
        disk = mountpoint / "vm.raw"
        yield Disk(disk, "raw")
        report.backing_bytes_read = int(os.getxattr(disk, "user.qedfs.backing_bytes_read"))
        report.local_bytes = int(os.getxattr(disk, "user.qedfs.allocated_bytes"))
        with report.timed("unmount"):
            run(*QEDFS, "unmount", mountpoint)
    except BaseException as error:
        if log.exists():
            error.add_note(f"qedfs:\n{log.read_text(errors='replace')}")
        subprocess.run(["fusermount3", "-q", "-u", "-z", "--", mountpoint], check=False)
        raise
    judge_traffic(mode, report.backing_bytes_read, report.local_bytes)


def judge_traffic(mode: str, fetched: int, local: int) -> None:
    """Raise BootError unless a run has fetched and kept as much as `mode` says, in bytes."""
    # The guest has read some parts of the base from end to end, but not the whole disk; whether streaming has, time decides.
    read = workload.PARTS_READ * workload.PART_BYTES
    if not read <= fetched < DISK_BYTES + (mode == "stream"):
        raise BootError(f"backing_bytes_read is {fetched}, not between {read} and {DISK_BYTES}")
    # What it writes is less than what it reads: the sum tells whether the reads were kept.
    if (local >= read) != (mode != "cow"):
        raise BootError(f"mode {mode}: allocated_bytes is {local}, which does not fit {read} that the guest has read")


@contextmanager
def through_qemu(leaf: Path, base: Base, mode: str, report: Report) -> Iterator[Disk]:
    """Make `leaf` over `base` with QEMU's tools, for QEMU's own driver."""
    if mode != "cow":
        raise BootError("through qemu: its QED driver has mode cow only")
    if base.format != "raw":
        raise BootError("through qemu: only over a raw base on an NBD server")
    with report.timed("create"):
        run("qemu-img", "create", "-q", "-f", "qed", "-b", base.url, "-F", "raw", leaf)
    yield Disk(leaf, "qed")


WAYS = {"qedfs": through_qedfs, "qemu": through_qemu}
