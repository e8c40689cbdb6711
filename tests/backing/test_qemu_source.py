"""Images in QEMU's formats, read by a confined QEMU: content, holes, errors told apart, its life and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qedfs.backing import qemu_process
from qedfs.backing.base import Extent, Source, close
from qedfs.backing.locate import MAX_FOREIGN, Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.backing.qemu import QemuSource
from qedfs.backing.qemu_process import reason
from qedfs.backing.resilient import Backing
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable, CorruptEntry
from tests.backing.samples import KIB, MIB, Serve, content_by_qemu, make_foreign, make_qed, random_bytes, run


async def open_named(name: object, format: str | None = None, policy: Policy | None = None) -> Source:
    return await open_backing(Reference(str(name), format, "/leaf.qed"), policy or Policy())


async def opened(name: object, format: str | None = None) -> QemuSource:
    source = await open_named(name, format)
    assert isinstance(source, QemuSource)
    return source


async def read(source: Source, pos: int, length: int) -> bytes:
    buffer = bytearray(length)
    await source.read_into(pos, memoryview(buffer))
    return bytes(buffer)


async def content_of(source: Source) -> bytes:
    try:
        return await read(source, 0, source.size)
    finally:
        await source.aclose()


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 (no event tells of another process)
            await trio.sleep(0.01)


# ---- content ----

KINDS = [
    ("qcow2", ()),
    ("qcow2", ("-c",)),
    ("qcow2", ("-c", "-o", "compression_type=zstd")),
    ("qcow2", ("-o", "compat=0.10,cluster_size=512")),
    ("qcow2", ("-o", "extended_l2=on,cluster_size=128k")),
    ("qcow", ()),
    ("vmdk", ("-o", "subformat=monolithicSparse")),
    ("vmdk", ("-o", "subformat=streamOptimized")),
    ("vhdx", ("-o", "subformat=dynamic")),
    ("vhdx", ("-o", "subformat=fixed")),
    ("vdi", ()),
    ("vdi", ("-o", "static=on")),
    ("vpc", ("-o", "subformat=dynamic,force_size=on")),
    ("vpc", ("-o", "subformat=fixed,force_size=on")),
    ("parallels", ()),
]


@pytest.mark.parametrize(("format", "options"), KINDS, ids=[" ".join((f, *o)) for f, o in KINDS])
async def test_every_format_that_qemu_makes_reads_as_the_disk_it_was_made_of(
    tmp_path: Path, format: str, options: tuple[str, ...]
) -> None:
    raw, image = make_foreign(tmp_path, format, *options)
    source = await open_named(image, None if format.startswith("qcow") else format)
    assert source.format == format
    assert await content_of(source) == raw.read_bytes()


async def test_what_the_format_knows_to_be_zero_is_told(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "qcow2", "-c")
    source = await opened(image)
    extents = await source.extents(0, source.size)
    await source.aclose()
    assert extents == [Extent(256 * KIB, False), Extent(256 * KIB, True), Extent(512 * KIB, False), Extent(MIB, True)]


async def test_a_chain_is_opened_link_by_link(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random_bytes(MIB - 100))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "middle.qcow2", "2M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 100k 200k", "-c", "write -z 640k 64k", tmp_path / "middle.qcow2")
    make_qed(tmp_path / "qed.qed", "-b", "middle.qcow2", "-F", "qcow2", "2M", commands=["write -P 2 200k 64k"])
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "qed.qed", "-F", "qed", tmp_path / "top.qcow2", "3M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", tmp_path / "top.qcow2")
    source = await opened(tmp_path / "top.qcow2")
    extents = await source.extents(0, source.size)
    assert extents[-1] == Extent(2 * MIB + 100, True)
    assert Extent(64 * KIB, True) in extents
    assert await content_of(source) == content_by_qemu(tmp_path / "top.qcow2", "qcow2")


async def test_an_image_and_its_backing_may_come_from_servers(tmp_path: Path, serve: Serve) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random_bytes(MIB))
    address = serve("file", base)
    image = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", address, "-F", "raw", image, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 64k 64k", image)
    expected = content_by_qemu(image, "qcow2")
    assert await content_of(await open_named(image)) == expected


async def test_the_identity_is_that_of_the_whole_chain(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random_bytes(MIB))
    image = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", image, "3M")
    seen = set()
    for changed in (None, base, image):
        if changed is not None:
            os.utime(changed, (1, 1))
        source = await opened(image)
        assert source.identity.size == source.size == 3 * MIB
        seen.add(source.identity.tag)
        await source.aclose()
    assert len(seen) == 3
    assert all(tag.startswith("chain:") for tag in seen)


# ---- what cannot be opened ----


async def test_what_is_not_of_the_format_is_refused_in_qemus_words(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(MIB))
    with pytest.raises(BackingRefused, match=r"raw: is no qcow2 image"):
        await open_named(path, "qcow2")
    with pytest.raises(
        BackingRefused, match=r"raw: QEMU does not open it as vdi: Image not in VDI format \(bad signature"
    ):
        await open_named(path, "vdi")


async def test_without_qemu_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    monkeypatch.setattr(qemu_process, "PROGRAM", "qemu-nbd-of-nowhere")
    with pytest.raises(
        BackingRefused, match=r"its format needs qemu-nbd-of-nowhere, which is not installed \(Debian: qemu-utils\)"
    ):
        await open_named(image)


async def test_a_chain_may_not_need_many_processes(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "0", "1M")
    for number in range(MAX_FOREIGN):
        options = ("-u", "-b", str(number), "-F", "qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, tmp_path / str(number + 1), "1M")
    assert await content_of(await open_named(tmp_path / str(MAX_FOREIGN - 1))) == bytes(MIB)
    with pytest.raises(BackingRefused, match=f"more than {MAX_FOREIGN} images of the chain need a QEMU each"):
        await open_named(tmp_path / str(MAX_FOREIGN))


async def test_a_loop_through_other_formats_is_seen(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "b.qed", "-F", "qed", tmp_path / "a.qcow2", "1M")
    make_qed(tmp_path / "b.qed", "-u", "-b", "a.qcow2", "-F", "qcow2", "1M")
    with pytest.raises(BackingRefused, match="leads back to it"):
        await open_named(tmp_path / "a.qcow2")


def test_the_reason_is_one_line_without_the_node_tree() -> None:
    words = 'qemu-nbd: Failed to blk_new_open \'json:{"driver": "vdi", "file": {}}\': Could not\nmore\n'
    assert reason(words) == "Could not"
    assert reason("\n/usr/bin/qemu-nbd: Unknown driver 'dmg'\n") == "Unknown driver 'dmg'"
    assert reason("") == ""


# ---- errors told apart ----


async def test_a_change_of_the_file_is_a_change(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    source = await opened(image)
    os.utime(image, (1, 1))
    with pytest.raises(BackingChanged, match=r"image\.qcow2: has been changed while it was in use"):
        await read(source, 0, source.size)
    await source.aclose()


async def test_a_place_that_is_broken_is_final_for_its_bytes_only(tmp_path: Path) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "image.qcow2"
    raw.write_bytes(random_bytes(512) * 2048)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
    whole = bytearray(image.read_bytes())
    # The compressed data of the first cluster, behind five clusters of metadata.
    whole[320 * KIB : 320 * KIB + 20] = random_bytes(20)
    image.write_bytes(whole)
    source = await opened(image)
    with pytest.raises(CorruptEntry, match=r"image\.qcow2: QEMU cannot read it as qcow2 at byte 0 \("):
        await read(source, 0, 4096)
    assert await read(source, 768 * KIB, 64 * KIB) == raw.read_bytes()[768 * KIB :][: 64 * KIB]
    await source.aclose()


async def test_an_outage_below_is_an_outage(tmp_path: Path, serve: Serve) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    fail = tmp_path / "fail"
    address = serve("--filter=error", "file", image, "error=EIO", "error-rate=100%", f"error-file={fail}")
    source = await opened(address)
    fail.touch()
    with pytest.raises(BackingUnavailable, match="nbd"):
        await read(source, 0, 4096)
    fail.unlink()
    assert len(await read(source, 0, 4096)) == 4096
    await source.aclose()


# ---- life and end ----


async def test_a_killed_process_is_an_outage_that_heals(tmp_path: Path) -> None:
    raw, image = make_foreign(tmp_path, "qcow2")
    sources: list[QemuSource] = []

    async def open_it() -> Source:
        sources.append(await opened(image))
        return sources[-1]

    backing = Backing(open_it, name="image", jitter=lambda: 0.0)
    content = raw.read_bytes()
    buffer = bytearray(len(content))
    for _ in range(3):
        await backing.read_into(0, memoryview(buffer))
        assert buffer == content
        os.kill(sources[-1].pid, signal.SIGKILL)
        await until(lambda: not is_running(sources[-1].pid))
    # Which of the two is told depends on who notices first.
    with pytest.raises(BackingUnavailable, match=r"qemu-nbd has ended|cannot connect"):
        await read(sources[-1], 0, 4096)
    await backing.aclose()
    assert len(sources) == 3


async def test_it_ends_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    source = await opened(image)
    assert is_running(source.pid)
    assert not list(folder.iterdir())
    await source.aclose()
    assert not is_running(source.pid)


async def test_giving_up_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    descriptors = len(os.listdir("/proc/self/fd"))
    for patience in (0.0, 0.001, 0.005, 0.01, 0.02, 0.03):
        with trio.move_on_after(patience):
            await close(await opened(image))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    children = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "comm="], capture_output=True, text=True, check=False
    )
    assert "qemu-nbd" not in children.stdout


_HOLDER = """
import sys, time, trio
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy

async def main():
    source = await open_backing(Reference(sys.argv[1], None, "/leaf.qed"), Policy())
    print(source.pid, flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


async def test_no_orphan_is_left_when_we_are_killed(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    with subprocess.Popen([sys.executable, "-c", _HOLDER, image], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = int(await trio.to_thread.run_sync(holder.stdout.readline))
        assert is_running(pid)
        holder.kill()
        await until(lambda: not is_running(pid))
