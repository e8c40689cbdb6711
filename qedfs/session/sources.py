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

from qedfs.backing.file import real_path
from qedfs.backing.location import FileLocation, parse_location
from qedfs.backing.policy import Owner, Policy
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
    """A regular file in a directory. `backing` is the local file that it names as such, if it is a QED image.

    `owner` is a uid, `trusted` as in `Policy.trusts`, and `fixed` what nobody may write: a base, not a leaf.
    """

    path: str
    id: FileId
    stamp: Stamp
    is_qed: bool
    backing: FileId | None = None
    owner: int = 0
    trusted: bool = True
    fixed: bool = False

    def may_hide(self, other: Entry) -> bool:
        """Whether naming `other` as backing makes it none of the leaves: not if that would take another user's disk away."""
        return self.trusted or self.owner == other.owner or other.fixed


@dataclass(frozen=True)
class Choice:
    """What of a directory should be served: entries in order of their names, and others with the reason why not."""

    leaves: list[Entry]
    refused: list[tuple[Entry, str]]


def raw_name(path: str) -> str:
    """Return the name in the mount of the image at `path`: `vm1.qed` is `vm1.raw`, any other name gets `.raw` appended."""
    name = os.path.basename(path)
    return (name[: -len(SUFFIX)] if name.endswith(SUFFIX) and name != SUFFIX else name) + ".raw"


def choose(
    entries: Iterable[Entry], served: Collection[FileId], refused: Collection[FileId], *, names: Collection[str] = ()
) -> Choice:
    """Decide which of the `entries` of one directory are leaves; `names` are the paths under which some are `served`.

    An image that another one uses as backing is none, unless it is `served` already: then the newcomer is refused.
    Images that are `refused` (they could not be opened) do not count as users, nor do those that may not hide what they
    name. A circle of images that no leaf leads into is made of leaves: opening them tells what is wrong. Of two that would
    have one name in the mount the served one stays, else a trusted one, else the first if they have the same owner. An image
    with two names (links) is a leaf under the one under which it is served, else under the first.
    """
    found = sorted(
        (entry for entry in entries if entry.is_qed), key=lambda entry: (entry.path not in names, entry.path)
    )
    images: dict[FileId, Entry] = {}
    for entry in found:
        images.setdefault(entry.id, entry)
    over_a_leaf = {
        image.id
        for image in images.values()
        if image.id not in served
        and image.backing
        and (image.backing in served or (image.backing in images and not image.may_hide(images[image.backing])))
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
            below = None if below in over_a_leaf else images[below].backing
    turned_down = [(images[i], "its backing is a leaf of this mount") for i in sorted(over_a_leaf)]
    claims: dict[str, list[Entry]] = {}
    for image in sorted(images.values(), key=lambda i: (i.id not in served, i.id in refused, not i.trusted, i.path)):
        if image.id in served or (image.id not in backings and image.id not in over_a_leaf):
            claims.setdefault(raw_name(image.path), []).append(image)
    leaves: list[Entry] = []
    for name, (first, *others) in claims.items():
        rivals = {image.owner for image in others if image.id not in refused} - {first.owner}
        if rivals and first.id not in served and not first.trusted:
            turned_down += [(image, f"another user's image, too, would be called {name}") for image in (first, *others)]
        else:
            leaves.append(first)
            turned_down += [(image, f"would be called {name}, as {first.path} is") for image in others]
    turned_down += [
        (entry, f"is the same image as {images[entry.id].path}")
        for entry in found
        if entry is not images[entry.id] and images[entry.id] in leaves
    ]
    return Choice(sorted(leaves, key=lambda image: image.path), turned_down)


def scan(folder: int, path: str, mountpoint: str, known: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the regular files of the directory open as `folder`, by their path below `path`.

    Hidden files are left out: they are how rsync and editors call a file that is not whole yet. Links into `mountpoint`
    are never followed, and those of other users only to files of theirs. To be called in a thread.

    Raises:
        OSError: the directory cannot be read.
    """
    found: dict[str, Entry] = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith("."):
            continue
        full = os.path.join(path, name)
        try:
            link = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISLNK(link.st_mode):
                entry = _look(folder, name, full, known.get(full))
            elif is_below(os.path.realpath(full), mountpoint):
                continue
            else:
                entry = _look(folder, name, full, known.get(full))
                if entry and link.st_uid not in (0, os.getuid(), entry.owner):
                    continue
        except OSError:
            continue  # gone meanwhile, or a link to nowhere
        if entry:
            found[full] = entry
    return found


def _look(folder: int, name: str, path: str, known: Entry | None) -> Entry | None:
    status = os.stat(name, dir_fd=folder)
    if not stat.S_ISREG(status.st_mode):
        return None
    seen = _entry(path, status, is_qed=False)
    if known and (known.id, known.stamp) == (seen.id, seen.stamp):
        return known
    try:
        fd = _open(folder, name)
    except PermissionError:
        # What we may not read we cannot tell from a leaf but by its name.
        return _entry(path, status, is_qed=name.endswith(SUFFIX))
    if fd is None:
        return None
    try:
        # Of what is open: the name may mean another file by now.
        status = os.fstat(fd)
        if os.pread(fd, len(headers.MAGIC), 0) != headers.MAGIC:
            return _entry(path, status, is_qed=False)
        return _entry(path, status, is_qed=True, backing=_backing_of(fd, path, status.st_size))
    finally:
        os.close(fd)


def _open(folder: int, name: str) -> int | None:
    """Open a regular file; what took its place meanwhile is not opened, as opening a device may act."""
    look = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(look).st_mode):
            return None
        return os.open(f"/proc/self/fd/{look}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(look)


def _entry(path: str, status: os.stat_result, *, is_qed: bool, backing: FileId | None = None) -> Entry:
    return Entry(
        path,
        FileId(status.st_dev, status.st_ino),
        Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        is_qed,
        backing,
        status.st_uid,
        Policy().trusts(Owner.of(status)),
        not status.st_mode & 0o222,
    )


def _backing_of(fd: int, path: str, length: int) -> FileId | None:
    try:
        header = headers.decode(os.pread(fd, headers.SIZE, 0), length, path)
        if not header.has_backing:
            return None
        name = headers.decode_backing_name(os.pread(fd, header.backing_name_size, header.backing_name_offset))
        location = parse_location(name, FileLocation(real_path(fd)))
        if not isinstance(location, FileLocation):
            return None
        status = os.stat(location.path)
    except (QedfsError, OSError):
        return None  # opening it will say what is wrong
    return FileId(status.st_dev, status.st_ino)
