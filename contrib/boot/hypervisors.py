"""The machines that boot: how each is told to run the guest on a raw disk until it powers off.

All of them emulate, so that a run is the same with and without virtualisation: QEMU by TCG, User-mode Linux by ptrace.
Each prints the guest's console to its standard output.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from contrib.boot.guest import BootError, Guest, run

CACHES = ("none", "writeback", "writethrough", "directsync")
AIOS = ("threads", "native", "io_uring")
DIRECT = frozenset({"none", "directsync"})
"""Cache modes that open the disk with O_DIRECT, without which QEMU refuses `aio=native`."""
CONSOLE_LINES = 40
HERE = Path(__file__).parent


class Drive(NamedTuple):
    """How QEMU is to use the disk, in its words. User-mode Linux knows but one way, buffered with flushes."""

    cache: str = "none"
    aio: str = "threads"
    unmap: bool = False
    """Both `discard=unmap` and `detect-zeroes=unmap`; the guest then also discards what it does not use (`fstrim`)."""


class Disk(NamedTuple):
    """What the hypervisor is told to boot from."""

    path: Path
    format: str


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """What is added to ours."""


def q35(guest: Guest, disk: Disk, drive: Drive, words: str, folder: Path) -> Command:
    """QEMU's usual PC, with a virtio disk on PCI."""
    return Command((*qemu("q35", guest, words), "-drive", f"{qemu_drive(disk, drive)},if=virtio"))


def microvm(guest: Guest, disk: Disk, drive: Drive, words: str, folder: Path) -> Command:
    """QEMU's machine in the manner of Firecracker: no PCI, virtio by MMIO."""
    # It has no clock to measure the processor's against but one that a busy host emulates too slowly: the kernel would give
    # the measurement up, and hang. The emulated counter is that of the host.
    if rate := re.search(r"^cpu MHz\s*:\s*(\d+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        words = f"{words} tsc_early_khz={rate[1]}000"
    attached = ("-drive", f"{qemu_drive(disk, drive)},if=none,id=disk", "-device", "virtio-blk-device,drive=disk")
    return Command((*qemu("microvm", guest, words), *attached))


def qemu(machine: str, guest: Guest, words: str) -> tuple[str, ...]:
    # QEMU's default processor emulates faster than newer ones: the guest picks instructions that are slow to emulate.
    return (
        *("qemu-system-x86_64", "-accel", "tcg", "-machine", machine, "-m", "256"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)),
        *("-append", f"console=ttyS0 panic=-1 {words}"),
    )


def qemu_drive(disk: Disk, drive: Drive) -> str:
    """Return what `-drive` is told, but for the attachment."""
    unmap = ",discard=unmap,detect-zeroes=unmap" if drive.unmap else ""
    return f"file={disk.path},format={disk.format},cache={drive.cache},aio={drive.aio}{unmap}"


def uml(guest: Guest, disk: Disk, drive: Drive, words: str, folder: Path) -> Command:
    """User-mode Linux: a kernel of its own, with all drivers built in (Debian's package `user-mode-linux`)."""
    preload = folder / "uml-xstate.so"
    run("gcc", "-O2", "-shared", "-fPIC", "-o", preload, HERE / "uml-xstate.c")
    command = (
        *("linux.uml", "mem=128M", f"uml_dir={folder}", "umid=uml", f"ubd0={disk.path}"),
        *("root=/dev/ubda", "rootfstype=ext4", "rw", "init=/sbin/init", "con=null", "con0=null,fd:1", "panic=-1"),
    )
    return Command((*command, *words.split()), {"LD_PRELOAD": str(preload)})


HYPERVISORS: dict[str, Callable[[Guest, Disk, Drive, str, Path], Command]] = {
    "q35": q35,
    "microvm": microvm,
    "uml": uml,
}


def run_guest(
    hypervisor: str, guest: Guest, disk: Disk, drive: Drive, token: str, folder: Path, timeout: float
) -> None:
    """Run the guest on `disk` until it powers off, at most `timeout` seconds. `folder` gets its console.

    Raises:
        BootError: the hypervisor fails, or the guest does not finish its work; a note has the end of the console.
    """
    words = f"token={token}{' trim' if drive.unmap else ''}"
    command = HYPERVISORS[hypervisor](guest, disk, drive, words, folder)
    console, errors = folder / "console", folder / "errors"
    try:
        with console.open("wb") as out, errors.open("wb") as err:
            status = wait_for(command, out.fileno(), err.fileno(), timeout)
        if status != 0:
            complaint = errors.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
            raise BootError(f"{command.words[0]}: {complaint[-1]}")
        if "guest: done" not in console.read_text(errors="replace"):
            raise BootError("guest: powered off before its work was done")
    except BootError as error:
        lines = console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        error.add_note("\n".join(["console:", *lines]))
        raise


def wait_for(command: Command, out: int, err: int, timeout: float) -> int:
    """Run `command` to its end and return its exit status. Nothing of it is left, however this ends."""
    try:
        process = subprocess.Popen(
            command.words,
            env=os.environ | command.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BootError(f"{command.words[0]}: not installed") from error
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        raise BootError(f"{command.words[0]}: not finished after {timeout:.0f} s") from error
    finally:
        if process.poll() is None:
            # All of the session: User-mode Linux runs each process of the guest as one of the host.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
