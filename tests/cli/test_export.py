"""What `export` writes is what `qemu-img convert` writes, shared or sparse, whole or not at all."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from contrib.boot.server import listens
from tests.cli.commands import QEDFS, mounted, qedfs, refused
from tests.failing.rig import file_system, until
from tests.image.qemu import entry, poke, qemu_img, qemu_io

CLUSTER = 65536
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a file system whose files can share extents."""
    if "xfs" not in Path("/proc/filesystems").read_text().split():
        pytest.skip("this kernel has no XFS")
    with file_system("xfs", tmp_path / "xfs", 320 * MIB) as point:
        monkeypatch.chdir(point)
        yield point
        monkeypatch.undo()


def base(path: Path, length: int = 4 * MIB + 1536) -> bytes:
    """Make a raw file of random bytes with a hole, and zeros that are no hole; return its content."""
    data = bytearray(random.Random(1).randbytes(length))
    data[MIB : 2 * MIB] = bytes(MIB)
    data[3 * MIB : 3 * MIB + 8192] = bytes(8192)
    with path.open("wb") as file:
        file.write(data[:MIB])
        file.seek(2 * MIB)
        file.write(data[2 * MIB :])
    return bytes(data)


def leaf_over_base(folder: Path) -> Path:
    """A leaf with clusters of each state over a base, and a larger disk than that."""
    base(folder / "base.raw")
    qedfs("create", "-b", "base.raw", "-F", "raw", "-s", "6M", "leaf.qed")
    qemu_io(folder / "leaf.qed", "write -P 7 0 64k", "write -P 8 1000k 300k", "write -z 2M 128k", "write -P 9 5M 8k")
    return folder / "leaf.qed"


def converted(leaf: Path) -> bytes:
    other = leaf.with_suffix(".theirs")
    qemu_img("convert", "-f", "qed", "-O", "raw", leaf, other)
    return other.read_bytes()


