"""Images in QEMU's formats that try to show a file of this machine: each way around is tried, and none gets there.

QEMU itself follows them: a VMDK descriptor that is served over NBD, opened by `qemu-img`, shows any file (the first test
sees that it does, so that the others mean something).
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qedfs.backing.base import Extent, Identity, Source
from qedfs.backing.foreign import HEAD
from qedfs.backing.policy import Policy
from qedfs.backing.qemu import open_qemu, read_foreign
from qedfs.errors import BackingRefused, CorruptEntry, NotAllowed
from tests.policy.people import (
    NOBODY,
    SECRET,
    SIZE,
    folder,
    give,
    image,
    open_backing_of,
    secret,
    served,
    start_of,
)


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, timeout=60, stdout=subprocess.DEVNULL)


def descriptor(target: Path) -> bytes:
    """The text of a VMDK that has one flat extent: `target`."""
    text = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    text += f'RW {SIZE // 512} FLAT "{target}" 0\n'
    text += 'ddb.adapterType = "ide"\nddb.geometry.cylinders = "2"\nddb.geometry.heads = "16"\nddb.geometry.sectors = "63"\n'
    return text.encode().ljust(HEAD, b"\0")


def vmdk_that_points_away(target: Path) -> bytes:
    """A sparse VMDK without data of its own, whose descriptor names `target`."""
    header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 0, 128, 1, 20).ljust(512, b"\0")
    return (header + descriptor(target)).ljust(2 * HEAD, b"\0")


def qcow2_with_data_file(folder: Path, target: Path) -> bytes:
    path = folder / "with-data-file.qcow2"
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'data-file-of-it'},data_file_raw=on", path, SIZE
    )
    head = bytearray(path.read_bytes())
    at = head.index(str(folder / "data-file-of-it").encode())
    length = struct.unpack_from(">I", head, at - 4)[0]
    name = str(target).encode()
    assert len(name) <= length
    head[at : at + length] = name.ljust(length, b"\0")
    struct.pack_into(">I", head, at - 4, len(name))
    return bytes(head)


def qcow2_over(folder: Path, backing: object, format: str = "raw") -> bytes:
    path = folder / "over.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, path, SIZE)
    return path.read_bytes()


@pytest.fixture
def target(shared: Path) -> Path:
    path = secret(shared / "secret", mode=0o644)
    path.write_bytes(SECRET.ljust(SIZE, b"!"))
    return path


async def test_qemu_alone_shows_any_file_to_whoever_serves_a_descriptor(shared: Path, target: Path) -> None:
    (shared / "image").write_bytes(descriptor(target))
    async with served(shared / "image") as address:
        copy = shared / "copy"
        await trio.to_thread.run_sync(qemu_img, "convert", "-f", "vmdk", "-O", "raw", address, copy)
    assert copy.read_bytes()[: len(SECRET)] == SECRET


WAYS: dict[str, Callable[[Path, Path], tuple[str, bytes]]] = {
    "a VMDK descriptor": lambda folder, target: ("vmdk", descriptor(target)),
    "a VMDK without data": lambda folder, target: ("vmdk", vmdk_that_points_away(target)),
    "a qcow2 data file": lambda folder, target: ("qcow2", qcow2_with_data_file(folder, target)),
    "a json: backing": lambda folder, target: (
        "qcow2",
        qcow2_over(folder, f'json:{{"driver":"raw","offset":0,"file":{{"driver":"file","filename":"{target}"}}}}'),
    ),
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_leads_out_of_an_image_is_refused(shared: Path, target: Path, way: str) -> None:
    format, content = WAYS[way](shared, target)
    path = shared / "image"
    path.write_bytes(content)
    leaf = await image(shared / "leaf.qed", None)
    with pytest.raises(BackingRefused) as local:
        await open_backing_of(leaf, path, format=format)
    async with served(path) as address:
        with pytest.raises(BackingRefused) as remote:
            await open_backing_of(leaf, address, format=format)
    for refusal in (local, remote):
        assert "\n" not in str(refusal.value)
        assert "QEMU does not open it" not in refusal.value.why  # it was never asked


@pytest.mark.parametrize("name", ["{target}", "file:{target}", "nbd+unix:///?socket={target}", "relative"])
async def test_an_image_from_a_server_names_nothing_local(shared: Path, target: Path, name: str) -> None:
    path = shared / "image"
    path.write_bytes(qcow2_over(shared, name.format(target=target)))
    leaf = await image(shared / "leaf.qed", None)
    async with served(path) as address:
        with pytest.raises(BackingRefused, match=r"may not name anything local|no meaning in an image read from"):
            await open_backing_of(leaf, address, Policy(mounter=0, allow_backing=("*",)))


async def test_an_image_of_another_user_reaches_what_that_user_could(shared: Path) -> None:
    closed = secret(folder(shared / "closed", mode=0o700) / "base", mode=0o644)
    path = shared / "image.qcow2"
    path.write_bytes(qcow2_over(shared, closed))
    give(path, NOBODY, 0o644)
    leaf = await image(shared / "leaf.qed", None)
    with pytest.raises(NotAllowed, match="Permission denied"):
        await open_backing_of(leaf, path)
    give(closed.parent, 0, 0o711)
    assert await start_of(await open_backing_of(leaf, path)) == SECRET


class TwoFaced(Source):
    """Shows one start at the first look, and another one from then on, as a server may."""

    def __init__(self, first: bytes, later: bytes) -> None:
        self.name = "two-faced"
        self.size = len(later)
        self.identity = Identity(self.size)
        self._shown = [first]
        self._later = later

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        content = self._shown.pop() if self._shown else self._later
        buffer[:] = content[pos : pos + len(buffer)]

    async def extents(self, pos: int, length: int) -> list[Extent]:
        return [Extent(length, False)]

    async def aclose(self) -> None:
        pass


async def test_qemu_sees_the_start_that_was_judged_and_no_later_one(shared: Path, target: Path) -> None:
    innocent = shared / "innocent.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", innocent, SIZE)
    good = innocent.read_bytes()
    evil = vmdk_that_points_away(target).ljust(len(good), b"\0")
    source = TwoFaced(good, evil)
    told, head = await read_foreign(source, "vmdk")
    try:
        opened = await open_qemu(source, "vmdk", told, head, None)
    except (BackingRefused, CorruptEntry):
        return
    assert SECRET not in await start_of(opened, SIZE)


@pytest.mark.parametrize("make", [descriptor, vmdk_that_points_away])
async def test_even_an_image_that_is_not_judged_at_all_reaches_no_file(
    shared: Path, target: Path, make: Callable[[Path], bytes]
) -> None:
    # As if there were a way around `foreign.py`: then the process has not the right to open a file.
    content = make(target)
    source = TwoFaced(content, content)
    told, _ = await read_foreign(source, "parallels")
    with pytest.raises(BackingRefused, match=r"QEMU does not open it as vmdk: .*Permission denied"):
        await open_qemu(source, "vmdk", told, b"", None)
