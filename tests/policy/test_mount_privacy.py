"""Who may see and change what of a mount: real mounts, and real processes of other users."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_mount import QEDFS, Finished, in_namespace, run
from tests.policy.people import MALLORY, NOBODY, ROOT, folder, give, image, link, secret

CONTENT = bytes(range(256)) * 4096


def as_user(uid: int, *command: object) -> Finished:
    return run("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command)


def try_mount(source: Path, mountpoint: Path, *options: str) -> Finished:
    return run(*QEDFS, "mount", "--log-file", f"{mountpoint}.log", *[f"-o{o}" for o in options], source, mountpoint)


@contextlib.contextmanager
def mounted(source: Path, mountpoint: Path, *options: str) -> Iterator[Path]:
    folder(mountpoint)
    done = try_mount(source, mountpoint, *options)
    assert done.returncode == 0, done.stderr
    pid = int(os.getxattr(mountpoint, "user.qedfs.pid"))
    try:
        yield mountpoint
    finally:
        if run(*QEDFS, "unmount", mountpoint).returncode:
            os.kill(pid, signal.SIGKILL)
            subprocess.run(["umount", "-l", str(mountpoint)], check=False, timeout=30)
            pytest.fail("not unmounted")


@pytest.fixture
def base(shared: Path) -> Path:
    path = secret(shared / "base.raw", mode=0o644)
    path.write_bytes(CONTENT)
    return path


async def test_a_mount_is_for_the_user_who_makes_it(shared: Path, base: Path) -> None:
    leaf = await image(shared / "vm.qed", base, mode=0o666 & ~0o022)
    with mounted(leaf, shared / "mnt") as mnt:
        assert (mnt / "vm.raw").read_bytes() == CONTENT
        for uid in (MALLORY, NOBODY):
            for command in (("ls", mnt), ("stat", mnt / "vm.raw"), ("cat", mnt / "vm.raw"), ("getfattr", "-d", mnt)):
                done = as_user(uid, *command)
                assert done.returncode != 0
                assert "Permission denied" in done.stderr


async def test_with_allow_other_the_modes_of_the_images_decide(shared: Path, base: Path) -> None:
    images = folder(shared / "images")
    await image(images / "public.qed", base, ROOT, 0o644)
    await image(images / "closed.qed", base, ROOT, 0o600)
    await image(images / "hers.qed", base, MALLORY, 0o600)
    with mounted(images, shared / "mnt", "allow_other") as mnt:
        for name, uid, mode in (("public", ROOT, 0o644), ("closed", ROOT, 0o600), ("hers", MALLORY, 0o600)):
            shown = (mnt / f"{name}.raw").stat()
            assert (shown.st_uid, shown.st_gid, stat.S_IMODE(shown.st_mode)) == (uid, uid, mode)
        can = {
            (name, uid, how): as_user(uid, "dd", "status=none", "conv=notrunc", "bs=512", "count=1", *files).returncode == 0
            for name in ("public", "closed", "hers")
            for uid in (MALLORY, NOBODY)
            for how, files in {
                "read": (f"if={mnt}/{name}.raw", "of=/dev/null"),
                "write": ("if=/dev/zero", f"of={mnt}/{name}.raw"),
            }.items()
        }  # fmt: skip
        assert {key for key, allowed in can.items() if allowed} == {
            ("public", MALLORY, "read"), ("public", NOBODY, "read"),
            ("hers", MALLORY, "read"), ("hers", MALLORY, "write"),
        }  # fmt: skip


async def test_attributes_are_written_only_by_who_may_write_the_disk(shared: Path, base: Path) -> None:
    images = folder(shared / "images")
    await image(images / "public.qed", base, ROOT, 0o644)
    await image(images / "hers.qed", base, MALLORY, 0o600)
    with mounted(images, shared / "mnt", "allow_other") as mnt:
        for name, value in (("mode", "cow"), ("prefetch", "0 65536"), ("paused", "1"), ("stream_rate", "1")):
            done = as_user(MALLORY, "setfattr", "-n", f"user.qedfs.{name}", "-v", value, mnt / "public.raw")
            assert "Permission denied" in done.stderr
        assert os.getxattr(mnt / "public.raw", "user.qedfs.mode") == b"cor"
        for name, value in (("mode", "cow"), ("prefetch", "0 65536")):
            done = as_user(MALLORY, "setfattr", "-n", f"user.qedfs.{name}", "-v", value, mnt / "hers.raw")
            assert (done.returncode, done.stderr) == (0, "")
        assert os.getxattr(mnt / "hers.raw", "user.qedfs.mode") == b"cow"
        # Reading them takes the right to read the disk.
        assert as_user(NOBODY, "getfattr", "-n", "user.qedfs.mode", mnt / "public.raw").returncode == 0
        assert "Permission denied" in as_user(NOBODY, "getfattr", "-n", "user.qedfs.mode", mnt / "hers.raw").stderr


async def test_nobody_changes_owner_or_mode_through_the_mount(shared: Path, base: Path) -> None:
    leaf = await image(shared / "vm.qed", base, MALLORY, 0o600)
    with mounted(leaf, shared / "mnt", "allow_other") as mnt:
        for command in (("chmod", "666", mnt / "vm.raw"), ("chown", str(NOBODY), mnt / "vm.raw")):
            for uid in (ROOT, MALLORY):
                assert "Operation not permitted" in as_user(uid, *command).stderr
    assert stat.S_IMODE(leaf.stat().st_mode) == 0o600


async def test_a_disk_shows_nothing_that_the_owner_of_its_image_may_not_read(shared: Path, base: Path) -> None:
    images = folder(shared / "images", ROOT, 0o1777)
    shadow = secret(folder(shared / "closed", mode=0o700) / "shadow", mode=0o644)
    roots = folder(shared / "root")
    await image(roots / "middle.qed", "base.raw")
    (roots / "base.raw").write_bytes(CONTENT)
    await image(images / "direct.qed", shadow, MALLORY)
    link(images / "middle.img", roots / "middle.qed", MALLORY)
    link(images / "base.raw", shadow, MALLORY)
    await image(images / "moved.qed", images / "middle.img", MALLORY, raw=False)
    await image(images / "good.qed", base, MALLORY)
    with mounted(images, shared / "mnt", "allow_other") as mnt:
        # `moved` reads what root's image means by "base.raw", not what Mallory put beside her link to it.
        assert sorted(os.listdir(mnt)) == ["good.raw", "moved.raw"]
        assert (mnt / "moved.raw").read_bytes() == CONTENT
        refused = os.getxattr(mnt, "user.qedfs.status").decode()
        assert f"{shadow}: cannot be opened (Permission denied)" in refused


async def test_a_disk_cannot_be_hidden_by_a_file_dropped_beside_it(shared: Path, base: Path) -> None:
    images = folder(shared / "images", ROOT, 0o1777)
    await image(images / "vm.qed", base)
    await image(images / "evil.qed", "vm.qed", MALLORY, raw=False)
    await image(images / "vm", base, MALLORY)
    with mounted(images, shared / "mnt") as mnt:
        assert os.listdir(mnt) == ["vm.raw"]
        assert os.getxattr(mnt / "vm.raw", "user.qedfs.leaf") == os.fsencode(images / "vm.qed")
        refused = os.getxattr(mnt, "user.qedfs.status").decode()
        assert "evil.qed: its backing is a leaf of this mount" in refused
        assert "would be called vm.raw" in refused


# --- places -----------------------------------------------------------------------------------------------------------


async def test_a_backing_on_the_mount_or_on_another_one_of_ours_is_refused(shared: Path, base: Path) -> None:
    leaf = await image(shared / "vm.qed", base)
    below = await image(shared / "below.qed", shared / "mnt/vm.raw")
    through = await image(shared / "through.qed", shared / "link")
    link(shared / "link", shared / "mnt/vm.raw", ROOT)
    with mounted(leaf, shared / "mnt"):
        folder(shared / "second")
        for over in (below, through):
            done = try_mount(over, shared / "second")
            assert done.returncode == 1
            assert "lies on a qedfs mount; name the image under it instead" in done.stderr
    for over in (below, through):  # on its own mountpoint
        done = try_mount(over, shared / "mnt")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1


async def test_a_mount_inside_or_over_its_source_is_refused(shared: Path, base: Path) -> None:
    images = folder(shared / "images")
    await image(images / "vm.qed", base)
    folder(images / "mnt")
    link(shared / "elsewhere", images / "mnt", ROOT)
    for mountpoint in (images / "mnt", shared / "elsewhere", images):
        done = try_mount(images, mountpoint)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "its own source" in done.stderr


# --- ordinary users ---------------------------------------------------------------------------------------------------

_OPEN_FUSE = "mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse"
_NO_OTHERS = "touch /mnt/conf && mount --bind /mnt/conf /etc/fuse.conf"
_OTHERS = "echo user_allow_other > /mnt/conf && mount --bind /mnt/conf /etc/fuse.conf"


@pytest.mark.parametrize("option", ["allow_other", "allow_root"])
async def test_an_ordinary_user_needs_user_allow_other_and_is_told_so(shared: Path, base: Path, option: str) -> None:
    home = folder(shared / "home", 1000)
    leaf = await image(home / "vm.qed", base, 1000)
    script = f"{_OPEN_FUSE}; {_NO_OTHERS}; AS_USER mkdir {home}/mnt; AS_USER QEDFS mount -o {option} {leaf} {home}/mnt"
    done = in_namespace(script)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "user_allow_other" in done.stderr
    assert "/etc/fuse.conf" in done.stderr


async def test_an_ordinary_users_mount_is_closed_to_root_and_opens_nothing_for_others(shared: Path, base: Path) -> None:
    home = folder(shared / "home", 1000)
    leaf = await image(home / "vm.qed", base, 1000, 0o600)
    mallory = f"setpriv --reuid={MALLORY} --regid={MALLORY} --clear-groups"
    done = in_namespace(
        f"{_OPEN_FUSE}; {_NO_OTHERS}; AS_USER mkdir {home}/mnt; AS_USER QEDFS mount {leaf} {home}/mnt; "
        f"cat {home}/mnt/vm.raw 2>&1 | grep -q 'Permission denied' || echo root may; "
        f"{mallory} cat {home}/mnt/vm.raw 2>&1 | grep -q 'Permission denied' || echo mallory may; "
        f"AS_USER cmp {home}/mnt/vm.raw {base}; AS_USER QEDFS unmount {home}/mnt"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_an_ordinary_user_shares_by_modes_where_the_system_allows_it(shared: Path, base: Path) -> None:
    home = folder(shared / "home", 1000)
    leaf = await image(home / "vm.qed", base, 1000, 0o640)
    mallory = f"setpriv --reuid={MALLORY} --regid={MALLORY} --clear-groups"
    done = in_namespace(
        f"{_OPEN_FUSE}; {_OTHERS}; AS_USER mkdir {home}/mnt; AS_USER QEDFS mount -o allow_other {leaf} {home}/mnt; "
        f"cmp {home}/mnt/vm.raw {base}; "
        f"{mallory} cat {home}/mnt/vm.raw 2>&1 | grep -q 'Permission denied' || echo mallory may; "
        f"AS_USER QEDFS unmount {home}/mnt"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_allow_root_lets_root_in_and_nobody_else_whatever_the_mode(shared: Path, base: Path) -> None:
    home = folder(shared / "home", 1000)
    leaf = await image(home / "vm.qed", base, 1000, 0o644)
    mallory = f"setpriv --reuid={MALLORY} --regid={MALLORY} --clear-groups"
    done = in_namespace(
        f"{_OPEN_FUSE}; {_OTHERS}; AS_USER mkdir {home}/mnt; AS_USER QEDFS mount -o allow_root {leaf} {home}/mnt; "
        f"{mallory} cat {home}/mnt/vm.raw 2>&1 | grep -q 'Permission denied' || echo mallory may; "
        f"cmp {home}/mnt/vm.raw {base}; "
        f"{mallory} cat {home}/mnt/vm.raw 2>&1 | grep -q 'Permission denied' || echo mallory may after root; "
        f"AS_USER QEDFS unmount {home}/mnt"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_an_ordinary_user_opens_nothing_by_an_image_of_another_user(shared: Path, base: Path) -> None:
    home = folder(shared / "home", 1000)
    leaf = give(await image(shared / "vm.qed", base), MALLORY, 0o644)
    done = in_namespace(f"{_OPEN_FUSE}; AS_USER mkdir {home}/mnt; AS_USER QEDFS mount -o ro {leaf} {home}/mnt")
    assert done.returncode == 1
    assert f"belongs to user {MALLORY}; it may name only what allow_backing names" in done.stderr