def only_files(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == {*names}


def test_content_is_that_of_qemu_img_convert(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    before = leaf.read_bytes()
    out, _ = qedfs("export", leaf, "out.raw")
    assert Path("out.raw").read_bytes() == converted(leaf)
    assert out.startswith("out.raw: 6 MiB (6291456 bytes), ")
    assert leaf.read_bytes() == before


def test_what_it_says_is_what_it_wrote(folder: Path) -> None:
    command = [
        "nbdkit",
        "--foreground",
        "--readonly",
        "--unix",
        str(folder / "socket"),
        "--filter=delay",
        "pattern",
        "24M",
    ]
    with subprocess.Popen([*command, "rdelay=20ms"]) as server:
        try:
            until(lambda: listens(folder / "socket"))
            qedfs("create", "-b", "nbd+unix:///?socket=socket", "leaf.qed")
            out, _ = qedfs("export", "leaf.qed", "out.raw")
        finally:
            server.terminate()
    assert out == "out.raw: 24 MiB (25165824 bytes), 24 MiB written, 0 B shared\n"
    content = Path("out.raw").read_bytes()
    assert content == b"".join(pos.to_bytes(8, "big") for pos in range(0, 24 * MIB, 8))


def test_zeros_and_holes_take_no_room(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    qedfs("export", leaf, "out.raw")
    theirs = leaf.with_suffix(".theirs")
    qemu_img("convert", "-f", "qed", "-O", "raw", leaf, theirs)
    # A file system may need a block more for the list of its extents.
    assert os.stat("out.raw").st_blocks * 512 <= theirs.stat().st_blocks * 512 + CLUSTER


def test_whole_chains_and_foreign_formats_are_read(folder: Path) -> None:
    data = base(folder / "base.raw", 2 * MIB)
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "base.raw", "base.vmdk")
    qedfs("create", "-b", "base.vmdk", "-F", "vmdk", "middle.qed")
    qemu_io(Path("middle.qed"), "write -P 5 128k 64k")
    qedfs("export", "middle.qed", "out.raw")
    assert Path("out.raw").read_bytes() == data[: 128 << 10] + b"\5" * CLUSTER + data[192 << 10 :]
    base(folder / "plain.raw", 2 * MIB)
    qedfs("create", "-b", "plain.raw", "-F", "raw", "lower.qed")
    qemu_io(Path("lower.qed"), "write -P 5 128k 64k")
    qedfs("create", "-b", "lower.qed", "upper.qed")
    qedfs("export", "upper.qed", "upper.raw")
    assert Path("upper.raw").read_bytes() == Path("out.raw").read_bytes()


def test_disks_of_odd_sizes_and_without_anything(folder: Path) -> None:
    qedfs("create", "-s", "0", "empty.qed")
    qedfs("export", "empty.qed", "empty.raw")
    assert os.stat("empty.raw").st_size == 0
    qedfs("create", "-s", str(CLUSTER + 512), "odd.qed")
    qemu_io(Path("odd.qed"), f"write -P 3 {CLUSTER} 512")
    qedfs("export", "odd.qed", "odd.raw")
    assert Path("odd.raw").read_bytes() == bytes(CLUSTER) + b"\3" * 512


def test_room_is_shared_where_the_file_system_can(sharing: Path) -> None:
    """Leaf and base have 100 MiB each; with the third there is no room for another one."""
    base(sharing / "base.raw", 100 * MIB)
    qedfs("create", "-b", "base.raw", "-F", "raw", "leaf.qed")
    qemu_io(sharing / "leaf.qed", "write -P 7 0 100M")
    qedfs("create", "-b", "base.raw", "-F", "raw", "thin.qed")
    qemu_io(sharing / "thin.qed", "write -P 9 1M 64k", "write -z 4M 64k")
    for name in ("leaf", "thin"):
        out, _ = qedfs("export", f"{name}.qed", f"{name}.raw")
        assert " 0 B written, " in out
        qemu_img("compare", "-f", "qed", "-F", "raw", f"{name}.qed", f"{name}.raw")
    # The copy is one of its own: a write there changes nothing here.
    before = Path("base.raw").read_bytes()
    with open("thin.raw", "r+b") as file:
        file.write(b"changed")
    assert Path("base.raw").read_bytes() == before


def test_nothing_is_overwritten_unless_asked_and_nothing_in_use(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    Path("out.raw").write_text("precious")
    Path("link").symlink_to("nowhere")
    assert refused("export", leaf, "out.raw") == "qedfs: out.raw: exists already (--force overwrites it)"
    assert "exists already" in refused("export", leaf, "link")
    assert Path("out.raw").read_text() == "precious"
    for name in (leaf, "base.raw"):
        assert "somebody else has it open" in refused("export", "--force", leaf, name)
    os.mkfifo("fifo")
    assert "neither a regular file" in refused("export", "--force", leaf, "fifo")
    Path("link").unlink()
    Path("link").symlink_to("out.raw")
    qedfs("export", "--force", leaf, "link")
    assert Path("link").is_symlink()
    assert Path("out.raw").read_bytes() == converted(leaf)


def test_a_leaf_in_use_or_held_and_a_mounted_disk_are_refused(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    with mounted(leaf, folder / "mnt") as mnt:
        assert refused("export", leaf, "out.raw") == f"qedfs: {leaf}: somebody else has it open for writing"
        assert "any program can copy" in refused("export", mnt / "leaf.raw", "out.raw")
    qedfs("create", "-s", "1M", "--hold", "held.qed")
    assert "held for a migration" in refused("export", "held.qed", "out.raw")
    assert not Path("out.raw").exists()


def test_a_backing_that_has_changed_is_refused(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    os.utime("base.raw", ns=(1, 1))
    assert "is not what the image was made on" in refused("export", leaf, "out.raw")
    assert not Path("out.raw").exists()


def test_a_failure_leaves_nothing_behind(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    poke(leaf, entry(leaf, CLUSTER) + 8 * 80, 0x12345)
    assert "the table entry of cluster 80 is invalid" in refused("export", leaf, "out.raw")
    assert only_files(folder, "base.raw", "leaf.qed")
    assert "cannot be written (No such file or directory)" in refused("export", leaf, "no/out.raw")


def test_a_full_disk_leaves_nothing_behind(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    with file_system("tmpfs", folder / "small", MIB) as small:
        assert "cannot be written (No space left on device)" in refused("export", leaf, small / "out.raw")
        assert only_files(small)
        assert os.statvfs(small).f_bfree == os.statvfs(small).f_blocks


def test_a_killed_export_leaves_nothing_behind(folder: Path) -> None:
    qedfs("create", "-b", "nbd+unix:///?socket=slow", "-s", "1M", "leaf.qed", status=1)
    server = subprocess.Popen(
        ["nbdkit", "--foreground", "--unix", str(folder / "slow"), "--filter=delay", "pattern", "8M", "rdelay=3600"],
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: listens(folder / "slow"))
        qedfs("create", "-b", "nbd+unix:///?socket=slow", "-F", "raw", "leaf.qed")
        before = {path.name for path in folder.iterdir()}
        for number in (signal.SIGKILL, signal.SIGINT):
            with subprocess.Popen([*QEDFS, "export", "leaf.qed", "out.raw"]) as export:
                until(lambda: any("(deleted)" in target for target in open_files(export.pid)))
                export.send_signal(number)
            assert export.returncode in (-number, 128 + number)
            assert {path.name for path in folder.iterdir()} == before
    finally:
        server.kill()
        server.wait()


def open_files(pid: int) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    try:
        return [os.readlink(link) for link in folder.iterdir()]
    except FileNotFoundError:
        return []


def test_the_mode_is_that_of_the_leaf_as_far_as_the_umask_allows(folder: Path) -> None:
    leaf = leaf_over_base(folder)
    leaf.chmod(0o600)
    qedfs("export", leaf, "out.raw")
    assert os.stat("out.raw").st_mode & 0o777 == 0o600
