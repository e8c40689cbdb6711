"""The record: what qedfs remembers about an image, in room that the format leaves free. Sans-IO.

It is the last 512-byte sector of the header's clusters, written by one `pwrite`. QEMU rewrites only the header's 64
bytes, the first sector or the name at 64, so the record survives it; unknown feature bits, the other place one could
think of, would make `qemu-img rebase` refuse the image.

Layout: magic (8 bytes), version u16, length of the text u16, CRC-32 of the text u32, text (JSON, UTF-8), zeros.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import zlib
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from qedfs.image.geometry import SECTOR
from qedfs.image.header import NAME_OFFSET, Header

MAGIC = b"qedfsrec"
VERSION = 1
_STRUCT = struct.Struct("<8sHHI")
MAX_TEXT = SECTOR - _STRUCT.size
MAX_TAG = 96
"""Characters; a longer tag (an ETag may be long) is kept as its hash."""
MAX_PINS = 2
"""The present backing and, while a rebase is under way, the next one."""


class Damage(Enum):
    """Why a sector gives no record."""

    ABSENT = "absent"
    BROKEN = "broken"
    """The magic is there, the rest is not as it should be: worth a warning."""


@dataclass(frozen=True)
class Pin:
    """What a backing was when it was chosen.

    `name_hash` is that of the backing's name as stored in the header, `format` what it was opened as, `size` in bytes,
    `tag` as `Identity.tag` (empty: only the size is known).
    """

    name_hash: str
    format: str
    size: int
    tag: str


@dataclass(frozen=True)
class Record:
    """`mode` and `hold` as in the interface (an empty mode: none was stored)."""

    mode: str = ""
    hold: bool = False
    pins: tuple[Pin, ...] = ()

    def pin_of(self, backing_name: str) -> Pin | None:
        """Return the pin of the backing called `backing_name`; a pin of another one (somebody rebased) is void."""
        wanted = hash_name(backing_name)
        return next((pin for pin in self.pins if pin.name_hash == wanted), None)

    def pinned(self, pin: Pin) -> Record:
        """Return the record with `pin` as its only one."""
        return replace(self, pins=(pin,))

    def also_pinned(self, pin: Pin) -> Record:
        """Return the record that holds for the old backing and for that of `pin`: the middle of a rebase."""
        others = tuple(p for p in self.pins if p.name_hash != pin.name_hash)
        return replace(self, pins=(*others[-(MAX_PINS - 1) :], pin))


def hash_name(backing_name: str) -> str:
    return base64.b64encode(hashlib.sha256(os.fsencode(backing_name)).digest()).decode("ascii")


def short_tag(tag: str) -> str:
    """Return `tag` as it is stored: itself, or its hash when it is long."""
    if len(tag) <= MAX_TAG and tag.isascii():
        return tag
    return "sha256:" + hashlib.sha256(tag.encode("utf-8", "surrogateescape")).hexdigest()


def offset(header: Header) -> int:
    """Return where in the file the record lies."""
    return header.room - SECTOR


def fits(header: Header) -> bool:
    """Whether the sector is free of the header and of the backing name."""
    name_end = header.backing_name_offset + header.backing_name_size if header.has_backing else 0
    return max(NAME_OFFSET, name_end) <= offset(header)


def encode(record: Record) -> bytes | None:
    """Return the sector, or None when the record is too long for it."""
    fields: dict[str, Any] = {}
    if record.mode:
        fields["mode"] = record.mode
    if record.hold:
        fields["hold"] = 1
    if record.pins:
        fields["pins"] = [[pin.name_hash, pin.format, pin.size, short_tag(pin.tag)] for pin in record.pins]
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    if len(text) > MAX_TEXT:
        return None
    return (_STRUCT.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text).ljust(SECTOR, b"\0")


def decode(sector: bytes) -> Record | Damage:
    """Return the record of `sector`, or why there is none. A newer version is read as far as it is understood."""
    if len(sector) < _STRUCT.size or not sector.startswith(MAGIC):
        return Damage.ABSENT
    _, _, length, checksum = _STRUCT.unpack_from(sector)
    text = sector[_STRUCT.size : _STRUCT.size + length]
    if length > MAX_TEXT or len(text) != length or zlib.crc32(text) != checksum:
        return Damage.BROKEN
    try:
        fields = json.loads(text)
        pins = tuple(Pin(str(h), str(f), int(size), str(tag)) for h, f, size, tag in fields.get("pins", ()))
        return Record(str(fields.get("mode", "")), bool(fields.get("hold")), pins)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return Damage.BROKEN
