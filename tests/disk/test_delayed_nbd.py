"""The same judgement as in test_linearizability, with nothing replaced: a leaf on a disk, a slow NBD server behind it."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qedfs.backing.nbd import open_nbd
from qedfs.backing.resilient import Backing
from qedfs.config import DiskOptions, Mode
from qedfs.disk.disk import open_disk
from qedfs.image.image import open_image
from qedfs.image.storage import open_storage
from qedfs.nbd.address import parse_address
from tests.disk.test_linearizability import SECTOR, Checked, stamped, use

SECTORS = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """The socket of a server that takes 3 ms for each read, over content in which every sector tells its place."""
    base, socket, ready = tmp_path / "base.raw", tmp_path / "socket", tmp_path / "ready"
    base.write_bytes(b"".join(stamped(0, i) for i in range(SECTORS)))
    command = ["nbdkit", "--foreground", "--readonly", f"--unix={socket}", f"--pidfile={ready}"]
    slow = ["--filter=delay", "file", str(base), "rdelay=3ms"]
    with subprocess.Popen([*command, *slow], stdin=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 20
            while not (ready.exists() and ready.read_text().endswith("\n")):
                assert server.poll() is None, "nbdkit has ended"
                assert time.monotonic() < deadline, "nbdkit does not answer"
                time.sleep(0.01)
            yield socket
        finally:
            server.terminate()


@pytest.mark.parametrize("cluster_size", ["4k", "64k", "2M"])
@pytest.mark.parametrize("seed", range(3))
async def test_no_write_is_lost_over_a_slow_server(store: Path, tmp_path: Path, seed: int, cluster_size: str) -> None:
    dice = random.Random(seed)
    leaf, name = tmp_path / "leaf.qed", f"nbd+unix:///?socket={store}"
    size = ["-o", f"cluster_size={cluster_size},table_size=2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", *size, "-b", name, "-F", "raw", leaf], check=True)
    image = await open_image(await open_storage(str(leaf), writable=True))
    backing = Backing(lambda: open_nbd(parse_address(name)), name=name, format="raw")
    mode = dice.choice((Mode.COR, Mode.COR, Mode.COW))
    async with open_disk(image, backing, DiskOptions(mode=mode, readahead=dice.choice((0, 256 << 10)))) as disk:
        checked = Checked(disk)
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(use, checked, dice, SECTORS, 200)
        checked.judge_all(bytes(await disk.read(0, SECTORS * SECTOR)))
    await image.aclose()
    await backing.aclose()
    subprocess.run(["qemu-img", "check", "-q", leaf], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "qed", "-O", "raw", leaf, tmp_path / "out.raw"], check=True)
    checked.judge_all((tmp_path / "out.raw").read_bytes())
