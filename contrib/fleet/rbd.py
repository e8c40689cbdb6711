"""A base in a Ceph cluster, read through NBD: `python -m contrib.fleet.rbd` brings one up on this machine and boots from it.

The cluster is the least that there is: a monitor and an OSD that keeps everything in memory, on 127.0.0.1, without
authentication, gone with the script. It shows the way from RBD to a leaf; it is no cluster to measure.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from contrib.bench.rig import BenchError, make_random, need, run, until
from contrib.boot.server import free_port, listens
from contrib.fleet.hosts import THINKING, Host
from contrib.fleet.trace import MIB, boot_trace

SIZE = 256 * MIB
CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{port}
ms bind msgr2 = false
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
osd objectstore = memstore
memstore device bytes = {room}
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
crash dir = {folder}
pid file =
"""


class Cluster:
    """A cluster whose daemons run."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.config = folder / "ceph.conf"
        self._stack = stack
        fsid, disk, port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        self.config.write_text(CONFIG.format(fsid=fsid, port=port, folder=folder, room=2 * SIZE))
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        monitors = folder / "monmap"
        run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}]", "--fsid", fsid, monitors)
        self.do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
        self._daemon("ceph-mon", "-i", "a")
        self.do("ceph", "--connect-timeout", "60", "osd", "new", disk)
        self.do("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", disk)
        self._daemon("ceph-osd", "-i", "0")
        until(lambda: " 1 up" in self.do("ceph", "osd", "stat"), "the OSD", 0.2)

    def do(self, program: str, *words: str | Path) -> str:
        """Run a command of Ceph to its end; raise with its words when it fails."""
        return run(program, "-c", self.config, *words)

    def _daemon(self, program: str, *words: str) -> None:
        process = subprocess.Popen((program, "-c", str(self.config), *words, "-f"), stderr=subprocess.DEVNULL)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)


@contextlib.contextmanager
def exported(cluster: Cluster, image: str, sock: Path) -> Iterator[str]:
    """Have an image, or a snapshot (`POOL/IMAGE@SNAPSHOT`), exported by qemu-nbd while inside; yield its name for a leaf."""
    disk = f"rbd:{image}:conf={cluster.config}"
    command = ("qemu-nbd", "--read-only", "--persistent", "--shared=0", "--format=raw", "--socket", str(sock), disk)
    with subprocess.Popen(command) as process:
        try:
            until(lambda: listens(sock) or process.poll() is not None, "qemu-nbd", 0.05)
            yield f"nbd+unix:///?socket={sock}"
        finally:
            process.terminate()


def main() -> None:
    # An end from outside ends the daemons and the mount in good order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        need("ceph", "ceph-mon", "ceph-osd", "monmaptool", "rbd", "qemu-nbd", "fusermount3")
        with tempfile.TemporaryDirectory(prefix="qedfs-rbd-") as name, contextlib.ExitStack() as stack:
            tell(Path(name), stack)
    except BenchError as error:
        sys.exit(f"rbd: {error}")


def tell(folder: Path, stack: contextlib.ExitStack) -> None:
    base = folder / "base.raw"
    make_random(base, SIZE)
    cluster = Cluster(folder, stack)
    cluster.do("ceph", "osd", "pool", "create", "rbd")
    cluster.do("rbd", "pool", "init", "rbd")
    cluster.do("rbd", "import", "--no-progress", base, "rbd/base")
    cluster.do("rbd", "snap", "create", "--no-progress", "rbd/base@v1")
    cluster.do("rbd", "snap", "protect", "rbd/base@v1")
    print(run("ceph", "--version").strip())
    backing = stack.enter_context(exported(cluster, "rbd/base@v1", folder / "nbd.socket"))
    host = Host(folder / "host", backing)
    with host.mounted():
        boot = host.boot(boot_trace(SIZE, files=100), base, THINKING)
    print(f"booted in {boot.seconds:.1f} s, {boot.fetched / MIB:.1f} MiB from the cluster, all as in the base")


if __name__ == "__main__":
    main()
