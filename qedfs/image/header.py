"""The QED header: the first 64 bytes of an image, and the backing name behind them. Sans-IO.

Layout, limits and refusals follow the QED specification, "Header", and what QEMU does at open; the few rules that are
stricter than QEMU's are marked. All integers are little-endian.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from enum import IntFlag

from qedfs.errors import InvalidImage
from qedfs.image.geometry import Geometry

MAGIC = b"QED\0"
SIZE = 64
NAME_OFFSET = SIZE
"""Where we, and QEMU, store the backing name."""
MAX_NAME = 4095
"""Bytes. QEMU's buffer is PATH_MAX including the NUL."""

_STRUCT = struct.Struct("<4sIIIQQQQQII")


class Feature(IntFlag):
    """Incompatible feature bits; an image with any other is refused, read-only too."""

    NONE = 0x0
    BACKING_FILE = 0x1
    NEED_CHECK = 0x2
    NO_PROBE = 0x4


_KNOWN = int(Feature.BACKING_FILE | Feature.NEED_CHECK | Feature.NO_PROBE)
"""A plain number: the complement of a flag has only the bits that the enumeration knows."""


@dataclass(frozen=True)
class Header:
    """The decoded header. Offsets and sizes are in bytes, `header_size` in clusters."""

    geometry: Geometry
    image_size: int
    l1_table_offset: int
    header_size: int = 1
    features: Feature = Feature.NONE
    compat_features: int = 0
    autoclear_features: int = 0
    backing_name_offset: int = 0
    backing_name_size: int = 0

    def encode(self) -> bytes:
        """Return the 64 bytes of this header."""
        return _STRUCT.pack(
            MAGIC,
            self.geometry.cluster_size,
            self.geometry.table_clusters,
            self.header_size,
            self.features,
            self.compat_features,
            self.autoclear_features,
            self.l1_table_offset,
            self.image_size,
            self.backing_name_offset,
            self.backing_name_size,
        )

    @property
    def room(self) -> int:
        """Bytes reserved for the header, the backing name and other data."""
        return self.header_size * self.geometry.cluster_size

    @property
    def needs_check(self) -> bool:
        return Feature.NEED_CHECK in self.features

    @property
    def has_backing(self) -> bool:
        """Whether a backing is named. QEMU takes the bit with an empty name for no backing."""
        return Feature.BACKING_FILE in self.features and self.backing_name_size > 0

    @property
    def backing_is_raw(self) -> bool:
        """Whether the backing must never be probed. Meaningful only with a backing."""
        return Feature.NO_PROBE in self.features

    def with_features(self, *, add: Feature = Feature.NONE, remove: Feature = Feature.NONE) -> Header:
        return replace(self, features=(self.features | add) & ~remove)

    def with_backing(self, name_size: int, *, raw: bool, name_offset: int = NAME_OFFSET) -> Header:
        """Return the header that names a backing of `name_size` bytes stored at `name_offset`."""
        named = replace(self, backing_name_offset=name_offset, backing_name_size=name_size)
        if raw:
            return named.with_features(add=Feature.BACKING_FILE | Feature.NO_PROBE)
        return named.with_features(add=Feature.BACKING_FILE, remove=Feature.NO_PROBE)

    def without_backing(self) -> Header:
        """Return the header of a stand-alone image. As QEMU does, the text of the name stays where it was."""
        return replace(self, backing_name_size=0).with_features(remove=Feature.BACKING_FILE | Feature.NO_PROBE)


def decode(data: bytes, file_length: int, name: str) -> Header:
    """Decode and judge a header.

    `data` holds the first bytes of the file (at least 64, or all of a shorter file), `file_length` is the file's length
    in bytes, `name` the image's name for messages. The order of the refusals is QEMU's.

    Raises:
        InvalidImage: what the header says cannot be so.
    """
    if data[:4] != MAGIC:
        raise InvalidImage(name, "not a QED image (the magic at its start is missing)")
    if len(data) < SIZE:
        raise InvalidImage(name, f"the file has {len(data)} bytes, shorter than a QED header")
    (_, cluster_size, table_clusters, header_size, features, compat, autoclear, l1_offset, image_size, name_offset,
     name_size) = _STRUCT.unpack_from(data)  # fmt: skip
    unknown = features & ~_KNOWN
    if unknown:
        raise InvalidImage(name, f"needs QED features this version does not know ({unknown:x})")
    geometry = Geometry.checked(cluster_size, table_clusters, name)
    geometry.check_image_size(image_size, name)
    if header_size < 1:
        raise InvalidImage(name, "its header claims no room at all")  # stricter than QEMU, which opens it
    room = header_size * cluster_size
    if l1_offset < room or not geometry.is_table_offset(l1_offset, room, geometry.usable_length(file_length)):
        raise InvalidImage(name, f"its L1 table offset {l1_offset:#x} is not inside the file")
    header = Header(
        geometry, image_size, l1_offset, header_size, Feature(features), compat, autoclear, name_offset, name_size
    )
    if Feature.BACKING_FILE in header.features and name_size:
        if name_offset < SIZE or name_offset + name_size > room:  # below 64 is stricter than QEMU
            raise InvalidImage(name, "its backing name lies outside the header")
        if name_size > MAX_NAME:
            raise InvalidImage(name, f"its backing name has {name_size} bytes; {MAX_NAME} is the most")
    return header


def decode_backing_name(raw: bytes) -> str:
    """Return the backing name stored as `raw`. QEMU reads it as a C string: an embedded NUL ends it."""
    return os.fsdecode(raw.split(b"\0", 1)[0])


def encode_backing_name(backing: str, header: Header, name: str) -> bytes:
    """Return the bytes to store for `backing` in the image called `name`.

    Raises:
        InvalidImage: it does not fit into the header's room, or QEMU could not read it back.
    """
    raw = os.fsencode(backing)
    if b"\0" in raw or not raw:
        raise InvalidImage(name, "a backing name must not be empty nor contain NUL")
    most = min(MAX_NAME, header.room - NAME_OFFSET)
    if len(raw) > most:
        raise InvalidImage(name, f"the backing name has {len(raw)} bytes; {most} fit into the header")
    return raw
