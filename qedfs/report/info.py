"""What an image says of itself, and what is found of its chain on this machine. Nothing remote is contacted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import trio

from qedfs.backing.foreign import HEAD, format_by_magic, inspect, known_format
from qedfs.backing.location import FileLocation, Location, masked, parse_location
from qedfs.errors import QedfsError, printable
from qedfs.image import header as headers
from qedfs.image import record as records
from qedfs.image.header import Header
from qedfs.image.image import Image
from qedfs.image.record import Pin, Record
from qedfs.image.storage import FileStorage, Storage, open_storage
from qedfs.image.tables import Counts
from qedfs.report.sizes import exact_size_text, size_text

COUNTING_TIME = 1.0
"""Seconds given to counting clusters; the largest images are shown without the counts."""
MAX_LEVELS = 64


@dataclass(frozen=True)
class Level:
    """One backing of the chain. `problem` says why nothing more is known of it; `size` is that of its disk, in bytes."""

    name: str
    format: str
    size: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Description:
    """An image as its header, its record and its tables tell it. `allocated` is in bytes on the file system.

    `backing_name` is masked; `pin` is what the backing was when it was chosen.
    """

    path: str
    header: Header
    backing_name: str
    pin: Pin | None
    record: Record
    record_damaged: bool
    allocated: int
    counts: Counts | None
    problem: str
    chain: tuple[Level, ...]

    @property
    def mode(self) -> str:
        return self.record.mode or "cor"


async def describe(image: Image) -> Description:
    """Look at an open image and at what of its chain is local.

    Raises:
        LeafError: it cannot be read.
    """
    counts: Counts | None = None
    with trio.move_on_after(COUNTING_TIME):
        await image.survey()
        counts = await image.counts()
    pin = image.record.pin_of(image.backing_name) if image.backing_name else None
    told = "raw" if image.header.backing_is_raw else pin.format if pin else ""
    chain = await _chain(image.name, image.backing_name, told) if image.backing_name else ()
    return Description(
        image.name,
        image.header,
        masked(image.backing_name) if image.backing_name else "",
        pin,
        image.record,
        image.record_damaged,
        _allocated(image.storage),
        counts,
        image.survey_problem,
        chain,
    )


def _allocated(storage: Storage) -> int:
    if isinstance(storage, FileStorage):
        return os.fstat(storage.fd).st_blocks * 512
    return storage.length()


async def _chain(image: str, name: str, told: str) -> tuple[Level, ...]:
    levels: list[Level] = []
    here: Location = FileLocation(image)
    while name and len(levels) < MAX_LEVELS:
        try:
            # As when it is opened: a link to an image does not move its relative names.
            if isinstance(here, FileLocation) and await trio.to_thread.run_sync(os.path.islink, here.path):
                here = FileLocation(await trio.to_thread.run_sync(os.path.realpath, here.path))
            here = parse_location(name, here)
        except QedfsError as error:
            return (*levels, Level(masked(name), told, problem=error.why))
        if not isinstance(here, FileLocation):
            return (*levels, Level(masked(name), told, problem="not looked at: it is not a local file"))
        try:
            level, name, told = await _look(here.path, told)
        except QedfsError as error:
            return (*levels, Level(here.path, told, problem=error.why))
        levels.append(level)
    return tuple(levels)


async def _look(path: str, told: str) -> tuple[Level, str, str]:
    """Return a local level, and name and format of what lies below it."""
    storage = await open_storage(path, writable=False, lock=False)
    try:
        length = storage.length()
        start = bytes(await storage.read(0, min(length, headers.SIZE)))
        if not told and not start.startswith(headers.MAGIC):
            told = format_by_magic(start) or "raw"
        if told == "raw":
            return Level(path, "raw", length), "", ""
        if told not in ("", "qed"):
            head = bytes(await storage.read(0, min(length, HEAD)))
            foreign = inspect(known_format(told, path), head, path)
            return Level(path, told, foreign.size), foreign.backing, foreign.backing_format or ""
        header = headers.decode(start, length, path)
        below = ""
        if header.has_backing:
            raw = await storage.read(header.backing_name_offset, header.backing_name_size)
            below = headers.decode_backing_name(bytes(raw))
        return Level(path, "qed", header.image_size), below, "raw" if header.backing_is_raw else ""
    finally:
        await storage.aclose()


def info_json(description: Description) -> dict[str, Any]:
    """Return the fields of `qemu-img info --output=json`, and ours."""
    header, record, pin = description.header, description.record, description.pin
    fields: dict[str, Any] = {
        "filename": description.path,
        "format": "qed",
        "virtual-size": header.image_size,
        "actual-size": description.allocated,
        "cluster-size": header.geometry.cluster_size,
        "table-size": header.geometry.table_clusters,
        "dirty-flag": header.needs_check,
        "mode": description.mode,
        "hold": record.hold,
        "record-damaged": description.record_damaged,
    }
    if description.counts is not None:
        fields["clusters"] = _clusters(description, description.counts)
    if description.problem:
        fields["problem"] = description.problem
    if description.backing_name:
        fields["backing-filename"] = description.backing_name
        fields["full-backing-filename"] = _from_here(description.backing_name, description.path)
        if header.backing_is_raw:
            fields["backing-filename-format"] = "raw"
        if pin:
            fields["backing-pin"] = {"format": pin.format, "size": pin.size, "tag": pin.tag}
        fields["chain"] = [
            {
                "filename": level.name,
                "format": level.format or None,
                "virtual-size": level.size,
                "problem": level.problem or None,
            }
            for level in description.chain
        ]
    return fields


def _from_here(name: str, image: str) -> str:
    """Return the `name` that `image` gives its backing as it is called from where `image` is called so, by QEMU's rule."""
    has_protocol = ":" in name.partition("/")[0]
    return name if has_protocol else os.path.join(os.path.dirname(image), name)


