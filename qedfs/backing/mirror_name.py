"""Several servers for one backing: how they are named, and how each is pinned by itself. Sans-IO.

`mirrors:ADDRESS|ADDRESS…`: no URL has a `|` in it (RFC 3986), and QEMU, which does not know the protocol, refuses the
name instead of taking it for a file's. The order is that of preference.

The pin of all of them is one tag, `mirrors:` and for each a hash of its own tag, or `-` as long as that is not known or
its server tells only a size. So one that was away when the leaf was made, or is away now, makes no other content.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

PREFIX = "mirrors:"
SEPARATOR = "|"
MOST = 8
"""As many as a pin has room for (`record.MAX_TAG`)."""
UNKNOWN = "-"
_DIGITS = 10
"""Hexadecimal digits of each hash: 40 bits tell one content of a server from its next one."""


@dataclass(frozen=True)
class MirrorsLocation:
    """The names of the mirrors in canonical form, in order of preference. `host` is the machine of the first.

    `keys` tell the mirrors apart where the names, in which nothing secret is, do not (`location.key_of`).
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    host: str | None
    format: str | None = None

    def __str__(self) -> str:
        return PREFIX + SEPARATOR.join(self.names)


def is_mirrors(name: str) -> bool:
    return name.startswith(PREFIX)


def names_of(name: str) -> list[str]:
    """Return what `name`, which `is_mirrors`, says between its separators."""
    return name.removeprefix(PREFIX).split(SEPARATOR)


def mark(tag: str) -> str:
    """Return what stands for a mirror with the identity tag `tag` in the tag of all."""
    return hashlib.sha256(tag.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGITS] if tag else UNKNOWN


def tag_of(marks: list[str]) -> str:
    """Return the tag of all; empty if nothing is known of any."""
    return PREFIX + ",".join(marks) if any(mark != UNKNOWN for mark in marks) else ""


def marks_of(tag: str, count: int) -> list[str]:
    """Return the marks of `count` mirrors in `tag`; all unknown if it is not a tag of so many."""
    marks = tag.removeprefix(PREFIX).split(",") if is_mirrors(tag) else []
    return marks if len(marks) == count else [UNKNOWN] * count


def agree(one: str, other: str) -> bool:
    """Whether two tags of mirrors may stand for one content: no mirror is known to both as something else."""
    if not is_mirrors(one) or not is_mirrors(other):
        return False
    left, right = one.removeprefix(PREFIX).split(","), other.removeprefix(PREFIX).split(",")
    return len(left) == len(right) and all(a == b or UNKNOWN in (a, b) for a, b in zip(left, right, strict=True))


def joined(one: str, other: str) -> str:
    """Return what two tags that `agree` know together."""
    left, right = one.removeprefix(PREFIX).split(","), other.removeprefix(PREFIX).split(",")
    return PREFIX + ",".join(b if a == UNKNOWN else a for a, b in zip(left, right, strict=True))
