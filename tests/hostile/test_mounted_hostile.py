"""A mount of a folder in which hostile images lie beside good ones."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.judge import LIMIT_MEMORY
from tests.hostile.samples import NAMES, SAMPLES, SPECIAL, extreme_fields, image, overlay

QEDFS = (sys.executable, "-m", "qedfs")
DATA = os.urandom(4096)
CHEAP = [name for name in SAMPLES if "noise" not in name and "full of" not in name and "million" not in name]
"""Samples that take little room of their own."""


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="qedfs-hostile-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def good(path: Path) -> None:
    """Write an image of 1 MiB that begins with `DATA`."""
    image((4096, struct.pack("<Q", 8192)), (8192, struct.pack("<Q", 12288)), (12288, DATA), size=1 << 20)(path)


def fill(folder: Path, count: int) -> None:
    """Put `count` hostile images and what is no file at all into `folder`."""
    made = itertools.count()

    def path() -> Path:
        return folder / f"hostile{next(made):03}.qed"

    for kind in SPECIAL.values():
        kind(path())
    for backing in NAMES.values():
        overlay(path(), backing)
    for name in CHEAP:
        SAMPLES[name]()(path())
    overlay(folder / "loop1.qed", "loop2.qed")
    overlay(folder / "loop2.qed", "loop1.qed")
    for _, sample in itertools.cycle(extreme_fields()):
        sample(last := path())
        if last.name >= f"hostile{count:03}.qed":
            return


def memory(pid: int) -> int:
    """The largest resident set of a process so far, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) >> 10


def test_good_images_work_beside_two_hundred_hostile_ones(folder: Path, tmp_path: Path) -> None:
    fill(folder, 200)
    good(folder / "good1.qed")
    good(folder / "good2.qed")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    line = [*QEDFS, "mount", "--log-file", f"{tmp_path}/log", str(folder), str(mountpoint)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    try:
        for name in ("good1.raw", "good2.raw"):
            with (mountpoint / name).open("r+b") as file:
                assert file.read(4096) == DATA
                file.seek(512 << 10)
                file.write(DATA)
                os.fsync(file.fileno())
        status = json.loads(os.getxattr(mountpoint, "user.qedfs.status"))
        assert {"good1.raw", "good2.raw"} <= {leaf["name"] for leaf in status["leaves"]}
        assert len(status["leaves"]) + len(status["refused"]) + status["left_off"] >= 150
        assert all(refused["reason"].isprintable() for refused in status["refused"])
        pid = int(os.getxattr(mountpoint, "user.qedfs.pid"))
        for name in sorted(os.listdir(mountpoint)):
            for attribute in ("state", "density", "last_error", "clusters_data"):
                subprocess.run(
                    ["getfattr", "-n", f"user.qedfs.{attribute}", str(mountpoint / name)],
                    capture_output=True, timeout=20, check=False,
                )  # fmt: skip
        # Of tables a mount keeps what the files really hold: some 100 MiB here.
        assert memory(pid) <= 2 * LIMIT_MEMORY
        shown = subprocess.run(
            [*QEDFS, "status", str(mountpoint)], capture_output=True, text=True, timeout=30, check=False
        )
        assert "good1.raw" in shown.stdout
        assert all(line.isprintable() for line in shown.stdout.splitlines())
    finally:
        line = [*QEDFS, "unmount", str(mountpoint)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert all(entry.isprintable() for entry in Path(tmp_path / "log").read_text().splitlines())
    for name in ("good1.qed", "good2.qed"):
        assert subprocess.run([*QEDFS, "check", str(folder / name)], capture_output=True, check=False).returncode == 0
