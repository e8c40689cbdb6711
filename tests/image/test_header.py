from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import InvalidImage
from qedfs.image import header as headers
from qedfs.image.geometry import MAX_IMAGE_SIZE, Geometry
from qedfs.image.header import Feature, Header
from tests.image.qemu import poke, qemu_img

MIB = 1 << 20
FILE = 327680
GOOD = Header(Geometry(), 1 << 30, 65536)
NAMED = GOOD.with_backing(8, raw=True)


def changed(header: Header, format: str, offset: int, value: int) -> bytes:
    data = bytearray(header.encode())
    struct.pack_into(format, data, offset, value)
    return bytes(data)


geometries = st.builds(Geometry, st.sampled_from([1 << n for n in range(12, 23)]), st.sampled_from([1, 2, 4, 8, 16]))
quads = st.integers(0, (1 << 64) - 1)


@given(geometries, st.integers(1, 4), st.integers(0, 7), quads, quads, st.data())
def test_what_is_encoded_is_decoded(
    geometry: Geometry, header_size: int, features: int, compat: int, autoclear: int, data: st.DataObject
) -> None:
    room = header_size * geometry.cluster_size
    name_offset = data.draw(st.integers(64, room))
    header = Header(
        geometry,
        data.draw(st.integers(0, geometry.max_image_size // 512)) * 512,
        room + geometry.cluster_size * data.draw(st.integers(0, 9)),
        header_size,
        Feature(features),
        compat,
        autoclear,
        name_offset,
        data.draw(st.integers(0, min(4095, room - name_offset))),
    )
    length = header.l1_table_offset + geometry.table_bytes
    assert len(header.encode()) == headers.SIZE
    assert headers.decode(header.encode(), length, "x") == header


REFUSALS = [
    (b"", "the magic"),
    (b"QED", "the magic"),
    (b"QED\1" + bytes(60), "the magic"),
    (b"QED\0", "4 bytes"),
    (GOOD.encode()[:63], "63 bytes"),
    (changed(GOOD, "<Q", 16, 8), "does not know (8)"),
    (changed(GOOD, "<Q", 16, 1 << 63), "does not know (8000000000000000)"),
    (changed(GOOD, "<I", 4, 0), "cluster size 0"),
    (changed(GOOD, "<I", 4, 2048), "cluster size 2048"),
    (changed(GOOD, "<I", 4, 4097), "cluster size 4097"),
    (changed(GOOD, "<I", 4, 1 << 27), "cluster size 134217728"),
    (changed(GOOD, "<I", 8, 0), "table size 0"),
    (changed(GOOD, "<I", 8, 3), "table size 3"),
    (changed(GOOD, "<I", 8, 32), "table size 32"),
    (changed(GOOD, "<I", 4, 1 << 26), "one table takes 256 MiB"),
    (changed(GOOD, "<Q", 48, 513), "multiple of 512"),
    (changed(GOOD, "<Q", 48, (1 << 46) + 512), "more than the"),
    (changed(GOOD, "<Q", 48, (1 << 64) - 512), "more than the"),
    (changed(GOOD, "<I", 12, 0), "no room at all"),
    (changed(GOOD, "<I", 12, 2), "L1 table offset"),
    (changed(GOOD, "<I", 12, (1 << 32) - 1), "L1 table offset"),
    (changed(GOOD, "<Q", 40, 0), "L1 table offset"),
    (changed(GOOD, "<Q", 40, 65537), "L1 table offset"),
    (changed(GOOD, "<Q", 40, 131072), "L1 table offset"),
    (changed(GOOD, "<Q", 40, 1 << 63), "L1 table offset"),
    (changed(NAMED, "<I", 56, 63), "outside the header"),
    (changed(NAMED, "<I", 56, 65536 - 7), "outside the header"),
    (changed(NAMED, "<I", 56, (1 << 32) - 1), "outside the header"),
    (changed(NAMED, "<I", 60, (1 << 32) - 1), "outside the header"),
    (changed(NAMED, "<I", 60, 4096), "4096 bytes"),
]


@pytest.mark.parametrize(("data", "why"), REFUSALS, ids=[why for _, why in REFUSALS])
def test_what_cannot_be_so_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidImage) as refusal:
        headers.decode(data, FILE, "leaf.qed")
    assert why in refusal.value.why
    assert refusal.value.what == "leaf.qed"


ORDER = [("<I", 0, 0), ("<Q", 16, 8), ("<I", 4, 1), ("<I", 8, 3), ("<Q", 48, 1), ("<Q", 40, 1), ("<I", 56, 1)]
"""One defect of each kind, in the order in which QEMU looks for them."""


def test_refusals_come_in_the_order_of_qemu() -> None:
    expected = ["magic", "features", "cluster size", "table size", "image size", "L1 table", "backing name"]
    data = bytearray(NAMED.encode())
    for format, offset, value in ORDER:
        struct.pack_into(format, data, offset, value)
    for (format, offset, _), why in zip(ORDER, expected, strict=True):
        with pytest.raises(InvalidImage) as refusal:
            headers.decode(bytes(data), FILE, "x")
        assert why in refusal.value.why
        size = struct.calcsize(format)
        data[offset : offset + size] = NAMED.encode()[offset : offset + size]
    assert headers.decode(bytes(data), FILE, "x") == NAMED


@given(st.binary(min_size=60, max_size=60), st.integers(0, 1 << 63))
def test_no_header_raises_anything_but_a_refusal(data: bytes, length: int) -> None:
    with contextlib.suppress(InvalidImage):
        headers.decode(headers.MAGIC + data, length, "x")


def test_a_file_cut_by_less_than_a_sector_keeps_its_last_cluster() -> None:
    assert headers.decode(GOOD.encode(), FILE - 511, "x") == GOOD
    with pytest.raises(InvalidImage, match="L1 table"):
        headers.decode(GOOD.encode(), FILE - 512, "x")


def test_without_its_bit_the_backing_name_is_not_judged() -> None:
    data = changed(GOOD, "<Q", 56, (1 << 64) - 1)
    assert not headers.decode(data, FILE, "x").has_backing


def test_an_empty_backing_name_is_no_backing() -> None:
    assert not headers.decode(changed(NAMED, "<I", 60, 0), FILE, "x").has_backing


def test_naming_and_dropping_a_backing_changes_nothing_else() -> None:
    header = GOOD.with_features(add=Feature.NEED_CHECK)
    named = header.with_backing(5, raw=False)
    assert (named.features, named.backing_name_offset, named.backing_name_size) == (3, 64, 5)
    assert named.with_backing(6, raw=True).features == 7
    assert named.with_backing(6, raw=True).with_backing(6, raw=False).features == 3
    dropped = named.without_backing()
    assert (dropped.features, dropped.backing_name_offset, dropped.backing_name_size) == (2, 64, 0)
    assert dropped.with_features(remove=Feature.NEED_CHECK).encode()[:56] == GOOD.encode()[:56]


def test_a_name_ends_at_its_nul_and_may_be_any_bytes() -> None:
    assert headers.decode_backing_name(b"a\0b") == "a"
    raw = bytes(range(1, 256))
    assert headers.encode_backing_name(headers.decode_backing_name(raw), GOOD, "x") == raw


@pytest.mark.parametrize(("cluster", "most"), [(4096, 4032), (8192, 4095), (65536, 4095)])
def test_a_name_may_be_as_long_as_qemu_can_read(tmp_path: Path, cluster: int, most: int) -> None:
    header = Header(Geometry(cluster, 2), MIB, cluster)
    assert len(headers.encode_backing_name("x" * most, header, "leaf")) == most
    with pytest.raises(InvalidImage, match=f"{most} fit"):
        headers.encode_backing_name("x" * (most + 1), header, "leaf")
    image = tmp_path / "leaf.qed"
    named = header.with_backing(most, raw=True)
    image.write_bytes((named.encode() + b"x" * most).ljust(cluster + named.geometry.table_bytes, b"\0"))
    assert json.loads(qemu_img("info", "-f", "qed", "--output=json", image))["backing-filename"] == "x" * most


@pytest.mark.parametrize("options", ["cluster_size=4096,table_size=2", "cluster_size=1M,table_size=16", ""])
@pytest.mark.parametrize("size", [0, 512, 1000448, 1 << 32])
def test_a_header_of_qemu_is_read_and_written_back_as_it_was(tmp_path: Path, options: str, size: int) -> None:
    image = tmp_path / "leaf.qed"
    qemu_img("create", "-f", "qed", *(["-o", options] if options else []), image, str(size))
    data = image.read_bytes()
    header = headers.decode(data[:64], len(data), "leaf")
    assert header.image_size == size
    assert header.encode() == data[:64]


@pytest.mark.parametrize(
    ("offset", "value"),
    [(16, 8), (4, 5000), (8, 3), (48, 513), (48, 1 << 50), (40, 4096), (40, 1 << 40), (16, 1 << 40)],
)
def test_what_qemu_refuses_we_refuse(tmp_path: Path, offset: int, value: int) -> None:
    image = tmp_path / "leaf.qed"
    qemu_img("create", "-f", "qed", image, "1M")
    poke(image, offset, struct.pack("<Q" if offset >= 16 else "<I", value))
    assert "Could not open" in qemu_img("info", "-f", "qed", image, status=1)
    with pytest.raises(InvalidImage):
        headers.decode(image.read_bytes()[:64], os.path.getsize(image), "leaf")


def test_the_largest_image_is_what_a_file_offset_can_address() -> None:
    geometry = Geometry(1 << 22, 16)
    header = Header(geometry, MAX_IMAGE_SIZE, 1 << 22)
    assert headers.decode(header.encode(), 1 << 30, "x").image_size == MAX_IMAGE_SIZE
