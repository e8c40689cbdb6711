"""Images that mean harm: each a small amount of data whose header or tables claim something else."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qedfs.image.geometry import MAX_TABLE_BYTES, MAX_TABLES, Geometry
from qedfs.image.header import Feature, Header

SMALL = Geometry(4096, 1)
"""Tables of one page: 512 entries, 2 MiB of disk each."""
LARGE = Geometry(1 << 22, 16)
"""The largest tables that are accepted, 8 Mi entries."""
WIDE = Geometry(1 << 20, 16)
"""The most tables inside the size of a disk: two million."""
MAX_LENGTH = (1 << 63) - 1
"""Of a file, on a file system that has no lower limit (tmpfs)."""

FIELDS = {
    "cluster_size": (4, "<I"),
    "table_clusters": (8, "<I"),
    "header_size": (12, "<I"),
    "features": (16, "<Q"),
    "compat_features": (24, "<Q"),
    "autoclear_features": (32, "<Q"),
    "l1_table_offset": (40, "<Q"),
    "image_size": (48, "<Q"),
    "backing_name_offset": (56, "<I"),
    "backing_name_size": (60, "<I"),
}
"""Offset and format of the header's fields."""

Sample = Callable[[Path], None]
"""Writes an image to a path."""


def image(
    *pieces: tuple[int, bytes],
    geometry: Geometry = SMALL,
    length: int = 0,
    size: int | None = None,
    features: Feature = Feature.NONE,
    name: bytes = b"",
    header_size: int = 1,
    l1_at: int = 0,
) -> Sample:
    """Return a sample with `pieces` of bytes at their offsets, at least as long as its L1 table needs."""
    header = Header(
        geometry,
        geometry.max_image_size if size is None else size,
        l1_at or header_size * geometry.cluster_size,
        header_size=header_size,
        features=features | (Feature.BACKING_FILE if name else Feature.NONE),
        backing_name_offset=64,
        backing_name_size=len(name),
    )

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(header.encode() + name)
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
            file.truncate(max(length, file.tell(), header.l1_table_offset + geometry.table_bytes))

    return write


def extreme_fields() -> Iterator[tuple[str, Sample]]:
    """Yield each field of the header at each of its extremes, in an otherwise sound image with a backing."""
    for field, (offset, form) in FIELDS.items():
        bits = 8 * struct.calcsize(form)
        for value in (0, 1, (1 << bits) - 4096, (1 << bits) - 1, 1 << (bits - 1)):
            if value < 1 << bits:
                sound = (4096, struct.pack("<Q", 8192)), (8192, struct.pack("<QQQ", 12288, 1, 16384)), (16384, b"x")
                wrong = (offset, struct.pack(form, value))
                yield (
                    f"{field} {value:#x}",
                    image(*sound, wrong, length=20480, size=8 << 20, name=b"base.raw", features=Feature.NO_PROBE),
                )


def entries(values: object) -> bytes:
    return np.asarray(values, dtype=np.uint64).tobytes()


def _noise(length: int) -> bytes:
    return random.Random(1).randbytes(length)


def _spread(geometry: Geometry, first: int, step: int) -> bytes:
    """Return an L1 table full of tables, `step` bytes apart."""
    return entries(first + step * np.arange(geometry.table_entries, dtype=np.uint64))


_ROOM = LARGE.cluster_size
_BEHIND = _ROOM + MAX_TABLE_BYTES
_WIDE_BEHIND = WIDE.cluster_size + WIDE.table_bytes

