"""Files of a qedfs mount, seen from outside: their extended attributes, and the image behind them.

Attributes of the name `user.qedfs.…` can be put on any file by anybody, so what counts is the file system a file is on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from qedfs.errors import NotMounted, QedfsError, UsageError

PREFIX = "user.qedfs."
_FILE_SYSTEM = "fuse.qedfs"
_NOT_MOUNTED = "is not on a qedfs mount"
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE, errno.ENODEV})
"""What a path answers whose mount has ended, or whose image is served no more."""


def is_mounted(path: str) -> bool:
    """Whether `path` is on a qedfs mount, its root included.

    Raises:
        NotMounted: there is no such file, or its mount has ended.
        UsageError: its file system does not answer.
    """
    try:
        device = os.stat(path).st_dev
    except OSError as error:
        raise _failure(path, error) from error
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split(" ")[2] == wanted:
                return after.split(" ")[0] == _FILE_SYSTEM
    return False


def read_attribute(path: str, name: str) -> str:
    """Return the attribute `name` (without prefix) of a file or the root of a mount.

    Raises:
        NotMounted: the file is not on a qedfs mount, or is no more.
        UsageError: it has no such attribute.
    """
    if not is_mounted(path):
        raise NotMounted(path, _NOT_MOUNTED)
    try:
        return os.fsdecode(os.getxattr(path, PREFIX + name))
    except OSError as error:
        raise _refusal(path, name, error) from error


def read_some(path: str, names: Iterable[str]) -> dict[str, str]:
    """Return those of the attributes `names` (without prefix) that the file has and can tell now.

    Raises:
        NotMounted: the file is not on a qedfs mount, or is no more.
    """
    if not is_mounted(path):
        raise NotMounted(path, _NOT_MOUNTED)
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = os.fsdecode(os.getxattr(path, PREFIX + name))
        except OSError as error:
            # Another version may not have it; a damaged table has no counts.
            if error.errno in _GONE:
                raise _failure(path, error) from error
    return found


def read_attributes(path: str) -> dict[str, str]:
    """Return all readable attributes of a file on a qedfs mount, by name without prefix. Raises as `read_attribute`."""
    if not is_mounted(path):
        raise NotMounted(path, _NOT_MOUNTED)
    found: dict[str, str] = {}
    try:
        for name in os.listxattr(path):
            if name.startswith(PREFIX):
                found[name.removeprefix(PREFIX)] = os.fsdecode(os.getxattr(path, name))
    except OSError as error:
        raise _failure(path, error) from error
    return found


def write_attributes(path: str, values: list[tuple[str, str]]) -> None:
    """Set attributes (without prefix) of a mounted image in the order given; the first that is refused ends it.

    Raises:
        UsageError: the file is not a disk on a qedfs mount, or an attribute or value is refused.
    """
    check_disk(path)
    for name, value in values:
        try:
            os.setxattr(path, PREFIX + name, os.fsencode(value))
        except OSError as error:
            raise _refusal(path, name, error) from error


def check_disk(path: str) -> None:
    """Raise NotMounted unless `path` is a disk on a qedfs mount."""
    if not is_mounted(path) or os.path.isdir(path):
        raise NotMounted(path, "is not a disk on a qedfs mount")


def image_behind(path: str) -> str:
    """Return the path of the image behind a mounted disk; of anything else, `path` itself."""
    return read_attribute(path, "leaf") if is_mounted(path) else path


def _refusal(path: str, name: str, error: OSError) -> QedfsError:
    match error.errno:
        case errno.ENODATA:
            return UsageError(path, f"there is no attribute '{name}'")
        case errno.EACCES:
            return UsageError(path, f"the attribute '{name}' cannot be set, or not by you")
        case errno.EINVAL:
            return UsageError(path, f"the value for '{name}' is not one it can have")
        case errno.EBUSY:
            return UsageError(path, f"'{name}' cannot be set while the image is held for a migration")
        case errno.EROFS:
            return UsageError(path, f"'{name}' cannot be set on an image that is served read-only")
        case errno.EIO:
            newest = read_some(path, ["last_error"]).get("last_error")
            return UsageError(path, f"{name}: {newest or _why(error)}")
    if error.errno in _GONE:
        return _failure(path, error)
    return UsageError(path, f"{name}: {_why(error)}")


def _failure(path: str, error: OSError) -> UsageError:
    kind = NotMounted if error.errno in _GONE else UsageError
    return kind(path, _why(error))


def _why(error: OSError) -> str:
    if error.errno == errno.ENOTCONN:
        return "the process that served this mount is dead ('qedfs unmount' removes the mount)"
    return os.strerror(error.errno or 0)
