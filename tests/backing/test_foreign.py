"""What images of QEMU's formats say of other files, and what of it is refused; on bytes alone."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.backing.foreign import FORMATS, HEAD, Foreign, format_by_magic, inspect, known_format
from qedfs.errors import BackingRefused
from tests.backing.samples import MIB, run


def head_of(path: Path) -> bytes:
    return path.read_bytes()[:HEAD]


def made(folder: Path, format: str, *options: object) -> bytes:
    path = folder / f"image.{format}"
    run("qemu-img", "create", "-q", "-f", format, *options, path, "1M")
    return head_of(path)


def vmdk(capacity: int = 2048, descriptor: str = "parentCID=ffffffff\n") -> bytes:
    return struct.pack("<4sIIQ", b"KDMV", 1, 3, capacity).ljust(512, b"\0") + descriptor.encode().ljust(20 * 512, b"\0")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_qcow2_tells_its_size_and_that_it_stands_alone(tmp_path: Path, compat: str) -> None:
    assert inspect("qcow2", made(tmp_path, "qcow2", "-o", f"compat={compat}"), "x") == Foreign(size=MIB)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("format", ["raw", "qcow2", "qed", "vmdk"])
def test_a_qcow2_tells_name_and_format_of_its_backing(tmp_path: Path, compat: str, format: str) -> None:
    head = made(tmp_path, "qcow2", "-o", f"compat={compat}", "-u", "-b", "b a,s:e.img", "-F", format)
    assert inspect("qcow2", head, "x") == Foreign("b a,s:e.img", format, "", MIB)


def test_a_qcow2_may_leave_the_format_of_its_backing_open(tmp_path: Path) -> None:
    # What old versions of qemu-img made: the same without the header extension.
    head = bytearray(made(tmp_path, "qcow2", "-u", "-b", "base", "-F", "raw"))
    at = head.index(b"\xe2\x79\x2a\xca")
    head[at : at + 4] = b"\x12\x34\x56\x78"
    assert inspect("qcow2", bytes(head), "x").backing_format is None


def test_a_raw_backing_may_be_called_by_the_driver_of_its_file(tmp_path: Path) -> None:
    head = made(tmp_path, "qcow2", "-u", "-b", "base", "-F", "host_device")
    assert inspect("qcow2", head, "x").backing_format == "raw"


def test_the_first_version_of_qcow_has_a_backing_too(tmp_path: Path) -> None:
    head = made(tmp_path, "qcow", "-u", "-b", "base", "-F", "raw")
    assert format_by_magic(head) == "qcow"
    assert inspect("qcow", head, "x") == Foreign("base", None, "", MIB)


def test_a_data_file_is_refused(tmp_path: Path) -> None:
    head = made(tmp_path, "qcow2", "-o", f"data_file={tmp_path / 'data'}")
    with pytest.raises(BackingRefused, match="keeps its data in another file"):
        inspect("qcow2", head, "x")


def test_luks_is_told_and_the_old_encryption_refused(tmp_path: Path) -> None:
    head = bytearray(made(tmp_path, "qcow2"))
    for number, name in ((0, ""), (2, "luks")):
        struct.pack_into(">I", head, 32, number)
        assert inspect("qcow2", bytes(head), "x").encryption == name
    struct.pack_into(">I", head, 32, 1)
    with pytest.raises(BackingRefused, match="encrypted in QEMU's old way"):
        inspect("qcow2", bytes(head), "x")
    assert inspect("luks", b"", "x").encryption == "luks"


def test_a_name_outside_of_the_head_is_refused(tmp_path: Path) -> None:
    head = bytearray(made(tmp_path, "qcow2", "-u", "-b", "base", "-F", "raw"))
    for offset, length in ((HEAD, 4), (HEAD - 3, 4), (1 << 40, 4), (600, 2000), (600, 0)):
        struct.pack_into(">QI", head, 8, offset, length)
        with pytest.raises(BackingRefused, match="not in its header"):
            inspect("qcow2", bytes(head), "x")


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized"])
def test_a_vmdk_in_one_sparse_file_is_taken(tmp_path: Path, kind: str) -> None:
    assert inspect("vmdk", made(tmp_path, "vmdk", "-o", f"subformat={kind}"), "x") == Foreign()


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_a_vmdk_that_lists_other_files_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(BackingRefused, match="a list of other files"):
        inspect("vmdk", made(tmp_path, "vmdk", "-o", f"subformat={kind}"), "x")


def test_a_vmdk_whose_descriptor_counts_is_refused() -> None:
    with pytest.raises(BackingRefused, match="no data of its own"):
        inspect("vmdk", vmdk(capacity=0, descriptor='RW 8 FLAT "/etc/shadow" 0\n'), "x")


def test_a_vmdk_over_another_one_is_refused(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "vmdk", tmp_path / "base.vmdk", "1M")
    head = made(tmp_path, "vmdk", "-b", tmp_path / "base.vmdk", "-F", "vmdk")
    for descriptor in (head, vmdk(descriptor="x=1\nparentCID=12\n"), vmdk(descriptor='parentFileNameHint="/x"\n')):
        with pytest.raises(BackingRefused, match="only the changes to another one"):
            inspect("vmdk", descriptor, "x")


def test_a_differencing_vhd_is_refused(tmp_path: Path) -> None:
    head = bytearray(made(tmp_path, "vpc"))
    assert inspect("vpc", bytes(head), "x") == Foreign()
    struct.pack_into(">I", head, 60, 4)
    with pytest.raises(BackingRefused, match="differencing VHD"):
        inspect("vpc", bytes(head), "x")


def test_formats_have_qemus_names() -> None:
    supported = subprocess.run(["qemu-img", "--help"], capture_output=True, text=True, check=True).stdout
    words = supported.partition("Supported formats:")[2].split()
    assert set(FORMATS) <= set(words)
    assert known_format("host_device", "x") == "raw"
    with pytest.raises(BackingRefused, match=r"vhd is none of raw, qed, qcow2, .*; did you mean vpc"):
        known_format("vhd", "x")
    with pytest.raises(BackingRefused, match="vvfat is none of raw"):
        known_format("vvfat", "x")


@given(
    format=st.sampled_from(FORMATS),
    head=st.binary(max_size=400),
    magic=st.sampled_from([b"", b"QFI\xfb\0\0\0\3", b"KDMV"]),
)
def test_any_bytes_are_judged(format: str, head: bytes, magic: bytes) -> None:
    try:
        told = inspect(format, magic + head, "x")
    except BackingRefused:
        return
    assert len(told.backing) <= 1023
