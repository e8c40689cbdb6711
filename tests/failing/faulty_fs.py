"""A file system whose writes and flushes fail when told to: `python faulty_fs.py FOLDER MOUNTPOINT`.

Shows the files of FOLDER. Lines on standard input: `fail write EIO 65536` (writes that begin below that offset; without a
number all), `fail fsync EIO`, `heal`; each is answered by `ok`, as is the mount itself once it is there. Without the writeback
cache of FUSE every write of the program above arrives here before its system call returns, and so does every flush.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pyfuse3
import trio


class FaultyFiles(pyfuse3.Operations):
    """Files by inode, in the order of their names."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE + 1 + i: path for i, path in enumerate(sorted(folder.iterdir()))}
        self._folder = folder
        self.faults: dict[str, tuple[int, int]] = {}
        """Operation to errno and the offset below which it fails."""

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        status = os.stat(self._paths.get(inode, self._folder))
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_size = inode, status.st_mode, status.st_size
        entry.st_nlink, entry.st_blocks = 1, status.st_blocks
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        for inode, path in self._paths.items():
            if os.fsencode(path.name) == name:
                return await self.getattr(inode)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=os.open(self._paths[inode], os.O_RDWR))

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            os.truncate(self._paths[inode], attr.st_size)
        return await self.getattr(inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self._fail("read", off)
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._fail("write", off)
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._fail("fsync", 0)
        os.fdatasync(fh)

    def _fail(self, operation: str, offset: int) -> None:
        number, below = self.faults.get(operation, (0, 0))
        if offset < below:
            raise pyfuse3.FUSEError(number)


async def obey(files: FaultyFiles) -> None:
    async for line in trio.lowlevel.FdStream(os.dup(0)):
        for command in line.decode().splitlines():
            match command.split():
                case ["fail", operation, name, *below]:
                    files.faults[operation] = getattr(errno, name), int(below[0]) if below else 1 << 62
                case ["heal"]:
                    files.faults.clear()
        print("ok", flush=True)


async def main(folder: Path, point: str) -> None:
    files = FaultyFiles(folder)
    pyfuse3.init(files, point, {*pyfuse3.default_options, "fsname=faulty"} - {"default_permissions"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey, files)
        print("ok", flush=True)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()
    pyfuse3.close()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
