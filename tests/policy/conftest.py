"""Places where several users meet. Only root can play them all."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _root_plays_them_all() -> None:
    assert os.geteuid() == 0, "these tests act as several users, which takes root"


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody may enter (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="qedfs-policy-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    left = [line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines() if f" {folder}/" in line]
    for mountpoint in left:
        subprocess.run(["umount", "-l", mountpoint], check=True, timeout=30)
    # Nothing is removed through a mount.
    shutil.rmtree(folder)
    assert not left
