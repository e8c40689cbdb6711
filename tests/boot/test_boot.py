"""Machines boot from the mount of a leaf; `contrib.boot.boot` checks the outcome with the field's own tools.

Each value of each choice is here, not each combination: `python -m contrib.boot --matrix` runs those.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from contrib.boot import judge, workload
from contrib.boot.boot import QEDFS, Options, boot
from contrib.boot.guest import BootError, Guest, run
from contrib.boot.hypervisors import HYPERVISORS, Disk, Drive, run_guest
from contrib.boot.server import serving


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
        Options("microvm", Drive("writeback", "io_uring"), "nginx", mode="stream", timeout=150),
        Options("uml", Drive(), "nbdkit", "tcp", "cor", timeout=150),
        Options("q35", Drive("none", "native"), "nginx", mode="cor", timeout=150),
    ],
    ids=name_of,
)
def test_guest_boots_from_the_mount_and_what_it_wrote_is_in_the_leaf(
    guest: Guest, options: Options, tmp_path: Path
) -> None:
    report = boot(guest, options, tmp_path)
    assert report.seconds["boot"] < options.timeout


@pytest.mark.parametrize("hypervisor", HYPERVISORS)
def test_hypervisor_that_cannot_boot_is_an_error_with_its_reason(guest: Guest, hypervisor: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(1 << 20))
    with pytest.raises(BootError) as caught:
        run_guest(hypervisor, guest, Disk(empty, "raw"), Drive(), "token", tmp_path, 60)
    assert str(caught.value).startswith("guest: powered off before" if hypervisor != "uml" else "linux.uml: ")
    assert caught.value.__notes__[0].startswith("console:")


@contextmanager
def mounted_in_foreground(leaf: Path, mountpoint: Path, options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Give the process that serves `leaf` as soon as its disk is there; what is left of it at the end is killed."""
    mountpoint.mkdir()
    process = subprocess.Popen([*QEDFS, "mount", "-f", "-o", options, leaf, mountpoint])
    deadline = time.monotonic() + 30
    try:
        while not os.path.ismount(mountpoint):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
            subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)


@pytest.mark.timeout(220)
def test_machine_boots_over_a_server_and_its_disk_stands_alone_when_it_is_off(guest: Guest, tmp_path: Path) -> None:
    leaf, mountpoint = tmp_path / "vm.qed", tmp_path / "mnt"
    with serving(guest.disk, "nbdkit", "unix", tmp_path) as url:
        run(*QEDFS, "create", "--mode", "stream", "-b", url, "-F", "raw", leaf)
        with mounted_in_foreground(leaf, mountpoint, "idle=always,unmount_when_complete") as process:
            run_guest("q35", guest, Disk(mountpoint / "vm.raw", "raw"), Drive(), "story", tmp_path, 150)
            # Nobody unmounts: the mount is done when its image is complete and closed.
            assert process.wait(60) == 0
    # The server is gone by now.
    information = json.loads(run("qemu-img", "info", "-f", "qed", "--output=json", leaf))
    assert "backing-filename" not in information
    judge.check_leaf(leaf)
    judge.check_files(leaf, workload.sums_after(guest.sums(), "story"), tmp_path)
