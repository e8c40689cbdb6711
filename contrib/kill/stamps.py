"""Sectors that say what they are, and the ledger of which of their versions may be lost.

A sector holds one word of 64 bits 64 times over: the number of its version below, a mark of disk, sector and version above.
So every word tells by itself whether it belongs there, and every sector whether it is one version and not a mixture.
Version 0 is what the backing holds; there, every fourth sector run is zeros.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

SECTOR = 512
WORDS = SECTOR // 8
PAGE_SECTORS = 8
ZERO_RUN = 128
"""Sectors of the backing that are zeros together: one cluster of 64 KiB."""

Array = npt.NDArray[np.uint64]


class Violation(Exception):
    """What was read cannot be: an acknowledged version is gone, a sector is foreign or mixed."""


def words(salt: int, sectors: npt.ArrayLike, versions: npt.ArrayLike) -> Array:
    """Return the word of each of `sectors` in each of `versions` (broadcast). `salt` tells disks apart."""
    sector = np.asarray(sectors, np.uint64)
    version = np.asarray(versions, np.uint64)
    with np.errstate(over="ignore"):
        mark = sector * np.uint64(0x9E3779B97F4A7C15) + version * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(salt)
        mark ^= mark >> np.uint64(30)
        mark *= np.uint64(0x94D049BB133111EB)
        mark ^= mark >> np.uint64(31)
    word = (mark & np.uint64(0xFFFFFFFF00000000)) | version
    zeros = (version == 0) & ((sector // ZERO_RUN) % 4 == 3)
    return np.where(zeros, np.uint64(0), word)


def content(salt: int, sectors: npt.ArrayLike, versions: npt.ArrayLike) -> bytes:
    """Return the bytes of `sectors` one after another."""
    return np.repeat(words(salt, sectors, versions), WORDS).tobytes()


class Ledger:
    """For each sector, the newest version that was issued and the newest that was acknowledged, in a file.

    Whoever writes a sector notes its version before the write begins, and that it is acknowledged after the answer: so
    whatever is killed when, a sector may hold any version from `acknowledged` to `issued`. One writer a sector.
    """

    def __init__(self, path: Path, sectors: int, salt: int) -> None:
        self.salt = salt
        both = np.memmap(path, np.uint64, "r+" if path.exists() else "w+", shape=(2, sectors))
        self.acknowledged: Array = both[0]
        self.issued: Array = both[1]

    def issue(self, first: int, count: int) -> bytes:
        """Return what to write to `count` sectors from `first` on: the next version of each, noted as issued."""
        part = slice(first, first + count)
        versions = self.issued[part] + np.uint64(1)
        self.issued[part] = versions
        return content(self.salt, np.arange(first, first + count), versions)

    def acknowledge(self, first: int, count: int) -> None:
        """Note that everything issued to these sectors is durable."""
        self.acknowledged[first : first + count] = self.issued[first : first + count]

    def judge(
        self, first: int, data: bytes | memoryview, lowest: Array, *, mixed: npt.NDArray[np.bool_] | None
    ) -> Array:
        """Return the version of each sector in `data`, which was read from sector `first` on.

        `lowest` is `acknowledged` as it was before the read. Sectors of `mixed` (None: all) may hold words of several
        versions, as memory does that is stored to while it is written back.

        Raises:
            Violation: a word is of another sector or disk, older than acknowledged, newer than issued, or mixed.
        """
        read = np.frombuffer(data, np.uint64).reshape(-1, WORDS)
        sectors = np.arange(first, first + len(read), dtype=np.uint64)
        versions = read & np.uint64(0xFFFFFFFF)
        foreign = read != words(self.salt, sectors[:, None], versions)
        self._refuse(foreign.any(axis=1), "is foreign", first, read)
        oldest, newest = versions.min(axis=1), versions.max(axis=1)
        self._refuse(oldest < lowest, "lost what was acknowledged", first, read)
        self._refuse(newest > self.issued[first : first + len(read)], "is from the future", first, read)
        if mixed is not None:
            self._refuse((oldest != newest) & ~mixed, "is a mixture", first, read)
        return np.asarray(newest)

    def settle(self, first: int, versions: Array) -> None:
        """Take what was found after a crash as the state from now on: it is in the leaf."""
        self.acknowledged[first : first + len(versions)] = versions
        self.issued[first : first + len(versions)] = versions

    def _refuse(self, bad: npt.NDArray[np.bool_], what: str, first: int, read: Array) -> None:
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            sector = first + at
            raise Violation(
                f"{int(bad.sum())} sectors, the first {sector}, {what}: acknowledged {self.acknowledged[sector]}, "
                f"issued {self.issued[sector]}, words {[hex(int(w)) for w in np.unique(read[at])[:4]]}"
            )
