"""What mount(8) and umount(8) call, with the arguments they pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qedfs

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(qedfs.__file__).parents[1])}


def helper(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the helper under the name it is linked as."""
    code = f"import sys; sys.argv[0] = '/sbin/{name}'; from qedfs.cli.mount_helper import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    path = tmp_path / "vm.qed"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", str(path), "1M"], check=True, timeout=30)
    return path


@pytest.mark.parametrize("name", ["mount.qedfs", "mount.fuse.qedfs"])
def test_mount_and_umount_as_from_fstab(name: str, leaf: Path) -> None:
    mountpoint = leaf.parent / "mnt"
    done = helper(
        name, leaf, mountpoint, "-n", "-v", "-o", "rw,nosuid,nodev,_netdev,nofail,x-systemd.automount,mode=cow"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(mountpoint) == ["vm.raw"]
    assert os.getxattr(mountpoint / "vm.raw", "user.qedfs.mode") == b"cow"
    done = helper("umount.fuse.qedfs", mountpoint, "-v", "-n")
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(mountpoint) == []


def test_fake_mounts_nothing_and_still_judges_the_options(leaf: Path) -> None:
    mountpoint = leaf.parent / "mnt"
    assert helper("mount.qedfs", leaf, mountpoint, "-f", "-o", "rw").returncode == 0
    assert os.listdir(mountpoint) == []
    done = helper("mount.qedfs", leaf, mountpoint, "-f", "-o", "mod=cow")
    assert (done.returncode, done.stderr) == (1, "qedfs: mod: is not a mount option (did you mean 'mode'?)\n")


def test_sloppy_ignores_unknown_options(leaf: Path) -> None:
    assert helper("mount.qedfs", leaf, leaf.parent / "mnt", "-sf", "-o", "mod=cow").returncode == 0


def test_wrong_usage_is_one_line() -> None:
    done = helper("mount.qedfs", "only-one")
    assert done.returncode == 1
    assert done.stderr == "qedfs: mount.qedfs: missing argument 'MOUNTPOINT' (see 'mount.qedfs --help')\n"
