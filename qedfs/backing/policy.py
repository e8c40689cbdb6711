"""Which backings an image may name, judged from who answers for the image. Sans-IO.

Whoever can write an image can make it name any file of the machine, and the mount would then show that file to whoever
may read the disk. So each image of a chain decides with its own rights only (interface, "Backing stores"):

- *trusted*: it belongs to root or to the user who mounts, and nobody else may write it. It may name what the mounter may.
- of *another owner* who alone may write it: it may name local files that its owner could open (opened with the owner's
  user and groups, which only root can do), and other backings only if `allow_backing` names them.
- *anybody's* (its group or others may write it): no owner answers for what it says, so `allow_backing` must name it all.
- read from a *remote* source: no local path and no socket at all; remote ones if `allow_backing` names them.

`allow_backing` also narrows: once patterns are given, an image of any kind may name only what one of them matches.
A unix socket counts as local, but connecting to one with somebody else's rights is not done: it must be named.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

from qedfs.errors import NotAllowed


class Place(Enum):
    """Where a backing is, as far as policy cares."""

    FILE = "file"
    SOCKET = "socket"
    REMOTE = "remote"


class Rights(Enum):
    """With whose rights a backing is opened."""

    OURS = "ours"
    OWNER = "owner"
    """With those of the naming image's owner."""
    NAMED = "named"
    """With ours, and only if `allow_backing` names it."""


@dataclass(frozen=True)
class Owner:
    """Who answers for an image: from its open file, never from its path."""

    uid: int
    mode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Owner:
        return cls(status.st_uid, status.st_mode)

    @property
    def alone_may_write(self) -> bool:
        return not self.mode & (stat.S_IWGRP | stat.S_IWOTH)


@dataclass(frozen=True)
class Policy:
    """What the mounter allows.

    `mounter` is the user who mounts. `allow_backing` are shell patterns over the full name of a backing: the real path
    of a file, the canonical URL of anything else. `forbidden_roots` are folders (real paths) that no backing may lie
    in: the mountpoint. `connections` is how many connections a remote backing may get, None for what is usual with its transport. `secret` is the passphrase of
    encrypted ones.
    """

    mounter: int = field(default_factory=os.getuid)
    allow_backing: tuple[str, ...] = ()
    forbidden_roots: tuple[str, ...] = ()
    connections: int | None = None
    secret: bytes | None = field(default=None, repr=False)

    def trusts(self, owner: Owner) -> bool:
        return owner.uid in (0, self.mounter) and owner.alone_may_write

    def rights(self, owner: Owner | None, *, remote: bool, place: Place, name: str) -> Rights:
        """Return with whose rights an image has its backing opened. `name` is for the message.

        `owner` answers for the image; None for a remote one (`remote`), and for a person at the command line.

        Raises:
            NotAllowed: the image may not name a backing in that place, whatever it is.
        """
        if remote and place is not Place.REMOTE:
            raise NotAllowed(name, "an image that is read from a remote source may not name anything local")
        if not remote and (owner is None or self.trusts(owner)):
            return Rights.OURS
        if place is Place.FILE and owner is not None and owner.alone_may_write and self.mounter == 0:
            return Rights.OWNER
        if not self.allow_backing:
            raise NotAllowed(name, f"{_distrust(owner)}; it may name only what allow_backing names")
        return Rights.NAMED

    def check_name(self, name: str) -> None:
        """Raise `NotAllowed` if patterns were given and none matches the full name of a backing."""
        if self.allow_backing and not any(fnmatchcase(name, pattern) for pattern in self.allow_backing):
            raise NotAllowed(name, "no pattern of allow_backing matches it")

    def check_path(self, path: str) -> None:
        """Raise `NotAllowed` if the real path of a backing lies in a forbidden root."""
        for root in self.forbidden_roots:
            if path == root or path.startswith(root.rstrip("/") + "/"):
                raise NotAllowed(path, f"lies under the mountpoint {root}")


def _distrust(owner: Owner | None) -> str:
    if owner is None:
        return "the image that names it comes from a remote source"
    if not owner.alone_may_write:
        return "the image that names it may be written by its group or by others"
    return f"the image that names it belongs to user {owner.uid}"
