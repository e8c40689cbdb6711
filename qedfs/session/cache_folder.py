"""The folder of the shared caches: whose it must be, how its files are opened, and how much room they take.

What is in a cache is believed as the backing itself is. So the folder and its files belong to the user who mounts and
nobody else may enter; everything is opened relative to the folder that was looked at, and no link is followed.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from qedfs.errors import LeafError, Locked, UsageError
from qedfs.image.locks import lock_for_writing
from qedfs.image.storage import FileStorage, Space
from qedfs.session.places import is_below

log = logging.getLogger(__name__)

SUFFIX = ".qed"
PASSING_SUFFIX = ".passing.qed"
"""Of caches that are of no use once they are closed: their backing cannot say whether it is still the same."""
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_BLOCK = 512
"""The unit of `st_blocks` (stat(2)), whatever the file system's is."""


class CacheFolder:
    """An open folder of caches, which together may take `most` bytes; 0: no limit. Made by `open_cache_folder`."""

    def __init__(self, fd: int, path: str, most: int) -> None:
        self.path = path
        self._fd = fd
        self._most = most

    async def open(self, name: str, size: int) -> FileStorage:
        """Open the file `name`, making it if it is not there, and lock it. `size` is that of the disk to be cached.

        Where the limit leaves little room for it, caches that nobody has open are removed first.

        Raises:
            Locked: somebody else has it open.
            LeafError: it cannot be opened or made, or is not the mounting user's alone.
        """
        return await trio.to_thread.run_sync(self._open, name, size)

    async def remove(self, name: str) -> None:
        """Remove the file `name`, which the caller has locked, unless somebody has."""
        with suppress(FileNotFoundError):
            await trio.to_thread.run_sync(self._unlink, name)

    def remove_passed(self) -> None:
        """Remove the caches of no more use that a killed process has left."""
        for _, _, name in list(self._caches()):
            if name.endswith(PASSING_SUFFIX):
                self._remove_unused(name, "left by a mount that was killed")

    def left(self) -> int | None:
        """Return how many bytes the caches may still take; None without a limit. 0 is the least. Looks at the folder."""
        return max(0, self._most - sum(taken for _, taken, _ in self._caches())) if self._most else None

    def _open(self, name: str, size: int) -> FileStorage:
        if self._most:
            self._make_room(name, min(size, self._most // 4))
        path = os.path.join(self.path, name)
        while True:
            try:
                fd = os.open(name, _OPEN | os.O_CREAT, 0o600, dir_fd=self._fd)
            except OSError as error:
                raise LeafError(path, f"cannot be opened ({os.strerror(error.errno or 0)})") from error
            try:
                _check_file(os.fstat(fd), path)
                lock_for_writing(fd, path)
                if os.fstat(fd).st_nlink:
                    os.utime(fd)  # the time that decides which cache goes first when there is no room
                    return CacheStorage(fd, path, self)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # another mount has just removed it to make room

    def _make_room(self, name: str, wanted: int) -> None:
        """Remove caches that nobody has open, the longest unused first, until `wanted` bytes are left."""
        for _, _, other in sorted(self._caches()):
            if (self.left() or 0) >= wanted:
                return
            if other != name:
                self._remove_unused(other, "to make room")

    def _remove_unused(self, name: str, why: str) -> None:
        path = os.path.join(self.path, name)
        try:
            fd = os.open(name, _OPEN, dir_fd=self._fd)
            try:
                lock_for_writing(fd, path)
                self._unlink(name)
            finally:
                os.close(fd)
        except (Locked, FileNotFoundError):
            return
        except OSError as error:
            log.warning("%s: cannot be removed (%s)", path, os.strerror(error.errno or 0))
        else:
            log.info("%s: removed (%s)", path, why)

    def _unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def _caches(self) -> Iterator[tuple[float, int, str]]:
        """Yield when each cache was last opened or written, the bytes that it takes, and its name."""
        # A descriptor of its own: those that are copies of one share a position, and several threads may be looking.
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX):
                        try:
                            found = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue  # removed meanwhile
                        yield found.st_mtime, found.st_blocks * _BLOCK, entry.name
        finally:
            os.close(fd)


class CacheStorage(FileStorage):
    """The file of one cache, which may grow as far as all of its folder may."""

    def __init__(self, fd: int, name: str, folder: CacheFolder) -> None:
        super().__init__(fd, name, writable=True)
        self._folder = folder

    async def space(self) -> Space | None:
        found = await super().space()
        if found is None:
            return None
        return found._replace(allowed=await trio.to_thread.run_sync(self._folder.left))


@contextmanager
def open_cache_folder(path: str, most: int, *, mountpoint: str, sources: tuple[str, ...]) -> Iterator[CacheFolder]:
    """Have the folder at `path` (absolute) open while inside; it is made if it is not there, but not what it lies in.

    Raises:
        UsageError: it cannot be opened, is not the mounting user's alone, or lies where it must not.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise UsageError(path, f"cannot be made ({os.strerror(error.errno or 0)})") from error
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(path, f"is no folder for a shared cache ({os.strerror(error.errno or 0)})") from error
    try:
        _check_folder(os.fstat(fd), path, mountpoint, sources)
        folder = CacheFolder(fd, path, most)
        folder.remove_passed()
        yield folder
    finally:
        os.close(fd)


def _check_folder(status: os.stat_result, path: str, mountpoint: str, sources: tuple[str, ...]) -> None:
    if status.st_uid != os.getuid():
        raise UsageError(path, f"belongs to user {status.st_uid}; a shared cache lies in a folder of whoever mounts")
    if status.st_mode & 0o077:
        raise UsageError(path, f"others may enter (mode {stat.S_IMODE(status.st_mode):04o}); 'chmod 700' closes it")
    if is_below(os.path.realpath(path), mountpoint):
        raise UsageError(path, "a shared cache cannot lie in the mount itself")
    for source in sources:
        if os.path.exists(source) and os.path.samestat(os.stat(source), status):
            raise UsageError(path, "is a SOURCE of this mount, and its caches would be taken for images")


def _check_file(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LeafError(path, "is not a file of whoever mounts that is closed to others (mode 0600)")
