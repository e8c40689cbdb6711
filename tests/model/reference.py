"""What is right, said slowly: a disk as an array of bytes, and a reader of QED images that shares no code with qedfs."""

from __future__ import annotations

import struct
from typing import NamedTuple


class ReferenceDisk:
    """A disk of `size` bytes over `base`: what every read must return."""

    def __init__(self, size: int, base: bytes = b"") -> None:
        self.content = bytearray(base[:size].ljust(size, b"\0"))

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, pos: int, length: int) -> bytes:
        return bytes(self.content[pos : pos + length])

    def write(self, pos: int, data: bytes) -> None:
        self.grow(-(-(pos + len(data)) // 512) * 512)
        self.content[pos : pos + len(data)] = data

    def grow(self, size: int) -> None:
        self.content.extend(bytes(max(0, size - len(self.content))))


class Judged(NamedTuple):
    """What a whole image says. `leaks` counts clusters of the file that nothing names."""

    content: bytes
    leaks: int
    need_check: bool
    data: int
    zero: int


def judge(image: bytes | bytearray, base: bytes = b"") -> Judged:
    """Read a QED image by its specification, and assert that each entry is valid and no cluster has two owners."""
    magic, cluster, table, room, features, _, _, l1_offset, size = struct.unpack_from("<4sIIIQQQQQ", image)
    assert magic == b"QED\0"
    usable = -(-len(image) // 512) * 512 // cluster * cluster
    entries = table * cluster // 8
    owners = set(range(room))

    def own(offset: int, clusters: int) -> None:
        assert offset % cluster == 0, f"misaligned {offset:#x}"
        assert room * cluster <= offset <= usable - clusters * cluster, f"{offset:#x} is outside of {usable:#x}"
        taken = set(range(offset // cluster, offset // cluster + clusters))
        assert not taken & owners, f"{offset:#x} has two owners"
        owners.update(taken)

    def entries_at(offset: int) -> tuple[int, ...]:
        own(offset, table)
        return struct.unpack_from(f"<{entries}Q", image.ljust(usable, b"\0"), offset)

    content = bytearray(base[:size].ljust(size, b"\0") if features & 1 else bytes(size))
    data = zero = 0
    for index, l2_offset in enumerate(entries_at(l1_offset)):
        if not l2_offset:
            continue
        for inside, entry in enumerate(entries_at(l2_offset)):
            pos = (index * entries + inside) * cluster
            if entry > 1:
                own(entry, 1)
            if not entry or pos >= size:
                continue
            length = min(cluster, size - pos)
            found = bytes(length) if entry == 1 else image[entry : entry + length].ljust(length, b"\0")
            content[pos : pos + length] = found
            data, zero = data + (entry > 1), zero + (entry == 1)
    return Judged(bytes(content), usable // cluster - len(owners), bool(features & 2), data, zero)
