"""mount(8) and umount(8) themselves, with the helpers where they look for them: in `/sbin`, here one of a private namespace."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.failing.rig import PATIENCE, QEDFS, ROOT, run
from tests.namespaces import FORGET_MOUNTS

HELPERS = ("mount.qedfs", "mount.fuse.qedfs", "umount.fuse.qedfs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A leaf, a mountpoint, and `sbin` with the helpers as an installation would make them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].strip().splitlines())
    (tmp_path / "sbin").mkdir()
    for name in HELPERS:
        module, _, function = scripts[name].partition(":")
        script = tmp_path / "sbin" / name
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"from {module} import {function}\nsys.exit({function}())\n"
        )
        script.chmod(0o755)
    (tmp_path / "mnt").mkdir()
    run(*QEDFS, "create", "-s", "1M", tmp_path / "vm.qed")
    return tmp_path


def with_helpers(folder: Path, script: str) -> str:
    """Run a shell script where `/sbin` has the helpers, too, `$1` is `folder`; return what it said. It must succeed."""
    sbin = os.path.realpath("/sbin")
    # Mounts of the script end with its namespace.
    prepare = FORGET_MOUNTS + f'\nmount -t overlay overlay -o "lowerdir=$1/sbin:{sbin}" {sbin}'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", f"{prepare}\n{script}", "sh"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["qedfs", "fuse.qedfs"])
def test_mount_and_umount(folder: Path, kind: str) -> None:
    said = with_helpers(
        folder,
        f"""
        mount -t {kind} "$1/vm.qed" "$1/mnt" -o mode=cow,nosuid,_netdev
        getfattr --only-values -n user.qedfs.mode "$1/mnt/vm.raw" 2>/dev/null; echo
        findmnt -n -o FSTYPE,SOURCE "$1/mnt"
        umount "$1/mnt"
        findmnt "$1/mnt" || qemu-io -f qed -c "write 0 512" "$1/vm.qed" >/dev/null  # it is closed already
        """,
    )
    mode, mount = said.splitlines()
    assert mode == "cow"
    assert mount.split() == ["fuse.qedfs", str(folder / "vm.qed")]


def test_a_line_of_fstab(folder: Path) -> None:
    """As at boot, and with the word of umount(8) for a mount in use."""
    (folder / "fstab").write_text(f"{folder}/vm.qed  {folder}/mnt  qedfs  rw,_netdev,nofail,mode=cow  0  0\n")
    said = with_helpers(
        folder,
        """
        mount --fstab "$1/fstab" --all
        exec 3<"$1/mnt/vm.raw"
        ! umount "$1/mnt"
        exec 3<&-
        umount "$1/mnt"
        """,
    )
    (line,) = said.splitlines()
    assert line.startswith(f"qedfs: {folder}/mnt: is in use by ")


def test_a_mount_that_fails_says_why(folder: Path) -> None:
    said = with_helpers(folder, '! mount -t fuse.qedfs "$1/missing.qed" "$1/mnt" -o mode=cow')
    assert said == f"qedfs: {folder}/missing.qed: No such file or directory\n"
