"""Option records, and how sizes, rates and durations are written.

Numbers of bytes take the suffixes `k M G T` (powers of 1024) everywhere; durations take `s m h d`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from qedfs.errors import UsageError

E = TypeVar("E", bound=Enum)

_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


class Mode(Enum):
    """What a disk does about clusters that are not in the leaf (interface, "Modes")."""

    COW = "cow"
    """Guest reads pass through."""
    COR = "cor"
    """Guest reads also copy the cluster into the leaf."""
    STREAM = "stream"
    """As `COR`, and what is missing is copied in idle time until the image is complete."""


class DirectIO(Enum):
    """Whether O_DIRECT handles bypass the kernel's page cache (docs/performance.md)."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Idle(Enum):
    """What counts as an idle moment for streaming."""

    AUTO = "auto"
    GUEST = "guest"
    ALWAYS = "always"


def parse_size(text: str, what: str) -> int:
    """Return the number of bytes that `text` says (`10`, `64k`, `1.5G`); `what` names the option for the message.

    Raises:
        UsageError: it is no such number, or no whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        value = float(match[1]) if "." in match[1] else int(match[1])
        size = value * _SUFFIXES[match[2].lower()]
        if size == int(size) and size < 1 << 63:
            return int(size)
    raise UsageError(what, f"'{text}' is not a number of bytes (such as 512, 64k, 1.5G)")


def parse_duration(text: str, what: str) -> float:
    """Return the seconds that `text` says (`90`, `5m`, `2h`, `1d`)."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise UsageError(what, f"'{text}' is not a duration (such as 30, 5m, 2h)")
    return float(match[1]) * _UNITS[match[2].lower()]


def parse_choice(kind: type[E], text: str, what: str) -> E:
    """Return the member of `kind` whose value is `text`."""
    for member in kind:
        if member.value == text:
            return member
    raise UsageError(what, f"'{text}' is none of {', '.join(str(m.value) for m in kind)}")


@dataclass(frozen=True)
class Reserve:
    """Room on the leaf's file system that copies leave free, in bytes or in percent of the file system."""

    size: int | None = None
    percent: float | None = None