SAMPLES: dict[str, Callable[[], Sample]] = {
    "no tables, the largest disk": lambda: image(geometry=LARGE),
    "no tables, the most of them": lambda: image(geometry=WIDE),
    "the largest file": lambda: image(length=MAX_LENGTH, geometry=LARGE),
    "the largest file of small clusters": lambda: image(length=MAX_LENGTH),
    "a file as long as a check takes": lambda: image(length=1 << 42, size=1 << 20),
    "a header of 16 TiB": lambda: image(header_size=(1 << 32) - 1),
    "a header of 256 PiB": lambda: image(header_size=(1 << 32) - 1, geometry=Geometry(1 << 26, 1)),
    "L1 at the end of the largest file": lambda: image(
        l1_at=(1 << 63) - (1 << 26) - MAX_TABLE_BYTES, length=MAX_LENGTH, geometry=LARGE
    ),
    "L1 of noise": lambda: image((_ROOM, _noise(1 << 20) * 64), geometry=LARGE),
    "L1 of noise inside the largest file": lambda: image(
        (_ROOM, _noise(1 << 20) * 64), geometry=LARGE, length=MAX_LENGTH
    ),
    "L1 full of itself": lambda: image((_ROOM, entries([_ROOM]) * LARGE.table_entries), geometry=LARGE),
    "L1 full of the header": lambda: image((_ROOM, entries([0, 1, _ROOM // 2, 4096] * (1 << 21))), geometry=LARGE),
    "L1 full of one sparse table": lambda: image(
        (_ROOM, entries([_BEHIND]) * LARGE.table_entries), geometry=LARGE, length=_BEHIND + MAX_TABLE_BYTES
    ),
    "L1 full of one table of noise": lambda: image(
        (_ROOM, entries([_BEHIND]) * LARGE.table_entries),
        (_BEHIND, _noise(1 << 20) * 64),
        geometry=LARGE,
    ),
    "L1 full of one table of zero entries": lambda: image(
        (WIDE.cluster_size, entries([_WIDE_BEHIND]) * WIDE.table_entries),
        (_WIDE_BEHIND, entries([1]) * WIDE.table_entries),
        geometry=WIDE,
    ),
    "two million sparse tables": lambda: image(
        (WIDE.cluster_size, _spread(WIDE, _WIDE_BEHIND, WIDE.table_bytes)), geometry=WIDE, length=1 << 46
    ),
    "eight million sparse tables": lambda: image(
        (_ROOM, _spread(LARGE, _BEHIND, MAX_TABLE_BYTES)), geometry=LARGE, length=1 << 52
    ),
    "tables of one entry each": lambda: image(
        (_ROOM, _spread(LARGE, _BEHIND, MAX_TABLE_BYTES)[: 8 * 256]),
        *((_BEHIND + i * MAX_TABLE_BYTES, entries([1])) for i in range(256)),
        geometry=LARGE,
        length=1 << 38,
    ),
    "tables that overlap": lambda: image(
        (_ROOM, _spread(LARGE, _BEHIND, LARGE.cluster_size)),
        (_BEHIND, _noise(1 << 20) * 16),
        geometry=LARGE,
        length=1 << 50,
    ),
    "as many sparse tables as are accepted": lambda: image(
        (_ROOM, _spread(LARGE, _BEHIND, MAX_TABLE_BYTES)[: 8 * MAX_TABLES]), geometry=LARGE, length=1 << 52
    ),
    "as many tables as are accepted, that overlap": lambda: image(
        (_ROOM, _spread(LARGE, _BEHIND, LARGE.cluster_size)[: 8 * MAX_TABLES]),
        (_BEHIND, _noise(1 << 20) * 16),
        geometry=LARGE,
        length=1 << 50,
    ),
    "one table under as many names as are accepted": lambda: image(
        (_ROOM, entries([_BEHIND]) * MAX_TABLES),
        (_BEHIND, _noise(1 << 20) * 64),
        geometry=LARGE,
    ),
    "invalid names all over": lambda: image(
        (_ROOM, entries([_BEHIND, _BEHIND + MAX_TABLE_BYTES])),
        (_BEHIND, _noise(1 << 20) * 64),
        geometry=LARGE,
        length=_BEHIND + 2 * MAX_TABLE_BYTES,
        features=Feature.NEED_CHECK,
    ),
    "every other cluster free": lambda: image(
        (1 << 16, _spread(Geometry(1 << 16, 16), 1 << 24, 1 << 20)[: 16 * 8]),
        (1 << 24, entries((1 << 25) + (1 << 17) * np.arange(1 << 21, dtype=np.uint64))),
        geometry=Geometry(1 << 16, 16),
        length=1 << 40,
    ),
    "tables that name each other and L1": lambda: image(
        (4096, entries([8192, 12288, 4096])),
        (8192, entries([12288, 8192, 4096, 0, 1] * 100)),
        (12288, entries([8192, 12288, 4096, 2, 1] * 100)),
        length=16384,
    ),
    "tables of noise": lambda: image((4096, _spread(SMALL, 8192, 4096)), (8192, _noise(1 << 21))),
    "small tables all over": lambda: image((4096, _spread(SMALL, 1 << 30, 1 << 31)), length=1 << 41),
    "needs a check": lambda: image(
        (_ROOM, _noise(1 << 20) * 64), geometry=LARGE, length=1 << 50, features=Feature.NEED_CHECK
    ),
}
"""Made when they are wanted: some hold 64 MiB."""

NAMES: dict[str, bytes] = {
    "NUL": b"base\0.raw",
    "only NUL": b"\0\0\0",
    "newline": b"a\nqedfs: all is well",
    "escape sequences": b"\x1b]0;x\x07\x1b[2J\x9b31m\xc2\x9b31m",
    "direction marks": "base\u202efdp.war".encode(),
    "parents": b"../" * 1000 + b"nowhere",
    "invalid UTF-8": b"\xff\xfe\x80base",
    "as long as can be": b"x" * 4000,
    "json": b'json:{"driver":"file","filename":"/nowhere"}',
    "deep json": b"json:" + b'{"file":' * 400,
    "an URL of nonsense": b"nbd://[::1%25\n]:99999999999/\x1b",
    "a socket of nonsense": b"nbd+unix:///\x07?socket=/x\x1b[2J",
    "nothing there": b"nbd+unix:///?socket=/nonexistent",
    "a protocol of nonsense": b"\x1b[2Jx:y",
    "dot": b".",
    "empty file": b"file:",
}
"""Names of backings."""


def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket(path: Path) -> None:
    import socket as sockets

    with sockets.socket(sockets.AF_UNIX) as listener:
        listener.bind(os.fspath(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL: dict[str, Sample] = {kind.__name__: kind for kind in (fifo, socket, device, folder, dangling, circle)}
"""What is no file at all."""


def overlay(path: Path, backing: str | bytes, *, raw: bool = False) -> None:
    """Write an empty image over `backing`."""
    features = Feature.NO_PROBE if raw else Feature.NONE
    image(name=os.fsencode(backing), size=1 << 20, features=features)(path)
