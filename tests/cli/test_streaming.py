"""`stream`, `wait`, `status --watch` and `unmount_when_complete`, on real mounts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.commands import QEDFS, mounted, qedfs, refused
from tests.image.qemu import qemu_check, qemu_img

MIB = 1 << 20
CONTENT = bytes(range(1, 256)) * 257
BASE = CONTENT * (4 * MIB // len(CONTENT) + 1)
ALWAYS = "idle=always"


def attribute(raw: Path, name: str) -> str:
    return os.getxattr(raw, f"user.qedfs.{name}").decode()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    base = tmp_path / "base.raw"
    base.write_bytes(BASE[: 4 * MIB])
    qedfs("create", "-b", base, "-F", "raw", tmp_path / "vm.qed")
    return tmp_path / "vm.qed"


def judged(leaf: Path, expected: bytes) -> None:
    """The leaf stands alone and holds what is expected."""
    assert qemu_check(leaf).status == 0
    assert "backing" not in qemu_img("info", leaf)
    qemu_img("convert", "-f", "qed", "-O", "raw", leaf, leaf.with_suffix(".out"))
    assert leaf.with_suffix(".out").read_bytes() == expected


def test_stream_completes_the_image_and_shows_how_it_goes(leaf: Path, tmp_path: Path) -> None:
    with mounted(leaf, tmp_path / "mnt", ALWAYS) as mnt:
        assert attribute(mnt / "vm.raw", "state") == "passive"
        out, err = qedfs("stream", mnt / "vm.raw")
        assert "100.00 % complete" in out.splitlines()[-1]
        assert not err
        assert attribute(mnt / "vm.raw", "backing") == ""
        assert (mnt / "vm.raw").read_bytes() == BASE[: 4 * MIB]
    judged(leaf, BASE[: 4 * MIB])


def test_the_loop_over_steps_brings_everything_and_then_the_mode_completes_at_once(leaf: Path, tmp_path: Path) -> None:
    with mounted(leaf, tmp_path / "mnt", "mode=cow") as mnt:
        raw = mnt / "vm.raw"
        offset = steps = 0
        while count := int(qedfs("stream", "--step", str(offset), raw)[0]):
            offset, steps = offset + count, steps + 1
        assert (offset, steps) == (4 * MIB // 512, 64)
        assert (attribute(raw, "progress"), attribute(raw, "state")) == ("100.00", "passive")
        assert qedfs("stream", "--background", raw) == ("", "")
        qedfs("wait", "--timeout", "10", raw)
    judged(leaf, BASE[: 4 * MIB])


def test_wait_tells_what_will_not_complete_by_itself(leaf: Path, tmp_path: Path) -> None:
    with mounted(leaf, tmp_path / "mnt") as mnt:
        assert "is in mode cor" in refused("wait", mnt / "vm.raw")
        assert "is in mode cor" in refused("wait", mnt)
        qedfs("set", mnt / "vm.raw", "paused=1", "mode=stream")
        assert attribute(mnt / "vm.raw", "state") == "paused"
        assert "not complete after 0.2 s" in refused("wait", "--timeout", "0.2", mnt / "vm.raw", status=124)
    assert "is not on a qedfs mount" in refused("wait", tmp_path)


def test_bad_sectors_are_refused(leaf: Path, tmp_path: Path) -> None:
    with mounted(leaf, tmp_path / "mnt") as mnt:
        assert "not one it can have" in refused("stream", "--step", "-1", mnt / "vm.raw")
        assert qedfs("stream", "--step", str(1 << 40), mnt / "vm.raw") == ("0\n", "")
    assert "exclude each other" in refused("stream", "--step", "0", "--background", leaf)
    assert "is not a disk on a qedfs mount" in refused("stream", leaf)


@contextlib.contextmanager
def in_foreground(leaf: Path, mountpoint: Path, options: str) -> Iterator[subprocess.Popen[bytes]]:
    mountpoint.mkdir()
    line = [*QEDFS, "mount", "-f", "-o", options, str(leaf), str(mountpoint)]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    try:
        until(lambda: os.path.ismount(mountpoint) or process.poll() is not None)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def test_a_mount_ends_by_itself_when_all_is_complete_and_closed(leaf: Path, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    with in_foreground(leaf, mnt, f"mode=stream,{ALWAYS},unmount_when_complete") as process:
        waiting = subprocess.Popen([*QEDFS, "wait", str(mnt)])
        with (mnt / "vm.raw").open("rb+") as disk:
            assert waiting.wait(20) == 0
            assert process.poll() is None, "somebody has it open"
            disk.write(b"guest")
            os.fsync(disk.fileno())
        assert process.wait(20) == 0
    assert not os.path.ismount(mnt)
    judged(leaf, b"guest" + BASE[5 : 4 * MIB])


def test_an_image_that_nobody_opens_keeps_the_mount_for_the_grace_only(leaf: Path, tmp_path: Path) -> None:
    with in_foreground(leaf, tmp_path / "mnt", f"mode=stream,{ALWAYS},unmount_when_complete=0") as process:
        assert process.wait(20) == 0
    judged(leaf, BASE[: 4 * MIB])


def test_watch_shows_all_images_live_on_a_terminal(leaf: Path, tmp_path: Path) -> None:
    with mounted(leaf, tmp_path / "mnt", f"mode=stream,{ALWAYS}") as mnt:
        qedfs("wait", mnt)
        typed = tmp_path / "typescript"
        line = f"exec {' '.join(QEDFS)} status --watch {mnt}"
        process = subprocess.Popen(
            ["script", "-q", "-f", "-E", "never", "-c", line, typed], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        )  # fmt: skip
        try:
            until(lambda: typed.exists() and b"100.00 %" in typed.read_bytes())
        finally:
            process.terminate()
            process.wait(10)
        seen = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", typed.read_bytes())
        assert b"complete" in seen
