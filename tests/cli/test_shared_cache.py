"""`-o shared_cache=DIR` as a user has it: real servers, real mounts, what crosses the network counted by the server."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.backing.object_servers import BUCKET, moto
from tests.backing.samples import served_by_nbdkit
from tests.cli.commands import QEDFS, mounted, qedfs, qedfs_json

MIB = 1 << 20
SIZE = 6 * MIB
CONTENT = random.Random("shared").randbytes(SIZE)
PATIENCE = 30


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def asked_of(raw: Path) -> int:
    return int(os.getxattr(raw, "user.qedfs.backing_bytes_read"))


def leaves(folder: Path, backing: str, *names: str) -> Path:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for name in names:
        qedfs("create", "-b", backing, "-F", "raw", images / f"{name}.qed")
    return images


def test_nbd_server_sends_every_byte_once_and_its_cache_goes_with_the_mount(tmp_path: Path) -> None:
    base, log, caches = tmp_path / "base.raw", tmp_path / "log", tmp_path / "caches"
    base.write_bytes(CONTENT)
    with served_by_nbdkit(tmp_path / "socket", "--filter=log", "file", base, f"logfile={log}") as backing:
        images = leaves(tmp_path, backing, "a", "b")
        with mounted(images, tmp_path / "mnt", f"shared_cache={caches}") as mnt:
            assert (mnt / "a.raw").read_bytes() == CONTENT
            assert asked_of(mnt / "a.raw") == SIZE
            assert (mnt / "b.raw").read_bytes() == CONTENT
            assert asked_of(mnt / "b.raw") == 0
            assert [file.stat().st_mode & 0o777 for file in caches.iterdir()] == [0o600]
    assert list(caches.iterdir()) == []
    assert caches.stat().st_mode & 0o777 == 0o700
    sent = [int(count, 16) for count in re.findall(r" Read .*count=(0x[0-9a-f]+) ", log.read_text())]
    assert sum(sent) == SIZE


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an object on a server that ends with the test."""
    server = moto()
    try:
        server.start()
        for name, value in server.variables().items():
            monkeypatch.setenv(name, value)
        server.put("base.raw", CONTENT)
        yield f"s3://{BUCKET}/base.raw"
    finally:
        server.stop()


def test_cache_survives_a_killed_mount_and_leaves_stream_through_it(tmp_path: Path, stored: str) -> None:
    images, mnt, caches = leaves(tmp_path, stored, "a", "b"), tmp_path / "mnt", tmp_path / "caches"
    mnt.mkdir()
    options = f"shared_cache={caches},shared_cache_size=1G"
    line = [*QEDFS, "mount", "-o", options, "--log-file", str(tmp_path / "log"), str(images / "a.qed"), str(mnt)]
    subprocess.run(line, check=True, timeout=PATIENCE)
    try:
        assert (mnt / "a.raw").read_bytes() == CONTENT
        (cache,) = caches.iterdir()
        eventually(lambda: qedfs_json("info", cache)["clusters"]["data"] == SIZE >> 16)
    finally:
        os.kill(int(os.getxattr(mnt, "user.qedfs.pid")), signal.SIGKILL)
        subprocess.run(["umount", "-l", mnt], check=True, timeout=PATIENCE)
    mnt.rmdir()
    with mounted(images / "b.qed", mnt, options, "mode=stream,idle=always"):
        eventually(lambda: os.getxattr(mnt / "b.raw", "user.qedfs.state") == b"complete")
    qedfs("check", cache)
    assert "is begun anew" not in Path(f"{mnt}.log").read_text()
    base = tmp_path / "base.raw"
    base.write_bytes(CONTENT)
    compared = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "qed", base, images / "b.qed"], capture_output=True, check=True
    )
    assert b"identical" in compared.stdout


def test_folder_that_others_may_enter_makes_the_mount_fail(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    images = leaves(tmp_path, str(tmp_path / "base.raw"), "a")
    caches, mnt = tmp_path / "caches", tmp_path / "mnt"
    mnt.mkdir()
    caches.mkdir(mode=0o700)
    caches.chmod(0o755)
    line = [*QEDFS, "mount", "-o", f"shared_cache={caches}", str(images), str(mnt)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr == f"qedfs: {caches}: others may enter (mode 0755); 'chmod 700' closes it\n"
