"""SOURCE arguments: which files of a directory are leaves, and what each is called in the mount.

`scan` looks, `choose` decides without I/O. A directory is looked at once a second rather than watched by inotify: that
also works on network file systems, where others add the files; it sees a file again whose content came after its name;
and it costs one listing and one `stat` per file. Headers are read only where size or times have changed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qedfs.backing.location import FileLocation, parse_location
from qedfs.errors import QedfsError
from qedfs.image import header as headers
from qedfs.session.places import is_below

SUFFIX = ".qed"


class FileId(NamedTuple):
    """Which file it is, whatever its name."""

    device: int
    inode: int


class Stamp(NamedTuple):
    """Changes when somebody changes the file: its content, its owner or its permissions. Times are in nanoseconds."""

    size: int
    modified: int
    changed: int


@dataclass(frozen=True)
class Entry:
    """A regular file in a directory. `backing` is the local file that it names as such, if it is a QED image."""

    path: str
    id: FileId
    stamp: Stamp
    is_qed: bool
    backing: FileId | None = None


@dataclass(frozen=True)
class Choice:
    """What of a directory should be served: entries in order of their names, and others with the reason why not."""

    leaves: list[Entry]
    refused: list[tuple[Entry, str]]


def raw_name(path: str) -> str:
    """Return the name in the mount of the image at `path`: `vm1.qed` is `vm1.raw`, any other name gets `.raw` appended."""
    name = os.path.basename(path)
    return (name[: -len(SUFFIX)] if name.endswith(SUFFIX) and name != SUFFIX else name) + ".raw"


def choose(entries: Iterable[Entry], served: Collection[FileId], refused: Collection[FileId]) -> Choice:
    """Decide which of the `entries` of one directory are leaves.

    An image that another one uses as backing is none, unless it is `served` already: then the newcomer is refused.
    Images that are `refused` (they could not be opened) do not count as users. A circle of images that no leaf leads
    into is made of leaves: opening them tells what is wrong. Of two that would have one name in the mount the served one
    stays, else the first.
    """
    images = {entry.id: entry for entry in entries if entry.is_qed}
    over_a_leaf = {
        image.id for image in images.values() if image.id not in served and image.backing in served and image.backing
    }
    users = [image for image in images.values() if image.id not in refused and image.id not in over_a_leaf]
    used = {image.backing for image in users if image.backing != image.id}
    backings: set[FileId] = set()
    for head in users:
        if head.id in used:
            continue
        below = head.backing
        while below in images and below not in backings and below != head.id:
            backings.add(below)
            below = images[below].backing
    leaves: dict[str, Entry] = {}
    turned_down = [(images[i], "its backing is a leaf of this mount") for i in sorted(over_a_leaf)]
    for image in sorted(images.values(), key=lambda image: (image.id not in served, image.id in refused, image.path)):
        name = raw_name(image.path)
        if image.id not in served and (image.id in backings or image.id in over_a_leaf):
            continue
        if name in leaves:
            turned_down.append((image, f"would be called {name}, as {leaves[name].path} is"))
        else:
            leaves[name] = image
    return Choice(sorted(leaves.values(), key=lambda image: image.path), turned_down)


def scan(folder: int, path: str, mountpoint: str, known: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the regular files of the directory open as `folder`, by their path below `path`.

    Hidden files are left out: they are how rsync and editors call a file that is not whole yet. Links into `mountpoint`
    are never followed. To be called in a thread.

    Raises:
        OSError: the directory cannot be read.
    """
    found: dict[str, Entry] = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith("."):
            continue
        full = os.path.join(path, name)
        try:
            if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode) and is_below(
                os.path.realpath(full), mountpoint
            ):
                continue
            entry = _look(folder, name, full, known.get(full))
        except OSError:
            continue  # gone meanwhile, or a link to nowhere
        if entry:
            found[full] = entry
    return found


def _look(folder: int, name: str, path: str, known: Entry | None) -> Entry | None:
    status = os.stat(name, dir_fd=folder)
    if not stat.S_ISREG(status.st_mode):
        return None
    file_id = FileId(status.st_dev, status.st_ino)
    stamp = Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if known and (known.id, known.stamp) == (file_id, stamp):
        return known
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except PermissionError:
        # What we may not read we cannot tell from a leaf but by its name.
        return Entry(path, file_id, stamp, is_qed=name.endswith(SUFFIX))
    try:
        if os.pread(fd, len(headers.MAGIC), 0) != headers.MAGIC:
            return Entry(path, file_id, stamp, is_qed=False)
        return Entry(path, file_id, stamp, is_qed=True, backing=_backing_of(fd, path, status.st_size))
    finally:
        os.close(fd)


def _backing_of(fd: int, path: str, length: int) -> FileId | None:
    try:
        header = headers.decode(os.pread(fd, headers.SIZE, 0), length, path)
        if not header.has_backing:
            return None
        name = headers.decode_backing_name(os.pread(fd, header.backing_name_size, header.backing_name_offset))
        location = parse_location(name, FileLocation(path))
        if not isinstance(location, FileLocation):
            return None
        status = os.stat(location.path)
    except (QedfsError, OSError):
        return None  # opening it will say what is wrong
    return FileId(status.st_dev, status.st_ino)
