"""Two QEMUs, a link between them, and `qedfs migrate`: what a round of migrations is made of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from contrib.bench.link import Carrying, link
from contrib.boot.guest import Guest, run
from contrib.migration import records
from contrib.migration.guest import PATIENCE, Machine, MigrationError, machine, make_initramfs

SLOTS = 16384
"""Of 4 KiB: a disk of 64 MiB."""
RATE, ROUND_TRIP = 60e6, 0.001
"""Of the link to the disk, in bytes per second and seconds. That of the memory has no rate: QEMU would measure the queue in front
of it, and stop the guest too early."""
EXPORT = "disk"
QEDFS = (sys.executable, "-m", "qedfs")


class Export(Protocol):
    """How the source's disk is exported, on the socket that the link leads to."""

    def start(self, source: Machine, socket: Path) -> None: ...

    def stop(self, source: Machine) -> None:
        """End it, and its connections, as if its server had died."""


class ByQemu:
    """By the NBD server of the QEMU that the guest runs in."""

    def start(self, source: Machine, socket: Path) -> None:
        address = {"type": "unix", "data": {"path": str(socket)}}
        source.tell("nbd-server-start", {"addr": address, "max-connections": 0})
        source.tell("block-export-add", {"type": "nbd", "id": EXPORT, "node-name": "disk", "name": EXPORT})

    def stop(self, source: Machine) -> None:
        source.tell("nbd-server-stop")


class ByQedfs:
    """By `qedfs serve`, from the mount that the guest's disk is on."""

    def __init__(self, raw: Path) -> None:
        self._raw = raw
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, source: Machine, socket: Path) -> None:
        command = (*QEDFS, "serve", "--socket", str(socket), "--name", EXPORT, str(self._raw))
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout
        if not self._process.stdout.readline():
            raise MigrationError("qedfs serve does not begin")

    def stop(self, source: Machine) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()
            self._process = None


class Rig:
    """A guest that runs in the source QEMU, and whose disk is exported through a link. Made by `rig`."""

    def __init__(
        self, guest: Guest, folder: Path, seed: int, source: Machine, initramfs: Path, disk: Carrying, by: Export
    ) -> None:
        self.source = source
        self.folder = folder
        self.seed = seed
        self.disk_link = disk
        self.by = by
        self.leaf = folder / "vm.qed"
        self.mountpoint = folder / "mnt"
        self.raw = self.mountpoint / "vm.raw"
        self._guest = guest
        self._initramfs = initramfs
        self.exporting = False

    def export(self) -> None:
        """Have the source's disk exported."""
        self.by.start(self.source, self.folder / "nbd.sock")
        self.exporting = True

    def stop_export(self) -> None:
        """End that, if it is not ended yet."""
        if self.exporting:
            self.exporting = False
            self.by.stop(self.source)

    def server_pid(self) -> int:
        """Return the process that serves the mount."""
        return int(os.getxattr(self.mountpoint, "user.qedfs.pid"))

    @contextmanager
    def destination(self) -> Iterator[Machine]:
        """Have the QEMU that waits for the guest."""
        more = ("-incoming", "defer")
        with machine(self._guest, self._initramfs, self.raw, self.seed, "destination", *more) as waiting:
            yield waiting

    def read_disk(self, source: Path) -> Path:
        """Return the disk of the QED image `source` as a raw file, read by QEMU."""
        raw = self.folder / "after.raw"
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", source, raw)
        return raw


@contextmanager
def rig(guest: Guest, folder: Path, seed: int, *, on_qedfs: bool = False) -> Iterator[Rig]:
    """Have a guest that writes records, and whose disk is exported by QEMU; or, `on_qedfs`, is on a mount and exported from there."""
    disk, mountpoint = folder / "source.raw", folder / "mnt"
    mountpoint.mkdir()
    records.make_disk(disk, seed, SLOTS)
    initramfs = make_initramfs(guest, folder)
    with ExitStack() as stack:
        if on_qedfs:
            disk = stack.enter_context(mounted_over(disk))
        by = ByQedfs(disk) if on_qedfs else ByQemu()
        disk_link = stack.enter_context(link(str(folder / "nbd.sock"), RATE, ROUND_TRIP))
        source = stack.enter_context(machine(guest, initramfs, disk, seed, "source"))
        made = Rig(guest, folder, seed, source, initramfs, disk_link, by)
        made.export()
        try:
            yield made
        finally:
            if on_qedfs:
                made.stop_export()
            subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)


@contextmanager
def mounted_over(base: Path) -> Iterator[Path]:
    """Give the disk of a mounted leaf over `base`."""
    leaf, mountpoint = base.with_name("before.qed"), base.with_name("before")
    mountpoint.mkdir()
    run(*QEDFS, "create", "-b", base, "-F", "raw", leaf)
    run(*QEDFS, "mount", "--log-file", f"{mountpoint}.log", leaf, mountpoint)
    try:
        yield mountpoint / "before.raw"
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)


class Moving:
    """A `qedfs migrate` that runs. `lines` are what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.lines: list[str] = []

    def says(self, start: str) -> bool:
        """Read on until a line begins with `start`; return False when it ends before."""
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(start):
                return True
        return False

    def end(self) -> tuple[int, str]:
        """Return its exit status and the last line that it says."""
        self.says("\0")
        return self._process.wait(PATIENCE), self.lines[-1] if self.lines else ""

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def stand_still(self) -> None:
        """Let it do nothing, so that what happens now happens at this point of the sequence."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def migrating(rig: Rig, memory_link: Carrying, *more: str) -> Iterator[Moving]:
    """Run `qedfs migrate`; what is left of it at the end of the block is killed."""
    command = (
        *(*QEDFS, "migrate", "--source", str(rig.source.qmp), "--destination", str(rig.folder / "destination.qmp")),
        *("--uri", f"tcp:127.0.0.1:{memory_link.port}", "--listen", f"unix:{rig.folder}/memory.sock"),
        *("-b", f"nbd://127.0.0.1:{rig.disk_link.port}/{EXPORT}", "-o", "idle=always"),
        *(("--stop-export",) if isinstance(rig.by, ByQemu) else ()),
        *("--log-file", str(rig.folder / "mount.log"), *more, str(rig.leaf), str(rig.mountpoint)),
    )
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield Moving(process)
        finally:
            process.kill()


@contextmanager
def memory_link(rig: Rig) -> Iterator[Carrying]:
    """Have a link to where the destination listens for the memory."""
    with link(str(rig.folder / "memory.sock"), 0, ROUND_TRIP) as carrying:
        yield carrying


@contextmanager
def being_read(disk: Path) -> Iterator[None]:
    """Have all of `disk` read over and over, by a process of its own."""
    with subprocess.Popen([sys.executable, "-m", "contrib.migration.reader", disk]) as process:
        try:
            yield
            if process.poll() is not None:
                raise MigrationError("a read of the disk has failed")
        finally:
            process.kill()
