"""A libvirtd of our own, without systemd: in a mount namespace and a network namespace, with its own configuration and state.

What it mounts is seen only there: commands that look at it run inside (`Daemon.run`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
"""Root, as only root may mount here without `allow_other`; no helper daemons, no cgroups: a container may have none."""
FOLDERS = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
    "srv": "/srv",
}
"""What libvirtd finds where, of a folder of ours."""
ACCOUNTS = {
    "passwd": ("/etc/passwd", "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin"),
    "group": ("/etc/group", "libvirt-qemu:x:64055:"),
}
"""Debian's libvirtd wants to know this user at its start, whatever its configuration says, and `libvirt-daemon-system`,
which makes it, wants systemd."""
ENTER = """
set -e
mount --make-rprivate /
# Or these copies would keep alive what is unmounted outside; one whose folder is removed there meanwhile makes umount fail.
while grep -q " - fuse.qedfs " /proc/self/mountinfo; do
    umount --lazy --all --types fuse.qedfs || :
done
mount -t proc proc /proc
while read -r ours theirs; do
    [ -e "$theirs" ] || mkdir -p "$theirs"
    mount --bind "$ours" "$theirs"
done
libvirtd &
wait $!
"""
"""The shell stays: as the first process of its namespace it reaps what libvirtd leaves behind."""
PATIENCE = 60.0
"""Seconds; libvirtd first asks each QEMU what it can do."""


class LibvirtError(Exception):
    """Something went wrong; the message is for a person."""


class Daemon:
    """A libvirtd that runs. `etc` is its /etc/libvirt, `srv` its /srv."""

    def __init__(self, folder: Path, first: int) -> None:
        self.etc, self.srv = folder / "etc", folder / "srv"
        self._first = first

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a command where libvirtd runs; return what it prints, errors included.

        Raises:
            LibvirtError: with `check`, it failed.
        """
        inside = ("nsenter", f"--target={self._first}", "--mount", "--net", "--pid", "--wdns=/", *command)
        done = subprocess.run(
            inside, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if check and done.returncode:
            raise LibvirtError(f"{command[0]} {command[1]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout + done.stderr

    def virsh(self, *words: str | Path, check: bool = True) -> str:
        """Run `virsh`. Raises as `run`."""
        return self.run("virsh", *words, check=check)


@contextmanager
def libvirtd(folder: Path, hook: Path) -> Iterator[Daemon]:
    """Have a libvirtd with its files in the empty `folder`, and `hook` as the one for QEMU, which it looks for at its start; at the end it is ended, with whatever it has started.

    Raises:
        LibvirtError: it does not come up; the message has its log.
    """
    for name in FOLDERS:
        (folder / name).mkdir()
    (folder / "etc" / "qemu.conf").write_text(QEMU_CONF)
    (folder / "etc" / "hooks").mkdir()
    shutil.copy(hook, folder / "etc" / "hooks" / "qemu")
    for name, (theirs, account) in ACCOUNTS.items():
        known = Path(theirs).read_text()
        missing = f"\n{account.partition(':')[0]}:" not in f"\n{known}"
        (folder / name).write_text(known + f"{account}\n" * missing)
    places = {**FOLDERS, **{name: theirs for name, (theirs, _) in ACCOUNTS.items()}}
    binds = "".join(f"{folder / name} {theirs}\n" for name, theirs in places.items())
    with (folder / "daemon.log").open("wb") as log:
        # Its own processes only: when the first of the namespace ends, the kernel ends all the others.
        command = (
            "env",
            "-i",
            f"PATH={os.defpath}:/usr/sbin:/sbin",
            "HOME=/root",
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            ENTER,
        )
        outer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        assert outer.stdin
        outer.stdin.write(binds.encode())
        outer.stdin.close()
        try:
            yield _wait_until_it_answers(folder, outer)
        finally:
            if outer.poll() is None:
                os.killpg(outer.pid, signal.SIGKILL)
                outer.wait()


def _wait_until_it_answers(folder: Path, outer: subprocess.Popen[bytes]) -> Daemon:
    end = time.monotonic() + PATIENCE
    while outer.poll() is None and time.monotonic() < end:
        first = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if first:
            daemon = Daemon(folder, int(first[0]))
            if "Running hypervisor" in daemon.virsh("version", check=False):
                return daemon
        time.sleep(0.1)
    log = (folder / "daemon.log").read_text(errors="replace")
    raise LibvirtError(f"libvirtd does not answer:\n{log[-2000:]}")
