"""What a machine reads while it starts, made up: a kernel in one piece, then files, most of them small and near each other.

It is the same for every host, as machines of one image do the same. Reads are one after the other, as a boot has to know
what one file says before it opens the next, with a little thinking in between.
"""

from __future__ import annotations

import random
from typing import NamedTuple

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4 * KIB
LONGEST = 128 * KIB
"""Bytes of one read: the readahead of a guest's kernel."""


class Read(NamedTuple):
    """In bytes, whole pages."""

    pos: int
    length: int


def boot_trace(size: int, seed: int = 1, files: int = 400) -> list[Read]:
    """Return the reads of a boot from a disk of `size` bytes: about a tenth of it for 1 GiB and 400 files."""
    chance = random.Random(seed)
    groups = [chance.randrange(size // 2, size - size // 32) for _ in range(12)]
    """Where the files are: what is installed together lies together."""
    kernel = size // 32
    reads = _pieces(size // 16, kernel)
    for _ in range(files):
        group = chance.choice(groups)
        reads.append(Read(group // PAGE * PAGE + chance.randrange(64) * PAGE, PAGE))  # its inode
        length = min(int(chance.lognormvariate(11.2, 1.3)), size // 256)
        place = min(group + chance.randrange(size // 64), size - length - PAGE)
        reads += _pieces(place, length)
    return reads


def _pieces(pos: int, length: int) -> list[Read]:
    start, end = pos // PAGE * PAGE, -(-(pos + length) // PAGE) * PAGE
    return [Read(at, min(LONGEST, end - at)) for at in range(start, end, LONGEST)]
