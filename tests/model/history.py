"""What a disk was told and what it answered, and with it the judgement of what a power cut left."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.model.memory_disk import MemoryDisk

SECTOR = 512


@dataclass
class History:
    """What was written to each sector, and which of it each flush covered; times are lengths of the storage's log."""

    rig: MemoryDisk
    old: bytes
    """The disk's content before."""
    versions: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    """By sector, oldest first: when its write began, and the content."""
    acknowledged: dict[int, int] = field(default_factory=dict)
    """By sector, how many versions were answered."""
    flushes: list[tuple[int, dict[int, int]]] = field(default_factory=list)
    """When each flush had ended, and what was acknowledged as it began."""
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    """Growths: when each began and ended, and the new size."""

    @property
    def now(self) -> int:
        return len(self.rig.storage.log)

    async def write(self, sector: int, data: bytes) -> None:
        count = len(data) // SECTOR
        for i in range(count):
            self.versions.setdefault(sector + i, []).append((self.now, data[i * SECTOR : (i + 1) * SECTOR]))
        if not self.rig.disk.write_nowait(sector * SECTOR, data):
            await self.rig.disk.write(sector * SECTOR, data)
        for i in range(count):
            self.acknowledged[sector + i] = len(self.versions[sector + i])

    async def flush(self) -> None:
        covered = dict(self.acknowledged)
        await self.rig.disk.flush()
        self.flushes.append((self.now, covered))

    async def grow(self, size: int) -> None:
        begun = self.now
        await self.rig.disk.grow(size)
        self.sizes.append((begun, self.now, size))

    async def synchronous(self, sector: int, data: bytes) -> None:
        """A synchronous write, of whatever kind: it comes as a write and a flush, and is answered after both."""
        await self.write(sector, data)
        await self.flush()

    def check(self, cut: int, content: bytes) -> None:
        """Assert that a disk of `content` may be what a power cut left after `cut` operations."""
        covered = next((c for ended, c in reversed(self.flushes) if ended <= cut), {})
        assert len(content) >= max((size for _, ended, size in self.sizes if ended <= cut), default=len(self.old))
        assert len(content) <= max((size for begun, _, size in self.sizes if begun < cut), default=len(self.old))
        expected = bytearray(self.old.ljust(len(content), b"\0"))
        for sector, versions in self.versions.items():
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            count = covered.get(sector, 0)
            allowed = [data for begun, data in versions[max(0, count - 1) :] if begun < cut]
            if not count:
                allowed.append(bytes(expected[place]))
            assert content[place] in allowed, f"sector {sector} after {cut} operations, {count} versions flushed"
            expected[place] = content[place]
        assert content == expected, f"content that nobody wrote, after {cut} operations"
