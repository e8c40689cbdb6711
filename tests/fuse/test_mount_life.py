"""How a mount begins and ends, and what happens in between: refusals, unmounting, leaves that come and go, other users."""

from __future__ import annotations

import json
import mmap
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qedfs.errors import MountError
from qedfs.fuse.mounts import find_mount
from qedfs.fuse.unmount import unmount
from tests.fuse.conftest import PATIENCE, ROOT, SERVER, Mount, Mounted
from tests.namespaces import FORGET_MOUNTS

MIB = 1 << 20
NOBODY = 65534


READERS = """
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
done = []
read = lambda: done.append(os.preadv(fd, [mmap.mmap(-1, 4096)], 0))
threads = [threading.Thread(target=read) for _ in range(500)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(done.count(4096))
"""


def mounts_at(path: Path) -> bool:
    return find_mount(str(path)) is not None


def refusal(point: Path, **setup: object) -> str:
    """What the program says that cannot mount on `point`; nothing is mounted then."""
    result = subprocess.run(
        [sys.executable, str(SERVER), str(point), json.dumps({"disks": [], **setup})],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    error: str = json.loads(result.stdout)["error"]
    assert len(error.splitlines()) == 1
    return error


def test_a_mountpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path}/none: No such file or directory"


def test_a_mountpoint_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path}/file: Not a directory"


def test_a_directory_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(tmp_path) == f"{tmp_path}: the directory is not empty"


def test_a_busy_mountpoint_is_refused_and_the_mount_there_lives(mount: Mount) -> None:
    mounted = mount()
    assert refusal(mounted.path) == f"{mounted.path}: something is mounted here already"
    assert mounted.file().read_bytes() == bytes(MIB)


def test_a_dead_mount_is_refused_without_touching_it(mount: Mount) -> None:
    mounted = mount()
    mounted.process.kill()
    mounted.process.wait(PATIENCE)
    assert refusal(mounted.path) == f"{mounted.path}: something is mounted here already"


def let_others_reach(path: Path) -> None:
    """Let other users come as far as `path`: pytest's folders are private, and workers have one level more of them."""
    for folder in path.parents:
        if not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(0o755)


def test_what_fusermount_says_becomes_the_error_line(tmp_path: Path) -> None:
    """An ordinary user may not open /dev/fuse here, or may not mount on a directory of root's: fusermount3 says which."""
    (tmp_path / "point").mkdir()
    let_others_reach(tmp_path / "point")
    error = refusal(tmp_path / "point", user=NOBODY)
    assert error.startswith(f"{tmp_path}/point: ")
    assert "fuse" in error or "denied" in error or "write access" in error
    assert not mounts_at(tmp_path / "point")


def test_the_mount_table_names_type_and_source(mount: Mount) -> None:
    """With what fusermount3 would take for separators, and a letter beyond ASCII."""
    found = find_mount(str(mount(fsname="/images/a,b\\c é.qed").path))
    assert found
    assert (found.fs_type, found.source) == ("fuse.qedfs", "/images/a,b\\c é.qed")


def test_readahead_is_raised(mount: Mount) -> None:
    found = find_mount(str(mount().path))
    assert found
    assert Path("/sys/class/bdi", found.device, "read_ahead_kb").read_text() == "4096\n"


def test_an_idle_mount_is_unmounted_and_the_server_ends(mount: Mount) -> None:
    mounted = mount()
    mounted.file().read_bytes()
    mounted.send("unmount")
    mounted.process.wait(PATIENCE)
    assert mounted.process.returncode == 0
    assert not mounts_at(mounted.path)


def test_cached_writes_reach_the_disk_before_an_unmount(mount: Mount) -> None:
    mounted = mount()
    with open(mounted.file(), "r+b") as file:
        file.write(b"x" * 100_000)
    # The file was closed, and written back by that; this one is not.
    with open(mounted.file(), "r+b") as file, mmap.mmap(file.fileno(), MIB) as mapped:
        mapped[500_000:500_001] = b"y"
    subprocess.run(["umount", str(mounted.path)], check=True, timeout=PATIENCE)
    journal = mounted.answer()["ended"]
    assert sum(length for _, _, _, length in journal) == 26 * 4096


def test_a_busy_mount_stays_and_its_holder_is_named(mount: Mount) -> None:
    mounted = mount()
    with open(mounted.file(), "rb") as file:
        (holder,) = mounted.ask("unmount")
        assert holder.endswith(f"(pid {os.getpid()})")
        assert file.read() == bytes(MIB)
    assert mounts_at(mounted.path)


def test_a_loop_device_is_named_as_holder(mount: Mount) -> None:
    mounted = mount()
    command = ["losetup", "--find", "--show", str(mounted.file())]
    made = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if made.returncode:
        # A kernel without loop devices has none to name.
        assert not Path("/dev/loop-control").exists() or "No such" in made.stderr, made.stderr
        return
    device = made.stdout.strip()
    try:
        assert mounted.ask("unmount") == [device]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=PATIENCE)


def test_a_lazy_unmount_serves_until_the_last_close(mount: Mount) -> None:
    mounted = mount()
    with open(mounted.file(), "r+b", buffering=0) as file:
        assert mounted.ask("lazy") is True
        assert not mounts_at(mounted.path)
        file.write(b"still served")
        os.fsync(file.fileno())
        assert ["flush", "vm.raw"] in mounted.ask("journal")
    assert "ended" in mounted.answer()
    mounted.process.wait(PATIENCE)


async def test_unmounting_what_is_not_mounted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="nothing is mounted here"):
        await unmount(str(tmp_path))


