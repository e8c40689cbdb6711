"""qedfs with one step of its durability taken out, to see the rounds find it: `python -m contrib.kill.broken NAME mount ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from qedfs.cli.main import main
from qedfs.disk.disk import Disk
from qedfs.image.commit import Committer
from qedfs.image.storage import FileStorage


async def _nothing(*arguments: Any, **options: Any) -> None:
    pass


def flush_without_commit() -> None:
    """fsync is answered at once."""
    Disk.flush = _nothing  # type: ignore[method-assign]


def tables_not_written() -> None:
    """A commit flushes, and writes nothing."""
    Committer._write_tables = _nothing  # type: ignore[method-assign]


def l1_not_written() -> None:
    """A commit writes the tables, and never names them."""
    write = FileStorage.write

    async def write_but_l1(self: FileStorage, offset: int, data: bytes | bytearray | memoryview) -> None:
        # L1 follows the header cluster here, and L1 sectors are written singly; a table comes later in the file.
        header = await self.read(0, 64)
        start = int.from_bytes(header[40:48], "little")
        if not start <= offset < start + int.from_bytes(header[8:12], "little") * _cluster_size(header):
            await write(self, offset, data)

    FileStorage.write = write_but_l1  # type: ignore[method-assign]


def _cluster_size(header: bytearray) -> int:
    return int.from_bytes(header[4:8], "little")


BROKEN: dict[str, Callable[[], None]] = {
    breaks.__name__: breaks for breaks in (flush_without_commit, tables_not_written, l1_not_written)
}

if __name__ == "__main__":
    BROKEN[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
