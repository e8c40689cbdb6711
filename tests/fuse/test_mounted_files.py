"""What programs see of a mounted disk: reading, writing, growing, mapping, mixed ways of access."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuse.conftest import Mount, Mounted

MIB = 1 << 20
BLOCK = 4096


def aligned(length: int) -> mmap.mmap:
    """Memory that O_DIRECT takes."""
    return mmap.mmap(-1, max(length, 1))


def read_at(fd: int, pos: int, length: int) -> bytes:
    buffer = aligned(length)
    return buffer[: os.preadv(fd, [memoryview(buffer)[:length]], pos)]


def write_at(fd: int, pos: int, data: bytes, flags: int = 0) -> None:
    buffer = aligned(len(data))
    buffer[: len(data)] = data
    assert os.pwritev(fd, [memoryview(buffer)[: len(data)]], pos, flags) == len(data)


def refused(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call(*arguments)
    return caught.value.errno


class Open:
    """A descriptor for a `with`."""

    def __init__(self, path: Path, flags: int = os.O_RDWR) -> None:
        self.fd = os.open(path, flags)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def test_the_directory_lists_the_disks(mount: Mount) -> None:
    mounted = mount(*({"name": f"vm{i}.raw"} for i in range(300)))
    assert sorted(os.listdir(mounted.path)) == sorted(f"vm{i}.raw" for i in range(300))
    assert refused(os.stat, mounted.file("other")) == errno.ENOENT


def test_stat_tells_size_rights_and_blocks(mount: Mount) -> None:
    status = mount({"name": "vm.raw", "size": 3 * MIB, "mode": 0o640}).file().stat()
    assert (status.st_size, status.st_mode & 0o7777, status.st_blocks) == (3 * MIB, 0o640, 256)
    assert (status.st_uid, status.st_gid, status.st_nlink) == (os.getuid(), os.getgid(), 1)


def test_statfs_tells_the_file_system_of_the_leaf(mount: Mount) -> None:
    ours, theirs = os.statvfs(mount().path), os.statvfs(__file__)
    assert (ours.f_blocks, ours.f_frsize, ours.f_namemax) == (theirs.f_blocks, theirs.f_frsize, 255)


def test_what_was_written_is_read(mount: Mount) -> None:
    file = mount().file()
    with Open(file) as fd:
        os.pwrite(fd, b"content", 12345)
        assert os.pread(fd, 9, 12344) == b"\0content\0"
    assert file.read_bytes()[12345:12352] == b"content"


@pytest.mark.parametrize("options", ["", "direct_io=on", "direct_io=off", "poll=0"])
def test_odd_sizes_are_answered_on_o_direct_handles(mount: Mount, options: str) -> None:
    with Open(mount(options=options).file(), os.O_RDWR | os.O_DIRECT) as fd:
        write_at(fd, 0, bytes(range(256)) * 32)
        for length in (1, 512, 513, 4096, 8191):
            assert read_at(fd, 0, length) == (bytes(range(256)) * 32)[:length]
        assert read_at(fd, 1, 10) == bytes(range(1, 11))
        assert read_at(fd, MIB - 512, 4096) == bytes(512)
        assert read_at(fd, MIB, 512) == b""


@pytest.mark.parametrize("options", ["", "direct_io=on"])
def test_buffered_direct_and_mapped_access_see_each_other(mount: Mount, options: str) -> None:
    """Random accesses in every way, against an array."""
    file = mount(options=options).file()
    model = bytearray(MIB)
    chance = random.Random(7)
    with Open(file) as plain, Open(file, os.O_RDWR | os.O_DIRECT) as direct, mmap.mmap(plain, MIB) as mapped:
        for step in range(400):
            pos, length = chance.randrange(64) * BLOCK, chance.randrange(1, 5) * BLOCK
            way = chance.choice(["plain", "direct", "mapped"])
            if chance.random() < 0.5:
                data = bytes([step % 251 + 1]) * length
                model[pos : pos + length] = data
                if way == "mapped":
                    mapped[pos : pos + length] = data
                else:
                    write_at(plain if way == "plain" else direct, pos, data)
            elif way == "mapped":
                assert mapped[pos : pos + length] == model[pos : pos + length], step
            else:
                assert read_at(plain if way == "plain" else direct, pos, length) == model[pos : pos + length], step


def test_a_private_mapping_does_not_change_the_disk(mount: Mount) -> None:
    file = mount().file()
    with Open(file) as fd, mmap.mmap(fd, MIB, flags=mmap.MAP_PRIVATE) as mapped:
        mapped[0:3] = b"own"
        assert os.pread(fd, 3, 0) == bytes(3)


def test_a_shared_mapping_reaches_the_disk(mount: Mount) -> None:
    mounted = mount()
    with Open(mounted.file()) as fd, mmap.mmap(fd, MIB) as mapped:
        mapped[8192:8195] = b"all"
        mapped.flush()
    assert ["write", "vm.raw", 8192, 4096] in mounted.ask("journal")


def test_only_direct_io_on_hands_out_handles_past_the_cache(mount: Mount) -> None:
    """A shared mapping tells: the kernel has none for such a handle."""
    on, auto = mount(options="direct_io=on"), mount(options="direct_io=auto")
    with Open(on.file(), os.O_RDWR | os.O_DIRECT) as fd:
        assert refused(mmap.mmap, fd, MIB) == errno.ENODEV
    for flags in (os.O_DIRECT | os.O_SYNC, os.O_DIRECT | os.O_DSYNC, 0):
        with Open(on.file(), os.O_RDWR | flags) as fd:
            mmap.mmap(fd, MIB).close()
    with Open(auto.file(), os.O_RDWR | os.O_DIRECT) as fd:
        mmap.mmap(fd, MIB).close()


def test_a_larger_truncate_grows_the_disk(mount: Mount) -> None:
    mounted = mount()
    os.truncate(mounted.file(), 2 * MIB)
    with Open(mounted.file()) as fd:
        os.ftruncate(fd, 3 * MIB)
        assert os.pread(fd, 10, 3 * MIB - 10) == bytes(10)
    assert mounted.file().stat().st_size == 3 * MIB
    assert os.getxattr(mounted.file(), "user.qedfs.virtual_size") == str(3 * MIB).encode()
    assert mounted.ask("journal") == [["grow", "vm.raw", 2 * MIB], ["grow", "vm.raw", 3 * MIB]]


@pytest.mark.parametrize("size", [0, 512, MIB - 512, MIB + 1, MIB + 511])
def test_a_smaller_or_odd_truncate_is_refused_and_changes_nothing(refusing: Mounted, size: int) -> None:
    with Open(refusing.file()) as fd:
        os.pwrite(fd, b"kept", 600)
        assert refused(os.ftruncate, fd, size) == errno.EINVAL
        assert refused(os.truncate, refusing.file(), size) == errno.EINVAL
        assert os.fstat(fd).st_size == MIB
        assert os.pread(fd, 4, 600) == b"kept"


def test_truncate_to_the_present_size_succeeds(mount: Mount) -> None:
    mounted = mount()
    os.truncate(mounted.file(), MIB)
    assert mounted.ask("journal") == []


@pytest.mark.parametrize("options", ["", "direct_io=on"])
@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_a_write_past_the_end_grows_the_disk(mount: Mount, options: str, flags: int) -> None:
    file = mount(options=options).file()
    with Open(file, os.O_RDWR | flags) as fd:
        write_at(fd, MIB + BLOCK, b"x" * BLOCK)
        os.fsync(fd)
    assert file.stat().st_size == MIB + 2 * BLOCK
    assert os.getxattr(file, "user.qedfs.virtual_size") == str(MIB + 2 * BLOCK).encode()
    assert file.read_bytes()[MIB:] == bytes(BLOCK) + b"x" * BLOCK


def test_an_odd_write_past_the_end_is_rounded_up(mount: Mount) -> None:
    file = mount().file()
    with Open(file) as fd:
        os.pwrite(fd, b"end", MIB)
        os.fsync(fd)
    assert os.getxattr(file, "user.qedfs.virtual_size") == str(MIB + 512).encode()


def test_a_cached_write_that_cannot_be_stored_is_reported_by_fsync(mount: Mount) -> None:
    with Open(mount().file()) as fd:
        os.pwrite(fd, b"x", 100 * MIB)
        assert refused(os.fsync, fd) in (errno.ENOSPC, errno.EIO)


def test_o_trunc_is_refused_and_changes_nothing(mount: Mount) -> None:
    file = mount().file()
    with Open(file) as fd:
        os.pwrite(fd, b"dirty", 0)
        for flags in (os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC | os.O_CREAT):
            assert refused(os.open, file, flags) == errno.EPERM
        assert os.fstat(fd).st_size == MIB
        assert os.pread(fd, 5, 0) == b"dirty"


def test_o_creat_of_a_disk_that_exists_opens_it(mount: Mount) -> None:
    with Open(mount().file(), os.O_RDWR | os.O_CREAT) as fd:
        assert os.fstat(fd).st_size == MIB


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "create": lambda file, new: os.open(new, os.O_CREAT | os.O_RDWR),
    "unlink": lambda file, new: os.unlink(file),
    "rename": lambda file, new: os.rename(file, new),
    "link": lambda file, new: os.link(file, new),
    "symlink": lambda file, new: os.symlink("target", new),
    "mkdir": lambda file, new: os.mkdir(new),
    "mknod": lambda file, new: os.mknod(new, 0o100600),
    "fifo": lambda file, new: os.mkfifo(new),
    "chmod": lambda file, new: os.chmod(file, 0o777),
    "chown": lambda file, new: os.chown(file, 1, 1),
    "chmod of the directory": lambda file, new: os.chmod(file.parent, 0o777),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_directory_cannot_be_changed(refusing: Mounted, change: str) -> None:
    assert refused(CHANGES[change], refusing.file(), refusing.file("new")) == errno.EPERM
    assert os.listdir(refusing.path) == ["vm.raw"]


def test_times_may_be_set(mount: Mount) -> None:
    file = mount().file()
    os.utime(file, ns=(1_000_000_000, 2_000_000_007))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (1_000_000_000, 2_000_000_007)


def writes(mounted: Mounted) -> dict[str, int | None]:
    file = mounted.file()
    return {
        "open": refused(os.open, file, os.O_WRONLY),
        "open rw": refused(os.open, file, os.O_RDWR),
        "truncate": refused(os.truncate, file, 2 * MIB),
    }


def test_a_read_only_mount_refuses_every_write(mount: Mount) -> None:
    mounted = mount(options="ro")
    assert set(writes(mounted).values()) == {errno.EROFS}
    assert refused(os.setxattr, mounted.file(), "user.qedfs.mode", b"cow") == errno.EROFS
    assert refused(os.unlink, mounted.file()) == errno.EROFS
    assert mounted.file().read_bytes() == bytes(MIB)


def test_a_read_only_leaf_refuses_every_write_beside_a_writable_one(mount: Mount) -> None:
    mounted = mount({"name": "vm.raw", "read_only": True}, {"name": "other.raw"})
    assert set(writes(mounted).values()) == {errno.EROFS}
    with Open(mounted.file("other.raw")) as fd:
        assert os.pwrite(fd, b"x", 0) == 1


def test_attributes_are_read_set_and_refused(mount: Mount) -> None:
    mounted = mount()
    file = mounted.file()
    os.setxattr(file, "user.qedfs.mode", b"stream")
    assert os.getxattr(file, "user.qedfs.mode") == b"stream"
    os.setxattr(file, "user.qedfs.prefetch", b"0 65536")
    assert mounted.ask("journal") == [["prefetch", "vm.raw", 0, 65536]]
    assert {"user.qedfs.progress", "user.qedfs.leaf"} < set(os.listxattr(file))
    assert "user.qedfs.prefetch" not in os.listxattr(file)
    assert refused(os.getxattr, file, "user.qedfs.other") == errno.ENODATA
    assert refused(os.getxattr, file, "security.capability") == errno.ENODATA
    assert refused(os.setxattr, file, "user.qedfs.other", b"1") == errno.ENODATA
    assert refused(os.setxattr, file, "user.qedfs.mode", b"fast") == errno.EINVAL
    assert refused(os.setxattr, file, "user.qedfs.progress", b"1") == errno.EACCES
    assert refused(os.removexattr, file, "user.qedfs.mode") == errno.EACCES
    assert os.getxattr(mounted.path, "user.qedfs.pid") == str(mounted.process.pid).encode()
    assert os.listxattr(mounted.path) == ["user.qedfs.pid"]


def test_a_defect_fails_its_request_only(mount: Mount) -> None:
    mounted = mount({"name": "vm.raw"}, {"name": "other.raw"})
    mounted.ask("break vm.raw")
    with Open(mounted.file()) as fd:
        for _ in range(3):
            assert refused(os.pread, fd, 10, 0) == errno.EIO
        assert mounted.file("other.raw").read_bytes() == bytes(MIB)
    mounted.ask("unmount")
    mounted.end()
    assert "RuntimeError: a defect\n" in mounted.log
