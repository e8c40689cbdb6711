"""Option records, and how sizes, rates, durations and the text after `-o` are written.

Numbers of bytes take the suffixes `k M G T` (powers of 1024) everywhere; durations take `s m h d`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from qedfs.errors import UsageError

E = TypeVar("E", bound=Enum)

_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)", re.IGNORECASE)
MAX_SECRET = 4096
"""Bytes of a passphrase."""
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


def parse_count(text: str, what: str, low: int, high: int) -> int:
    """Return the whole number that `text` says, from `low` to `high`."""
    if text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high:
        return int(text)
    raise UsageError(what, f"'{text}' is not a whole number from {low} to {high}")


def read_secret(text: str, what: str) -> bytes:
    """Return the passphrase that `text` (`fd:N` or `file:PATH`) leads to, without the newline at its end.

    It is read here and now: going to the background closes the descriptor and leaves the folder of a relative path.
    """
    kind, _, place = text.partition(":")
    if kind not in ("fd", "file") or not place:
        raise UsageError(what, "expected fd:N or file:PATH; the passphrase itself would be seen by everybody here")
    try:
        fd = parse_count(place, what, 0, 1 << 20) if kind == "fd" else os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        with open(fd, "rb", buffering=0, closefd=kind == "file") as file:
            secret = b""
            while len(secret) <= MAX_SECRET + 1 and (piece := file.read(MAX_SECRET + 2)):
                secret += piece
    except OSError as error:
        raise UsageError(what, f"{text} cannot be read ({os.strerror(error.errno or 0)})") from error
    secret = secret.removesuffix(b"\n")
    if not 0 < len(secret) <= MAX_SECRET:
        raise UsageError(what, f"{text} holds no passphrase (1 to {MAX_SECRET} bytes)")
    return secret


@dataclass(frozen=True)
class Reserve:
    """Room on the leaf's file system that copies leave free, in bytes or in percent of the file system."""

    size: int | None = None
    percent: float | None = None


def parse_reserve(text: str, what: str) -> Reserve:
    """Return the reserve that `text` says: `2G`, or `10%`."""
    match = _PERCENT.fullmatch(text.strip())
    if not match:
        return Reserve(size=parse_size(text, what))
    if float(match[1]) > 100:
        raise UsageError(what, f"'{text}' is more than all of the file system")
    return Reserve(percent=float(match[1]))


@dataclass(frozen=True)
class DiskOptions:
    """How one disk behaves. Sizes are in bytes, times in seconds; a time of None is without end."""

    mode: Mode | None = None
    """None: as stored in the leaf, else `Mode.COR`."""
    readahead: int = 4 << 20
    """Most that a sequential miss fetches beyond what the guest asked for. 4 MiB hides 30 ms of round trip at 1 Gbit/s."""
    backing_timeout: float | None = 60.0
    """How long a read waits for an unreachable backing. Below the two minutes after which guests suspect their disk."""
    write_timeout: float | None = None
    """The same for a write. Without end: the kernel drops a cached write that is refused."""
    reserve: Reserve | None = None
    """None: the larger of 1 GiB and 5 %, at most half of what was free at mount."""
    window: int = 32 << 20
    """Most data in flight per backing: 1 Gbit/s over a quarter of a second."""


@dataclass(frozen=True)
class StreamOptions:
    """When and how fast the background copies. Rates are in bytes per second."""

    rate: int = 0
    """Cap; 0 for none."""
    floor: int = 1 << 20
    """Kept even when the machine is busy, so that streaming always ends; 0: idle time only."""
    finish_by: float | None = None
    """Seconds within which everything should be copied."""
    idle: Idle = Idle.AUTO


class Address(NamedTuple):
    """Where to listen by TCP; port 0: a free one."""

    host: str
    port: int


UNMOUNT_GRACE = 20.0
"""Seconds in which a hypervisor that starts right after the mount finds its disk."""


@dataclass(frozen=True)
class MountOptions:
    """Everything that `-o` can say (interface, "Mount options"). Made by `parse_mount_options`."""

    disk: DiskOptions = DiskOptions()
    stream: StreamOptions = StreamOptions()
    read_only: bool = False
    allow_other: bool = False
    allow_root: bool = False
    trust_backing: bool = False
    allow_backing: tuple[str, ...] = ()
    secret: bytes | None = field(default=None, repr=False)
    """The passphrase of encrypted backings."""
    connections: int | None = None
    """Per backing; None: what is usual with its transport."""
    unmount_grace: float | None = None
    """Unmount when all images are complete and closed, one that nobody has opened so many seconds after it came; None: never."""
    shared_cache: str = ""
    """Folder of the caches that leaves share; empty for none."""
    shared_cache_size: int = 0
    """Most bytes of all caches in it together; 0: only the reserve of their file system limits them."""
    metrics: Address | None = None
    """Where to tell how the images are doing; None: nowhere."""
    boot_profile: str = "auto"
    """`auto`, `off`, or the absolute path of the profile of all disks."""
    direct_io: DirectIO = DirectIO.AUTO
    poll: int = 30
    """Microseconds of adaptive polling for the next request; 0 for none. Longer gains nothing on a busy mount."""


class _Option(NamedTuple):
    """Where the value of one mount option goes and how it is read from its text; a `parse` of None: it takes no value.

    `bare` is what the name without a value means; None: it needs one.
    """

    record: str
    field: str
    parse: Callable[[str, str], Any] | None = None
    bare: Any = None