def test_a_leaf_appears_and_disappears_without_a_remount(mount: Mount) -> None:
    mounted = mount()
    assert not mounted.file("new.raw").exists()
    mounted.ask("add new.raw")
    assert sorted(os.listdir(mounted.path)) == ["new.raw", "vm.raw"]
    assert mounted.file("new.raw").read_bytes() == bytes(MIB)
    mounted.ask("remove new.raw")
    wait_until_gone(mounted.file("new.raw"))
    assert os.listdir(mounted.path) == ["vm.raw"]
    mounted.ask("add new.raw")
    assert mounted.file("new.raw").stat().st_size == MIB


def wait_until_gone(file: Path) -> None:
    """The kernel forgets a name a moment after its removal."""
    pause = threading.Event()
    for _ in range(500):
        if not file.exists():
            return
        pause.wait(0.01)
    pytest.fail("the name is still there")


def test_a_removed_leaf_is_served_until_the_last_close(mount: Mount) -> None:
    mounted = mount({"name": "vm.raw"}, {"name": "other.raw"})
    with open(mounted.file(), "r+b", buffering=0) as file:
        mounted.ask("remove vm.raw")
        mounted.send("closed vm.raw")
        wait_until_gone(mounted.file())
        file.write(b"after")
        os.fsync(file.fileno())
        assert mounted.ask("journal")[-1] == ["flush", "vm.raw"]
    assert mounted.answer() == "closed"


AS_NOBODY = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*AS_NOBODY, *command], capture_output=True, text=True, timeout=PATIENCE, check=False)


def reachable(mounted: Mounted) -> Mounted:
    let_others_reach(mounted.path)
    return mounted


def test_without_allow_other_another_user_is_shut_out(mount: Mount) -> None:
    mounted = reachable(mount({"name": "vm.raw", "mode": 0o666}))
    assert "Permission denied" in as_nobody("cat", str(mounted.file())).stderr


def test_with_allow_other_the_mode_of_the_disk_decides(mount: Mount) -> None:
    disks = [
        {"name": "private.raw", "mode": 0o600},
        {"name": "shown.raw", "mode": 0o644},
        {"name": "open.raw", "mode": 0o666},
    ]
    mounted = reachable(mount(*disks, options="allow_other"))
    set_mode = ("setfattr", "-n", "user.qedfs.mode", "-v", "cow")
    get_mode = ("getfattr", "--only-values", "-n", "user.qedfs.mode")
    for name, may_read, may_write in (
        ("private.raw", False, False),
        ("shown.raw", True, False),
        ("open.raw", True, True),
    ):
        file = str(mounted.file(name))
        assert (as_nobody("cat", file).returncode == 0) is may_read
        assert (as_nobody(*get_mode, file).returncode == 0) is may_read
        assert (as_nobody("dd", "if=/dev/zero", f"of={file}", "count=1", "conv=notrunc").returncode == 0) is may_write
        assert (as_nobody(*set_mode, file).returncode == 0) is may_write
        assert os.getxattr(file, "user.qedfs.mode") == (b"cow" if may_write else b"cor")


OPEN_FUSE = FORGET_MOUNTS + '; mknod "$0" c 10 229 && chmod 666 "$0" && mount --bind "$0" /dev/fuse && exec "$@"'
"""Lets ordinary users mount, for the command that follows alone: not every machine gives them /dev/fuse."""


def test_an_ordinary_user_mounts_and_unmounts(tmp_path: Path) -> None:
    """Through fusermount3, which also tells that the mount is busy."""
    point = tmp_path / "mount"
    point.mkdir()
    os.chown(point, NOBODY, NOBODY)
    let_others_reach(point)
    namespace = ("unshare", "--mount", "sh", "-c", OPEN_FUSE, str(tmp_path / "device"))
    mounted = Mounted(point, {"disks": [{"name": "vm.raw"}], "user": NOBODY}, namespace)
    try:
        assert mounted.answer() == "ready", mounted.log
        inside = ("nsenter", "--mount", f"--target={mounted.process.pid}", *AS_NOBODY)
        reader = "import sys, time; file = open(sys.argv[1]); print(len(file.read()), flush=True); time.sleep(60)"
        with subprocess.Popen(
            [*inside, "/usr/bin/python3", "-c", reader, str(mounted.file())], stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == b"1048576\n"
            assert mounted.ask("unmount") == [f"python3 (pid {holder.pid})"]
            holder.kill()
        mounted.send("unmount")
        mounted.process.wait(PATIENCE)
        assert mounted.process.returncode == 0
    finally:
        mounted.end()


@pytest.mark.parametrize("options", ["", "direct_io=on"], ids=["background", "foreground"])
def test_many_stuck_reads_of_one_disk_do_not_hold_up_another(mount: Mount, options: str) -> None:
    """500 threads wait for a dead backing; each keeps a request of the kernel, of either kind."""
    mounted = mount({"name": "stuck.raw", "size": 4 * MIB}, {"name": "vm.raw"}, options=options)
    mounted.ask("hold stuck.raw")
    stuck = subprocess.Popen([sys.executable, "-c", READERS, str(mounted.file("stuck.raw"))], stdout=subprocess.PIPE)
    try:
        while int(mounted.ask("waiting stuck.raw")) < 500:
            assert stuck.poll() is None
        for _ in range(3):
            assert mounted.file().read_bytes() == bytes(MIB)
            assert os.getxattr(mounted.file("stuck.raw"), "user.qedfs.state") == b"passive"
    finally:
        mounted.ask("release stuck.raw")
        assert stuck.communicate(timeout=PATIENCE)[0] == b"500\n"
