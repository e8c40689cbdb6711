"""The guest that is migrated, and the QEMU that it runs in: the kernel of `contrib.boot`, and the recorder."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from contrib.boot.guest import Guest, place, run
from contrib.boot.server import listens
from qedfs.migrate.monitor import MonitorAddress, open_monitor

HERE = Path(__file__).parent
PATIENCE = 90.0
"""Seconds for anything that a guest does."""


class MigrationError(Exception):
    """Something is not as it must be; the message is for a person."""


def make_initramfs(guest: Guest, folder: Path) -> Path:
    """Return an initramfs that runs the recorder: that of the boot guest, with another first process behind it."""
    tree, added, whole = folder / "initramfs.d", folder / "added.cpio", folder / "initramfs"
    tree.mkdir()
    run("gcc", "-static", "-O2", "-Wall", "-Werror", "-o", tree / "recorder", HERE / "recorder.c")
    place(HERE / "guest-init", tree / "init")
    run("cpio", "--quiet", "-o", "-H", "newc", "-O", added, cwd=tree, stdin="init\nrecorder\n")
    # The kernel unpacks one archive after the other; a later file replaces an earlier one.
    whole.write_bytes(guest.initramfs.read_bytes() + added.read_bytes())
    return whole


class Machine:
    """A QEMU process and what its guest says. Made by `machine`."""

    def __init__(self, process: subprocess.Popen[bytes], qmp: Path, second: Path) -> None:
        self.process = process
        self.qmp = qmp
        """For `qedfs migrate`."""
        self._second = second
        self.bad: list[str] = []
        """What the guest complains about."""
        self.verified: tuple[int, int] | None = None
        """Records and how many of them are wrong, when the guest has ended."""
        self.told: list[tuple[float, int]] = []
        """When (of the monotonic clock) each record was told to be there, and its number."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if not line.endswith(b"\n"):
                return  # the rest of it is told by another QEMU
            match line.split():
                case [b"record", number] if number.isdigit():
                    self.told.append((time.monotonic(), int(number)))
                case [b"verified", records, bad]:
                    self.verified = int(records), int(bad)
                case [b"bad:", *_]:
                    self.bad.append(line.decode(errors="replace").strip())

    @property
    def records(self) -> int:
        """The last record that the guest has told of here."""
        return self.told[-1][1] if self.told else 0

    def wait_for(self, records: int) -> None:
        """Return when the guest has written that many records, here or elsewhere before. Raises MigrationError."""
        until(lambda: self.records >= records or self.process.poll() is not None, "a guest that goes on")
        if self.records < records:
            raise MigrationError(f"QEMU has ended with status {self.process.poll()} after {self.records} records")

    def tell(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Have a command of QMP done, on a socket that nobody else uses."""

        async def told() -> Any:
            monitor = await open_monitor("guest", MonitorAddress(path=str(self._second)))
            try:
                return await monitor.execute(command, arguments)
            finally:
                await monitor.aclose()

        return trio.run(told)

    def finish(self) -> None:
        """Let the guest check all of its disk and power off. Raises MigrationError."""
        assert self.process.stdin
        self.process.stdin.write(b"end\n")
        self.process.stdin.flush()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise MigrationError("the guest does not end") from error
        self._reader.join(PATIENCE)

    def kill(self) -> None:
        """End it at once, and read what it had said."""
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)


@contextmanager
def machine(guest: Guest, initramfs: Path, disk: Path, seed: int, name: str, *more: str) -> Iterator[Machine]:
    """Run a QEMU with the raw `disk` as its only one; it is killed at the end of the block.

    With an odd seed through the kernel's cache, with an even one past it.
    """
    direct = "off" if seed % 2 else "on"
    folder = initramfs.parent
    qmp, second = folder / f"{name}.qmp", folder / f"{name}.qmp2"
    command = (
        *("qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "128"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(guest.kernel), "-initrd", str(initramfs)),
        *("-append", f"console=ttyS0 panic=-1 quiet seed={seed}"),
        *("-blockdev", f"driver=file,node-name=file,filename={disk},cache.direct={direct}"),
        *("-blockdev", f"driver=raw,node-name=disk,file=file,cache.direct={direct}"),
        *("-device", "virtio-blk-pci,drive=disk"),
        *(word for path in (qmp, second) for word in ("-qmp", f"unix:{path},server=on,wait=off")),
        *more,
    )
    with (folder / f"{name}.errors").open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    running = Machine(process, qmp, second)
    try:
        until(lambda: listens(second) or process.poll() is not None, "QEMU")
        yield running
    finally:
        running.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe
            pipe.close()


def until(condition: Any, what: str) -> None:
    """Return when `condition()` holds. Raises MigrationError after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise MigrationError(f"waited for {what} in vain")
        time.sleep(0.01)
