"""A domain of libvirt on a leaf, from the first command to the last, with the hook, as a transcript."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from contrib.boot import judge, workload
from contrib.boot.guest import Guest, run
from contrib.boot.server import serving
from contrib.libvirt.daemon import Daemon, LibvirtError, libvirtd

HERE = Path(__file__).parent
QEDFS = Path(sys.executable).with_name("qedfs")
PATIENCE = 150.0
"""Seconds for a guest to do its work and power off."""
STORE = "nbd+unix:///base?socket=/srv/nbd.socket"
TABLE = f"""# DOMAIN  SOURCE               MOUNTPOINT      OPTIONS                     AT THE END
program   {QEDFS}
vm1       /srv/images/vm1.qed  /srv/disks/vm1  idle=always,stream_rate=8M  unmount
vm2       /srv/images/vm2.qed  /srv/disks/vm2  idle=always                 leave
vm3       /srv/images/vm3.qed  /srv/disks/vm3  -                           unmount
"""

Tell = Callable[[str], None]


class Story:
    """What happens, and is told."""

    def __init__(self, daemon: Daemon, guest: Guest, tell: Tell) -> None:
        self.daemon = daemon
        self.guest = guest
        self._tell = tell

    def do(self, *words: str, fails: bool = False) -> str:
        """Run a command inside, and tell it with what it says."""
        program = str(QEDFS) if words[0] == "qedfs" else words[0]
        said = self.daemon.run(program, *words[1:], check=not fails)
        self._tell(f"$ {shlex.join(words)}")
        for line in said.strip("\n").splitlines():
            self._tell(line.rstrip().replace(str(QEDFS), "qedfs"))
        return said

    def say(self, line: str) -> None:
        self._tell(f"# {line}")

    def define(self, name: str, token: str) -> None:
        """Define a domain on the disk of the leaf `name`."""
        values = {"NAME": name, "TOKEN": token, "FOLDER": f"/srv/{name}", "MOUNTPOINT": f"/srv/disks/{name}"}
        xml = (HERE / "domain.xml").read_text()
        for key, value in values.items():
            xml = xml.replace(f"@{key}@", value)
        for folder in (self.daemon.srv / name, self.daemon.srv / "disks" / name):
            folder.mkdir(parents=True)
        for file in (self.guest.kernel, self.guest.initramfs):
            shutil.copyfile(file, self.daemon.srv / name / file.name)
        (self.daemon.srv / f"{name}.xml").write_text(xml)
        self.do("virsh", "define", f"/srv/{name}.xml")

    def allocation(self) -> int:
        """Return the bytes that libvirt says are allocated in the volume of vm1."""
        self.daemon.virsh("pool-refresh", "disks")
        said = self.daemon.virsh("vol-info", "--bytes", "--pool", "disks", "vm1.raw")
        found = re.search(r"Allocation:\s*(\d+)", said)
        if not found:
            raise LibvirtError(f"vol-info: {said}")
        return int(found[1])

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Return when `holds`. Raises LibvirtError after `PATIENCE`."""
        end = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > end:
                raise LibvirtError(f"waited for {what} in vain")
            time.sleep(0.1)

    def is_off(self, name: str) -> bool:
        return "shut off" in self.daemon.virsh("domstate", name)

    def is_mounted(self, name: str) -> bool:
        return "fuse.qedfs" in self.daemon.run("findmnt", "-n", "-o", "FSTYPE", f"/srv/disks/{name}", check=False)

    def tell_all(self) -> None:
        """A domain whose disk streams, with a pool over the mount; one whose mount stays; one that does not start."""
        self.do("qedfs", "create", "--mode", "stream", "-b", STORE, "-F", "raw", "/srv/images/vm1.qed")
        self.do("grep", "-v", "^program", "/etc/libvirt/qedfs.conf")
        self.define("vm1", "first")
        self.do("virsh", "pool-define-as", "disks", "dir", "--target", "/srv/disks/vm1")
        self.do("virsh", "pool-start", "disks")
        self.do("virsh", "vol-list", "disks")
        self.say("The hook mounts the leaf before the domain starts:")
        self.do("virsh", "start", "vm1")
        self.do("virsh", "pool-refresh", "disks")
        self.do("virsh", "vol-list", "disks", "--details")
        self.do("virsh", "domblkinfo", "vm1", "vda", "--human")
        first = self.allocation()
        self.wait(lambda: self.allocation() >= first + (8 << 20), "an allocation that grows")
        self.say("A moment later:")
        self.do("virsh", "vol-info", "--pool", "disks", "vm1.raw")
        self.do("qedfs", "status", "/srv/disks/vm1")
        self.wait(lambda: self.is_off("vm1"), "the end of vm1")
        self.say("The guest has powered off, and the hook has unmounted:")
        self.do("virsh", "domstate", "vm1", "--reason")
        self.wait(lambda: not self.is_mounted("vm1"), "the unmount")
        self.do("virsh", "pool-refresh", "disks")
        self.do("virsh", "vol-list", "disks")
        self.do("qedfs", "check", "/srv/images/vm1.qed")

    def tell_of_a_mount_that_stays(self) -> None:
        """A table that says `leave`: the disk completes while nobody runs, and the next start finds the mount."""
        self.do("qedfs", "create", "--mode", "stream", "-b", STORE, "-F", "raw", "/srv/images/vm2.qed")
        self.define("vm2", "second")
        self.do("virsh", "start", "vm2")
        self.wait(lambda: self.is_off("vm2"), "the end of vm2")
        self.say("The table says that this mount stays, so the disk goes on streaming:")
        self.do("qedfs", "wait", "/srv/disks/vm2")
        self.do("qedfs", "status", "/srv/disks/vm2")
        self.do("qedfs", "unmount", "/srv/disks/vm2")

    def tell_of_a_failure(self) -> None:
        """A leaf that cannot be mounted keeps its domain from starting."""
        self.define("vm3", "third")
        said = self.do("virsh", "start", "vm3", fails=True)
        if "Hook script execution failed" not in said or not self.is_off("vm3"):
            raise LibvirtError(f"a domain without its disk: {said}")

    def judge(self, name: str, token: str, folder: Path) -> None:
        """Raise BootError unless the leaf is sound and has exactly what the guest left on its disk. `folder` is for copies."""
        leaf = folder / f"{name}.qed"
        shutil.copyfile(self.daemon.srv / "images" / leaf.name, leaf)
        if "backing file" in run("qemu-img", "info", leaf):
            # Outside the socket of the store has another path.
            store = STORE.replace("/srv/", f"{self.daemon.srv}/")
            run("qemu-img", "rebase", "-u", "-f", "qed", "-F", "raw", "-b", store, leaf)
        judge.check_leaf(leaf)
        judge.check_files(leaf, workload.sums_after(self.guest.sums(), token), folder)


@contextmanager
def story(guest: Guest, folder: Path, tell: Tell) -> Iterator[Story]:
    """Have a libvirtd with the hook, and a store that serves the guest's disk to it."""
    with libvirtd(folder, HERE / "qemu") as daemon:
        (daemon.etc / "qedfs.conf").write_text(TABLE)
        (daemon.srv / "images").mkdir()
        with serving(guest.disk, "nbdkit", "unix", daemon.srv):
            yield Story(daemon, guest, tell)