def _clusters(description: Description, counts: Counts) -> dict[str, int]:
    total = description.header.geometry.clusters(description.header.image_size)
    zero = counts.zero if description.backing_name else total - counts.data  # what is nowhere reads as zeros
    return {"total": total, "data": counts.data, "zero": zero, "backing": total - counts.data - zero}


def info_text(description: Description) -> str:
    """Return a line for each thing worth knowing, with control characters escaped."""
    header, record, pin = description.header, description.record, description.pin
    lines = [
        f"image: {description.path}",
        "file format: qed",
        f"virtual size: {exact_size_text(header.image_size)}",
        f"disk size: {size_text(description.allocated)}",
        f"cluster size: {header.geometry.cluster_size}",
        f"table size: {header.geometry.table_clusters}",
    ]
    if description.counts is not None:
        lines.append("clusters: {total} ({data} data, {zero} zero, {backing} not here)".format_map(
            _clusters(description, description.counts)
        ))  # fmt: skip
    lines.append(f"mode: {description.mode}" + ("" if record.mode else " (the default; none is stored)"))
    if record.hold:
        lines.append("held: yes, until 'hold' is set to 0")
    if header.needs_check:
        lines.append("dirty: yes, it was not closed in good order")
    if description.record_damaged:
        lines.append("warning: qedfs's record in the header is damaged: mode, hold and pin are not known")
    if description.problem:
        lines.append(f"warning: {description.problem}")
    if description.backing_name:
        lines.append(f"backing: {description.backing_name}")
        lines.append(f"backing pin: {_pin_text(pin, has_room=records.fits(header))}")
        lines += [f"chain {number}: {_level_text(level)}" for number, level in enumerate(description.chain, 1)]
    return "\n".join(map(printable, lines))


def _pin_text(pin: Pin | None, *, has_room: bool) -> str:
    if not has_room:
        return "warning: its header has no room for one; a backing that changes will go unnoticed"
    if pin is None:
        return "none yet (the first writable mount sets it)"
    return f"{pin.format}, {exact_size_text(pin.size)}" + (f", {pin.tag}" if pin.tag else "")


def _level_text(level: Level) -> str:
    parts = [level.name, level.format or "format not known"]
    if level.size is not None:
        parts.append(exact_size_text(level.size))
    return ", ".join(parts) + (f" ({level.problem})" if level.problem else "")
