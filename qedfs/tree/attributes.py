"""The extended attributes of a file: name -> how it is read, how it is written (interface, "Extended attributes").

Values are ASCII text, but for paths and names of backings, which are the bytes the system uses.
The limits of streaming may be set by whoever may write the file, but beyond those of the mount's options only by root and
the user who mounted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from qedfs.config import Mode, parse_choice, parse_duration, parse_size
from qedfs.errors import UsageError
from qedfs.tree.errors import AttributeAccess, NoSuchAttribute, NotPermitted, NotSupported
from qedfs.tree.leaf import DropPages, Leaf

PREFIX = b"user.qedfs."
_SECTOR = 512

Reader = Callable[[Leaf], Awaitable[str]]


class Caller(NamedTuple):
    """Who sets an attribute of a file: `privileged` is root, or the user who mounted.

    `drop_pages` empties the kernel's cache of the file.
    """

    privileged: bool
    drop_pages: DropPages


Writer = Callable[[Leaf, str, Caller], Awaitable[None]]


class Attribute(NamedTuple):
    """Without `read` it is write-only, without `write` read-only."""

    read: Reader | None
    write: Writer | None = None


async def read_attribute(leaf: Leaf, name: bytes) -> bytes:
    """Return the value of the attribute `name` (with its prefix).

    Raises:
        NoSuchAttribute: there is none of this name.
        AttributeAccess: it can only be written.
    """
    attribute = _find(name)
    if attribute.read is None:
        raise AttributeAccess(os.fsdecode(name), "can only be written")
    return os.fsencode(await attribute.read(leaf))


async def nothing_cached() -> None:
    """Drop what the kernel has cached where no kernel is."""


async def write_attribute(
    leaf: Leaf, name: bytes, value: bytes, uid: int, drop_pages: DropPages = nothing_cached
) -> None:
    """Set the attribute `name` (with its prefix) for the user `uid`; `drop_pages` empties the kernel's cache of the file.

    Raises:
        NotSupported: the name is in a namespace that is not ours to keep (`security.`, `trusted.`, `system.`).
        NoSuchAttribute: there is none of this name.
        AttributeAccess: it can only be read.
        UsageError: the value is not one that it can have.
        NotPermitted: the value is for root and the mounter only.
    """
    attribute = _find(name, writing=True)
    if attribute.write is None:
        raise AttributeAccess(os.fsdecode(name), "can only be read")
    # A shell's `echo 1 | …` and C programs that count the terminating NUL mean the same value.
    text = value.rstrip(b"\0\n").decode("ascii", "backslashreplace")
    await attribute.write(leaf, text, Caller(uid in (0, os.getuid()), drop_pages))


def readable_names() -> list[bytes]:
    """The names, with their prefix, that can be read."""
    return [PREFIX + name for name, attribute in ATTRIBUTES.items() if attribute.read]


def refuse_removal(name: bytes) -> None:
    """Raise what the removal of an attribute deserves: none can be removed."""
    _find(name, writing=True)
    raise AttributeAccess(os.fsdecode(name), "cannot be removed")


def _find(name: bytes, *, writing: bool = False) -> Attribute:
    attribute = ATTRIBUTES.get(name[len(PREFIX) :]) if name.startswith(PREFIX) else None
    if attribute is not None:
        return attribute
    if writing and not name.startswith(b"user."):
        raise NotSupported(os.fsdecode(name), "attributes of this namespace are not kept")
    raise NoSuchAttribute(os.fsdecode(name), "no such attribute")


async def _virtual_size(leaf: Leaf) -> str:
    return str(leaf.disk.size)


async def _cluster_size(leaf: Leaf) -> str:
    return str(leaf.disk.cluster_size)


async def _clusters_total(leaf: Leaf) -> str:
    return str(leaf.disk.statistics().clusters_total)


async def _clusters_data(leaf: Leaf) -> str:
    return str((await leaf.disk.counts()).data)


async def _clusters_zero(leaf: Leaf) -> str:
    return str((await leaf.disk.counts()).zero)


async def _clusters_backing(leaf: Leaf) -> str:
    counts = await leaf.disk.counts()
    return str(leaf.disk.statistics().clusters_total - counts.data - counts.zero)


async def _allocated_bytes(leaf: Leaf) -> str:
    counts = await leaf.disk.counts()
    if not leaf.disk.statistics().backing:
        return str(leaf.disk.size)  # what is nowhere reads as zeros
    return str(min(leaf.disk.size, (counts.data + counts.zero) * leaf.disk.cluster_size))


async def _progress(leaf: Leaf) -> str:
    counts = await leaf.disk.counts()
    facts = leaf.disk.statistics()
    return progress(counts.data + counts.zero if facts.backing else facts.clusters_total, facts.clusters_total)


def progress(local: int, total: int) -> str:
    """Return what part of `total` clusters is `local`, in percent with two decimals; 100.00 only when all are."""
    return f"{math.floor(10000 * local / total) / 100:.2f}" if local < total else "100.00"


async def _mode(leaf: Leaf) -> str:
    return leaf.disk.statistics().mode.value


async def _set_mode(leaf: Leaf, text: str, caller: Caller) -> None:
    await leaf.disk.set_mode(parse_choice(Mode, text, "mode"))


async def _state(leaf: Leaf) -> str:
    return leaf.stream.state(leaf.disk.statistics().state)


async def _hold(leaf: Leaf) -> str:
    return "1" if leaf.disk.held else "0"


async def _release_hold(leaf: Leaf, text: str, caller: Caller) -> None:
    if text != "0":
        raise UsageError("hold", "can only be set to 0")
    await leaf.disk.release_hold(caller.drop_pages)


async def _paused(leaf: Leaf) -> str:
    return "1" if leaf.stream.paused else "0"


async def _set_paused(leaf: Leaf, text: str, caller: Caller) -> None:
    if text not in ("0", "1"):
        raise UsageError("paused", f"'{text}' is neither 0 nor 1")
    leaf.stream.paused = text == "1"


async def _stream_rate(leaf: Leaf) -> str:
    return str(leaf.stream.rate_limit)


async def _set_stream_rate(leaf: Leaf, text: str, caller: Caller) -> None:
    rate, most = parse_size(text, "stream_rate"), leaf.options.rate
    if most and not 0 < rate <= most:
        _refuse_unless_privileged(caller, "stream_rate", f"more than {most} bytes/s")
    leaf.stream.set_limits(rate=rate)


async def _stream_floor(leaf: Leaf) -> str:
    return str(leaf.stream.floor)


async def _set_stream_floor(leaf: Leaf, text: str, caller: Caller) -> None:
    floor = parse_size(text, "stream_floor")
    if floor > leaf.options.floor:
        _refuse_unless_privileged(caller, "stream_floor", f"more than {leaf.options.floor} bytes/s")
    leaf.stream.set_limits(floor=floor)


async def _finish_by(leaf: Leaf) -> str:
    return "" if leaf.stream.finish_by is None else f"{leaf.stream.finish_by:g}"


async def _set_finish_by(leaf: Leaf, text: str, caller: Caller) -> None:
    seconds = (parse_duration(text, "finish_by") or None) if text.strip() else None
    if seconds is not None and (leaf.options.finish_by is None or seconds < leaf.options.finish_by):
        _refuse_unless_privileged(caller, "finish_by", "a promise that raises the floor of the mount's options")
    leaf.stream.set_finish_by(seconds)


def _refuse_unless_privileged(caller: Caller, name: str, what: str) -> None:
    if not caller.privileged:
        raise NotPermitted(name, f"{what} can be set by root and by the user who mounted only")


async def _rate(leaf: Leaf) -> str:
    return str(int(leaf.stream.rate))


async def _eta(leaf: Leaf) -> str:
    return "" if leaf.stream.eta is None else str(math.ceil(leaf.stream.eta))


async def _stream_step(leaf: Leaf) -> str:
    return str(leaf.step.sectors)


async def _set_stream_step(leaf: Leaf, text: str, caller: Caller) -> None:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 1 << 63):
        raise UsageError("stream_step", f"'{text}' is not a sector number")
    sector = int(text)
    leaf.step.sectors = await leaf.disk.stream(sector * _SECTOR) // _SECTOR


async def _backing(leaf: Leaf) -> str:
    return leaf.disk.statistics().backing


async def _backing_state(leaf: Leaf) -> str:
    return "damaged" if leaf.stream.damaged else leaf.disk.statistics().backing_state


async def _backing_format(leaf: Leaf) -> str:
    return leaf.disk.statistics().backing_format


async def _backing_bytes_read(leaf: Leaf) -> str:
    return str(leaf.disk.statistics().backing_bytes_read)


async def _density(leaf: Leaf) -> str:
    return ",".join(f"{round(percent, 2):g}" for percent in await leaf.disk.density())


async def _prefetch(leaf: Leaf, text: str, caller: Caller) -> None:
    words = text.split()
    if len(words) != 2:
        raise UsageError("prefetch", f"'{text}' is not 'offset length' in bytes")
    pos, length = (parse_size(word, "prefetch") for word in words)
    leaf.disk.prefetch(pos, length)


async def _last_error(leaf: Leaf) -> str:
    return leaf.disk.statistics().last_error


async def _leaf(leaf: Leaf) -> str:
    return leaf.path


ATTRIBUTES: Mapping[bytes, Attribute] = {
    b"virtual_size": Attribute(_virtual_size),
    b"cluster_size": Attribute(_cluster_size),
    b"clusters_total": Attribute(_clusters_total),
    b"clusters_data": Attribute(_clusters_data),
    b"clusters_zero": Attribute(_clusters_zero),
    b"clusters_backing": Attribute(_clusters_backing),
    b"allocated_bytes": Attribute(_allocated_bytes),
    b"progress": Attribute(_progress),
    b"mode": Attribute(_mode, _set_mode),
    b"state": Attribute(_state),
    b"hold": Attribute(_hold, _release_hold),
    b"paused": Attribute(_paused, _set_paused),
    b"stream_rate": Attribute(_stream_rate, _set_stream_rate),
    b"stream_floor": Attribute(_stream_floor, _set_stream_floor),
    b"finish_by": Attribute(_finish_by, _set_finish_by),
    b"rate": Attribute(_rate),
    b"eta": Attribute(_eta),
    b"backing": Attribute(_backing),
    b"backing_format": Attribute(_backing_format),
    b"backing_bytes_read": Attribute(_backing_bytes_read),
    b"density": Attribute(_density),
    b"prefetch": Attribute(None, _prefetch),
    b"stream_step": Attribute(_stream_step, _set_stream_step),
    b"last_error": Attribute(_last_error),
    b"backing_state": Attribute(_backing_state),
    b"leaf": Attribute(_leaf),
}
