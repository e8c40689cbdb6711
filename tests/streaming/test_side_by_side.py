"""Many leaves of one base, streamed by one mount at the same time: all become whole, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from contrib.boot.server import listens
from qedfs.session.streams import IN_FLIGHT
from tests.cli.commands import mounted, qedfs, qedfs_json
from tests.failing.rig import MIB, until
from tests.image.qemu import qemu_check, qemu_img

LEAVES = 50
SIZE = 12 * MIB
PROCESS = 64 * MIB
"""Of a mount that does nothing; 52 MiB were seen."""
EACH = MIB
"""Of a leaf: a table, and what its connections to the server need; 0.7 MiB were seen."""


def peak(pid: int) -> int:
    """The most memory that the process has had resident, in bytes."""
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kib) << 10


@contextlib.contextmanager
def far_away(base: Path, socket: Path) -> Iterator[str]:
    """Serve `base` with a long way to it, on which much may be; yield the name."""
    command = ["nbdkit", "--foreground", "--readonly", "--unix", str(socket), "--filter=delay", "file", str(base)]
    with subprocess.Popen([*command, "rdelay=100ms"]) as server:
        try:
            until(lambda: listens(socket))
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()


def test_fifty_leaves_of_one_base_stream_side_by_side_in_bounded_memory(tmp_path: Path) -> None:
    base, images = tmp_path / "base.raw", tmp_path / "images"
    base.write_bytes(random.Random(5).randbytes(SIZE))
    images.mkdir()
    leaves = [images / f"vm{i}.qed" for i in range(LEAVES)]
    with far_away(base, tmp_path / "socket") as url:
        for leaf in leaves:
            qedfs("create", "-b", url, leaf)
        with mounted(images, tmp_path / "mnt", "idle=always,mode=stream,window=1G") as mnt:
            server = int(os.getxattr(mnt, "user.qedfs.pid"))
            at_once: set[int] = set()

            def all_complete() -> bool:
                states = [image["state"] for image in qedfs_json("status", mnt)]
                at_once.add(states.count("streaming"))
                return states == ["complete"] * LEAVES

            until(all_complete)
            assert max(at_once) > 1
            # Without a budget for all it is 231 MiB: every leaf gets what the long way can hold.
            assert peak(server) < PROCESS + IN_FLIGHT + LEAVES * EACH
    for leaf in leaves:
        assert qemu_check(leaf).status == 0
        # It stands alone: the server is gone.
        qemu_img("compare", "-f", "qed", "-F", "raw", leaf, base)
