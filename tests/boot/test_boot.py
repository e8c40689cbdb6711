"""Machines boot from the mount of a leaf; `contrib.boot.boot` checks the outcome with the field's own tools.

Each value of each choice is here, not each combination: `python -m contrib.boot --matrix` runs those.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from contrib.boot.boot import Options, boot
from contrib.boot.guest import BootError, Guest
from contrib.boot.hypervisors import HYPERVISORS, Disk, Drive, run_guest

BOOTED = [name for name in HYPERVISORS if name != "microvm"]
"""A microvm has no clock but its processor's: emulated on a busy machine, its kernel finds no rate for it and hangs."""


def name_of(options: Options) -> str:
    drive = options.drive
    words = (options.hypervisor, drive.cache, drive.aio, *["unmap"] * drive.unmap, options.server, options.mode)
    return "-".join(words)


# Below the limit at which a stuck run as a whole is ended; usually one boot takes some 5 seconds.
@pytest.mark.timeout(220)
@pytest.mark.parametrize(
    "options",
    [
        Options("q35", Drive("none", "native", unmap=True), "qemu-nbd", "tcp", "cor", timeout=150),
        Options("q35", Drive("writeback", "threads"), "nbdkit", "unix", "cow", timeout=150),
        Options("q35", Drive("directsync", "io_uring", unmap=True), "nbdkit", "tcp", "cor", timeout=150),
        Options("q35", Drive("none", "io_uring"), "nbdkit", "unix", "stream", timeout=150),
        Options("q35", Drive("writethrough", "threads", unmap=True), "qemu-nbd", "unix", "cow", timeout=150),
        Options("uml", Drive(), "nbdkit", "tcp", "cor", timeout=150),
    ],
    ids=name_of,
)
def test_guest_boots_from_the_mount_and_what_it_wrote_is_in_the_leaf(
    guest: Guest, options: Options, tmp_path: Path
) -> None:
    report = boot(guest, options, tmp_path)
    assert report.seconds["boot"] < options.timeout


@pytest.mark.parametrize("hypervisor", BOOTED)
def test_hypervisor_that_cannot_boot_is_an_error_with_its_reason(guest: Guest, hypervisor: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(1 << 20))
    with pytest.raises(BootError) as caught:
        run_guest(hypervisor, guest, Disk(empty, "raw"), Drive(), "token", tmp_path, 60)
    assert str(caught.value).startswith("guest: powered off before" if hypervisor != "uml" else "linux.uml: ")
    assert caught.value.__notes__[0].startswith("console:")
