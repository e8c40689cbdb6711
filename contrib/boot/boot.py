"""One boot from end to end: base on an NBD server, leaf over it, mount, boot from the mount, unmount, judge."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from contrib.boot import judge, workload
from contrib.boot.guest import DISK_BYTES, BootError, Guest, run
from contrib.boot.server import serving

CACHES = ("none", "writeback")
QEDFS = (sys.executable, "-m", "qedfs")
CONSOLE_LINES = 40


@dataclass(frozen=True)
class Options:
    """How to boot. `through` is `qedfs` (a raw file in a mount) or `qemu` (QEMU's own QED driver, for comparison)."""

    cache: str = "none"
    server: str = "qemu-nbd"
    transport: str = "unix"
    through: str = "qedfs"
    timeout: float = 180.0
    """Seconds the guest may take."""


class Disk(NamedTuple):
    """What QEMU is told to boot from."""

    path: Path
    format: str


@dataclass
class Report:
    """What a run that passed every check has measured."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of each step, in their order."""
    backing_bytes_read: int | None = None
    """As qedfs counts them; None for QEMU, which does not."""
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
    with serving(guest.disk, options.server, options.transport, folder) as url:
        with WAYS[options.through](leaf, url, report) as disk, report.timed("boot"):
            run_guest(guest, disk, token, options, folder / "console")
        with report.timed("check"):
            judge.check_leaf(leaf)
            judge.check_files(leaf, workload.sums_after(guest.sums(), token), folder)
    if judge.sha256_of(guest.disk) != base_before:
        raise BootError(f"{guest.disk}: the base has changed")
    report.leaf_bytes = leaf.stat().st_blocks * 512
    return report


@contextmanager
def through_qedfs(leaf: Path, url: str, report: Report) -> Iterator[Disk]:
    """Make `leaf` over the export at `url`, mount it beside itself, and unmount it after use."""
    mountpoint, log = leaf.with_name("mnt"), leaf.with_name("mount.log")
    mountpoint.mkdir()
    with report.timed("create"):
        run(*QEDFS, "create", "-b", url, "-F", "raw", leaf)
    try:
        with report.timed("mount"):
            run(*QEDFS, "mount", "--log-file", log, leaf, mountpoint)
        disk = mountpoint / "vm.raw"
        yield Disk(disk, "raw")
        report.backing_bytes_read = int(os.getxattr(disk, "user.qedfs.backing_bytes_read"))
        with report.timed("unmount"):
            run(*QEDFS, "unmount", mountpoint)
    except BaseException as error:
        if log.exists():
            error.add_note(f"qedfs:\n{log.read_text(errors='replace')}")
        subprocess.run(["fusermount3", "-q", "-u", "-z", "--", mountpoint], check=False)
        raise
    # The guest has read some parts of the base from end to end, but not the whole disk.
    least = workload.PARTS_READ * workload.PART_BYTES
    if not least <= report.backing_bytes_read < DISK_BYTES:
        raise BootError(f"backing_bytes_read is {report.backing_bytes_read}, not between {least} and {DISK_BYTES}")


@contextmanager
def through_qemu(leaf: Path, url: str, report: Report) -> Iterator[Disk]:
    """Make `leaf` over the export at `url` with QEMU's tools, for QEMU's own driver."""
    with report.timed("create"):
        run("qemu-img", "create", "-q", "-f", "qed", "-b", url, "-F", "raw", leaf)
    yield Disk(leaf, "qed")


WAYS = {"qedfs": through_qedfs, "qemu": through_qemu}


def run_guest(guest: Guest, disk: Disk, token: str, options: Options, console: Path) -> None:
    """Run the guest on `disk` until it powers off, by emulation, so that it is the same on every machine.

    Raises:
        BootError: QEMU fails, or the guest does not finish its work in time.
    """
    # QEMU's default processor emulates faster than newer ones: the guest picks instructions that are slow to emulate.
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "256"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", f"file:{console}"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)),
        *("-append", f"console=ttyS0 panic=-1 token={token}"),
        *("-drive", f"file={disk.path},format={disk.format},if=virtio,cache={options.cache}"),
    ]
    try:
        run(*command, timeout=options.timeout)
        if "guest: done" not in console.read_text(errors="replace"):
            raise BootError("guest: powered off before its work was done")
    except BootError as error:
        if console.exists():
            lines = console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
            error.add_note("\n".join(["console:", *lines]))
        raise
