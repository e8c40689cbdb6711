from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.image import record as records
from qedfs.image.geometry import Geometry
from qedfs.image.header import Header
from qedfs.image.record import Damage, Pin, Record
from tests.image.qemu import poke, qemu_check, qemu_img, qemu_io

HEADER = Header(Geometry(4096, 2), 0, 4096)

tags = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
names = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), min_size=1, max_size=30)
pins = st.builds(
    Pin, names.map(records.hash_name), st.sampled_from(["raw", "qed", "qcow2"]), st.integers(0, 1 << 62), tags
)
the_records = st.builds(
    Record,
    st.sampled_from(["", "cow", "cor", "stream"]),
    st.booleans(),
    st.lists(pins, max_size=2, unique_by=lambda pin: pin.name_hash).map(tuple),
)


@given(the_records)
def test_what_is_encoded_is_decoded_and_fills_one_sector(record: Record) -> None:
    sector = records.encode(record)
    if sector is None:
        assert len(record.pins) == 2
        return
    assert len(sector) == 512
    assert records.decode(sector) == record


@given(st.binary(max_size=600))
def test_noise_is_no_record(noise: bytes) -> None:
    assert records.decode(noise) is Damage.ABSENT
    assert records.decode(records.MAGIC + noise) is Damage.BROKEN or len(noise) < 8


@given(the_records, st.integers(0, 511), st.integers(0, 7))
def test_a_flipped_bit_is_noticed_wherever_it_matters(record: Record, place: int, bit: int) -> None:
    sector = bytearray(records.encode(record) or bytes(512))
    sector[place] ^= 1 << bit
    found = records.decode(bytes(sector))
    # The version, and the zeros behind the text, may be anything.
    assert isinstance(found, Damage) or found == record


def test_damage_is_told_from_absence() -> None:
    assert records.decode(bytes(512)) is Damage.ABSENT
    assert records.decode(b"") is Damage.ABSENT
    assert records.decode(records.MAGIC) is Damage.ABSENT


def sector_of(text: bytes, version: int = records.VERSION) -> bytes:
    head = struct.pack("<8sHHI", records.MAGIC, version, len(text), zlib.crc32(text))
    return (head + text).ljust(512, b"\0")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b'{"pins":3}',
        b'{"pins":[[1]]}',
        b'{"pins":[["h","raw","x","t"]]}',
        b"\xff",
        b"[" * 400,
    ],
)
def test_a_text_that_is_none_of_ours_is_damage_and_never_an_error(text: bytes) -> None:
    assert records.decode(sector_of(text)) is Damage.BROKEN


def test_a_newer_version_is_read_as_far_as_it_is_understood() -> None:
    assert records.decode(sector_of(b'{"mode":"cow","colour":"red"}', version=9)) == Record("cow")


def test_a_pin_holds_for_its_own_name_only() -> None:
    pin = Pin(records.hash_name("a"), "raw", 5, "etag:x")
    record = Record(pins=(pin,))
    assert record.pin_of("a") == pin
    assert record.pin_of("b") is None


def test_in_the_middle_of_a_rebase_both_backings_are_pinned() -> None:
    a, b, c = (Pin(records.hash_name(name), "raw", 5, "") for name in "abc")
    record = Record(mode="cow").pinned(a)
    both = record.also_pinned(b)
    assert (both.pin_of("a"), both.pin_of("b")) == (a, b)
    assert both.also_pinned(c).pins == (b, c)
    assert both.pinned(b) == Record("cow", pins=(b,))


def test_long_tags_are_kept_as_their_hash_and_two_of_them_fit() -> None:
    long = records.short_tag("etag:" + "x" * 1000)
    assert long.startswith("sha256:")
    assert long != records.short_tag("etag:" + "x" * 1001)
    assert records.short_tag("etag:é").startswith("sha256:")
    assert records.short_tag(long) == long
    two = tuple(Pin(records.hash_name(name), "qed", 1 << 62, "x" * records.MAX_TAG) for name in "ab")
    assert records.encode(Record("stream", True, two)) is not None


def test_the_record_lies_in_the_last_sector_of_the_headers_room() -> None:
    assert records.offset(HEADER) == 4096 - 512
    assert records.offset(Header(Geometry(4096, 2), 0, 8192, header_size=2)) == 8192 - 512


@pytest.mark.parametrize(("length", "fits"), [(1, True), (3520, True), (3521, False), (4032, False)])
def test_it_has_room_unless_the_backing_name_reaches_into_it(length: int, fits: bool) -> None:
    assert records.fits(HEADER.with_backing(length, raw=True)) is fits
    assert records.fits(HEADER.with_backing(length, raw=True).without_backing())


def test_qemu_leaves_it_alone_whatever_it_does_to_the_image(tmp_path: Path) -> None:
    image = tmp_path / "leaf.qed"
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    qemu_img("create", "-f", "qed", image, "1M")
    record = Record("stream", pins=(Pin(records.hash_name("base.raw"), "raw", 1 << 20, "mtime:1"),))
    poke(image, 65536 - 512, records.encode(record) or b"")
    qemu_io(image, "write 0 128k", "write -z 512k 64k")
    qemu_img("rebase", "-u", "-b", tmp_path / "base.raw", "-F", "raw", image)
    qemu_img("resize", "-f", "qed", image, "2M")
    qemu_img("check", "-r", "all", "-f", "qed", image)
    assert records.decode(image.read_bytes()[65536 - 512 : 65536]) == record
    assert qemu_check(image).status == 0