def _choice(kind: type[Enum]) -> Callable[[str, str], Enum]:
    return lambda text, what: parse_choice(kind, text, what)


def _between(low: int, high: int) -> Callable[[str, str], int]:
    return lambda text, what: parse_count(text, what, low, high)


def _sized(low: int, high: int) -> Callable[[str, str], int]:
    def parse(text: str, what: str) -> int:
        size = parse_size(text, what)
        if not low <= size <= high:
            raise UsageError(what, f"'{text}' is not between {low} and {high} bytes")
        return size

    return parse


def _timeout(text: str, what: str) -> float | None:
    return parse_duration(text, what) or None  # 0 waits for ever


def _folder(text: str, what: str) -> str:
    if not text:
        raise UsageError(what, "needs the path of a folder")
    return text


def _boot_profile(text: str, what: str) -> str:
    if not text:
        raise UsageError(what, "is none of auto, off, the path of a file")
    # Here and now: going to the background leaves the folder of a relative path.
    return text if text in ("auto", "off") else os.path.abspath(text)


def _address(text: str, what: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")) or not host.strip("[]"):
        raise UsageError(what, f"'{text}' is not of the form HOST:PORT (such as 127.0.0.1:9100)")
    return Address(host.strip("[]"), parse_count(port, what, 0, 65535))


_OPTIONS: Mapping[str, _Option] = {
    "ro": _Option("mount", "read_only"),
    "allow_other": _Option("mount", "allow_other"),
    "allow_root": _Option("mount", "allow_root"),
    "trust_backing": _Option("mount", "trust_backing"),
    "allow_backing": _Option("mount", "allow_backing", lambda text, what: (text,)),
    "secret": _Option("mount", "secret", read_secret),
    "connections": _Option("mount", "connections", _between(1, 64)),
    "shared_cache": _Option("mount", "shared_cache", _folder),
    "shared_cache_size": _Option("mount", "shared_cache_size", parse_size),
    "direct_io": _Option("mount", "direct_io", _choice(DirectIO)),
    "poll": _Option("mount", "poll", _between(0, 10_000)),
    "mode": _Option("disk", "mode", _choice(Mode)),
    "readahead": _Option("disk", "readahead", _sized(0, 64 << 20)),
    "backing_timeout": _Option("disk", "backing_timeout", _timeout),
    "write_timeout": _Option("disk", "write_timeout", _timeout),
    "reserve": _Option("disk", "reserve", parse_reserve),
    "window": _Option("disk", "window", _sized(64 << 10, 1 << 30)),
    "stream_rate": _Option("stream", "rate", parse_size),
    "stream_floor": _Option("stream", "floor", parse_size),
    "finish_by": _Option("stream", "finish_by", parse_duration),
    "idle": _Option("stream", "idle", _choice(Idle)),
    "unmount_when_complete": _Option("mount", "unmount_grace", parse_duration, bare=UNMOUNT_GRACE),
    "boot_profile": _Option("mount", "boot_profile", _boot_profile),
    "metrics": _Option("mount", "metrics", _address),
}

# fmt: off
_OTHERS = frozenset({
    "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "suid", "nosuid", "dev", "nodev",
    "exec", "noexec", "async", "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime",
    "lazytime", "nolazytime", "iversion", "noiversion", "mand", "nomand", "silent", "loud", "_netdev", "nofail",
    "default_permissions", "fsname", "subtype", "comment", "uhelper", "helper",
})
# fmt: on
"""Options of mount(8), fstab(5) and FUSE: not ours, or always so."""


def split_options(text: str) -> list[str]:
    """Return the parts of `a=b,c`; `\\,` is a comma inside a part."""
    return [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", text) if part]


def parse_mount_options(texts: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """Return the options that the `-o` arguments `texts` say; a later one wins, `allow_backing` adds up.

    `sloppy` ignores unknown options, as `mount -s` asks for.

    Raises:
        UsageError: an option is unknown, or its value is wrong.
    """
    values: dict[str, dict[str, Any]] = {"mount": {}, "disk": {}, "stream": {}}
    for part in (part for text in texts for part in split_options(text)):
        name, equals, value = part.partition("=")
        if name in _OTHERS or name.lower().startswith("x-"):
            if name == "rw":
                values["mount"].pop("read_only", None)
            continue
        if sloppy and name not in _OPTIONS:
            continue
        option = _find_option(name)
        if not equals and option.bare is not None:
            values[option.record][option.field] = option.bare
            continue
        if (option.parse is None) == bool(equals):
            raise UsageError(name, "takes no value" if equals else f"needs a value ('{name}=...')")
        if option.parse is None:
            values[option.record][option.field] = True
        elif name == "allow_backing":
            values["mount"][option.field] = (*values["mount"].get(option.field, ()), value)
        else:
            values[option.record][option.field] = option.parse(value, name)
    if values["mount"].get("allow_other") and values["mount"].get("allow_root"):
        raise UsageError("allow_root", "excludes 'allow_other'")
    return replace(
        MountOptions(**values["mount"]), disk=DiskOptions(**values["disk"]), stream=StreamOptions(**values["stream"])
    )


def _find_option(name: str) -> _Option:
    option = _OPTIONS.get(name)
    if option:
        return option
    near = difflib.get_close_matches(name, _OPTIONS, n=1)
    raise UsageError(name, "is not a mount option" + (f" (did you mean '{near[0]}'?)" if near else ""))
