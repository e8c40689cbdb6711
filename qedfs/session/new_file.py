"""A file that is there as a whole or not at all, whatever ends the process that writes it.

It has no name while it is written (O_TMPFILE), where the file system can do that; elsewhere (vfat, NFS) a hidden one, which
only a killed process leaves behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from qedfs.errors import OutputError

_NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_libc = ctypes.CDLL(None, use_errno=True)


class NewFile:
    """Made by `new_file`. `fd` is open for reading and writing."""

    def __init__(self, fd: int, path: str, hidden: str, *, overwrite: bool) -> None:
        self.fd = fd
        self.path = path
        self._hidden = hidden
        self._overwrite = overwrite

    def publish(self) -> None:
        """Make the content durable, then give the file its name, durably, too.

        Raises:
            OutputError: it cannot be, or there is a file of that name by now that is not to be overwritten.
        """
        try:
            os.fsync(self.fd)
            if not self._hidden and not self._overwrite:
                self._link(self.path)
            else:
                if not self._hidden:
                    self._hidden = hidden_name(self.path)  # a link replaces nothing, a renaming does
                    self._link(self._hidden)
                self._rename()
            _sync_folder(self.path)
        except FileExistsError as error:
            raise OutputError(self.path, "exists already (--force overwrites it)") from error
        except OSError as error:
            raise failure(self.path, error) from error

    def _link(self, path: str) -> None:
        # A folder's descriptor, which an absolute path does without, has Python call linkat(2), which can follow the link.
        os.link(f"/proc/self/fd/{self.fd}", path, src_dir_fd=self.fd, follow_symlinks=True)

    def _rename(self) -> None:
        if self._overwrite:
            os.replace(self._hidden, self.path)
        elif _libc.renameat2(
            _AT_FDCWD, os.fsencode(self._hidden), _AT_FDCWD, os.fsencode(self.path), _RENAME_NOREPLACE
        ):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._hidden = ""

    def close(self) -> None:
        """Close it; unless it was published nothing of it is left."""
        os.close(self.fd)
        if self._hidden:
            os.unlink(self._hidden)


@contextlib.contextmanager
def new_file(path: str, mode: int, *, overwrite: bool) -> Iterator[NewFile]:
    """Have a new, empty file to be published as `path`, of `mode` as far as the umask allows.

    With `overwrite` it then takes the place of a regular file; the links that lead there stay.

    Raises:
        OutputError: something is there that is not to be overwritten, or it cannot be made.
    """
    if overwrite:
        path = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if not overwrite:
            raise OutputError(path, "exists already (--force overwrites it)")
        if not stat.S_ISREG(found.st_mode):
            raise OutputError(path, "is no regular file")
    try:
        new = _open(path, mode, overwrite)
    except OSError as error:
        raise failure(path, error) from error
    try:
        yield new
    finally:
        new.close()


def hidden_name(path: str) -> str:
    """Return a name beside `path` that nobody has."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name[:200]}.{secrets.token_hex(8)}")


def failure(path: str, error: OSError) -> OutputError:
    """Return `error` as one about the file at `path`."""
    return OutputError(path, f"cannot be written ({os.strerror(error.errno or 0)})")


def _open(path: str, mode: int, overwrite: bool) -> NewFile:
    folder = os.path.dirname(path) or "."
    if os.path.isdir(folder):  # else the reason would be that of a file system without nameless files
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
            return NewFile(fd, path, "", overwrite=overwrite)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
    hidden = hidden_name(path)
    fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    return NewFile(fd, path, hidden, overwrite=overwrite)


def _sync_folder(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
