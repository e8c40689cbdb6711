"""The locks against QEMU's own programs, in both directions, and against ourselves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qedfs.errors import Locked
from qedfs.image.locks import lock_for_reading, lock_for_writing

Lock = Callable[[int, str], None]


@pytest.fixture(params=["raw", "qed"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"image.{request.param}"
    subprocess.run(["qemu-img", "create", "-q", "-f", request.param, path, "1M"], check=True, timeout=30)
    return path


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    """A QED image and its overlay. (QEMU's tools let others write a *raw* backing; only its device models do not.)"""
    base, overlay = tmp_path / "base.qed", tmp_path / "overlay.qed"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", base, "1M"], check=True, timeout=30)
    backing = ["-b", base.name, "-F", "qed"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", *backing, overlay], check=True, timeout=30)
    return base, overlay


@contextlib.contextmanager
def locked(path: Path, lock: Lock) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR)
    try:
        lock(fd, path.name)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_in_qemu(image: Path, *options: str) -> Iterator[None]:
    """Have `qemu-nbd` hold the image open until the end of the block."""
    socket = image.with_suffix(".socket")
    ready = image.with_suffix(".pid")  # written last; the socket is there before the image is open
    ready.unlink(missing_ok=True)
    program = [
        "qemu-nbd",
        "-t",
        "-k",
        str(socket),
        "--pid-file",
        str(ready),
        "-f",
        image.suffix[1:],
        *options,
        str(image),
    ]
    with subprocess.Popen(program) as server:
        try:
            until = time.monotonic() + 20
            while not ready.exists():
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            yield
        finally:
            server.kill()


def qemu_io(image: Path, command: str, *options: str) -> bool:
    """Tell whether `qemu-io` could open the image; anything but a lock that stands in the way fails the test."""
    program = ["qemu-io", "-f", image.suffix[1:], *options, "-c", command, str(image)]
    done = subprocess.run(program, check=False, timeout=30, capture_output=True, text=True)
    assert done.returncode == 0 or "Failed to get" in done.stderr, done.stderr
    return done.returncode == 0


def test_qemu_cannot_write_what_we_write(image: Path) -> None:
    with locked(image, lock_for_writing):
        assert not qemu_io(image, "write 0 512")
    assert qemu_io(image, "write 0 512")


def test_qemu_cannot_write_what_we_read(image: Path) -> None:
    with locked(image, lock_for_reading):
        assert not qemu_io(image, "write 0 512")


def test_qemu_can_read_what_we_read(image: Path) -> None:
    with locked(image, lock_for_reading):
        assert qemu_io(image, "read 0 512", "-r")


def test_qemu_cannot_use_what_we_write_as_a_backing(chain: tuple[Path, Path]) -> None:
    image, overlay = chain
    with locked(image, lock_for_writing):
        assert not qemu_io(overlay, "read 0 512")
    with locked(image, lock_for_reading):
        assert qemu_io(overlay, "read 0 512")


@pytest.mark.parametrize("lock", [lock_for_reading, lock_for_writing])
def test_what_qemu_writes_is_refused(image: Path, lock: Lock) -> None:
    with open_in_qemu(image), pytest.raises(Locked, match="open for writing"), locked(image, lock):
        pass
    with locked(image, lock):
        pass


def test_what_qemu_reads_we_may_read(image: Path) -> None:
    with open_in_qemu(image, "--read-only"), locked(image, lock_for_reading):
        pass


def test_a_backing_in_use_by_qemu_cannot_be_written_by_us(chain: tuple[Path, Path]) -> None:
    image, overlay = chain
    with open_in_qemu(overlay):
        with pytest.raises(Locked, match="does not want it to change"), locked(image, lock_for_writing):
            pass
        with locked(image, lock_for_reading):
            pass


def test_our_own_descriptors_exclude_each_other_as_strangers_would(image: Path) -> None:
    with locked(image, lock_for_writing):
        for lock in (lock_for_reading, lock_for_writing):
            with pytest.raises(Locked), locked(image, lock):
                pass
    with locked(image, lock_for_reading):
        with locked(image, lock_for_reading):
            pass
        with pytest.raises(Locked), locked(image, lock_for_writing):
            pass


def test_a_refused_descriptor_leaves_no_lock_behind(image: Path) -> None:
    with locked(image, lock_for_writing), pytest.raises(Locked), locked(image, lock_for_writing):
        pass
    with locked(image, lock_for_writing):
        pass


def test_a_descriptor_that_cannot_be_locked_says_why(image: Path) -> None:
    fd = os.open(image, os.O_WRONLY)
    try:
        with pytest.raises(Locked, match=r"image\.[a-z]+: cannot be locked \(Bad file descriptor\)"):
            lock_for_writing(fd, image.name)
    finally:
        os.close(fd)
