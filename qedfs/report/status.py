"""What the images of a mount are doing: read from their extended attributes, shown as text or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qedfs.errors import NotMounted, UsageError, printable
from qedfs.report.mounted import is_mounted, read_attribute, read_attributes, read_some
from qedfs.report.sizes import size_text

_NUMBERS = {
    *("virtual_size", "cluster_size", "clusters_total", "clusters_data", "clusters_zero", "clusters_backing"),
    *("allocated_bytes", "stream_rate", "stream_floor", "rate", "backing_bytes_read"),
}
_NOT_STATUS = {"density", "stream_step"}
"""Readable attributes that say nothing about how things are going."""


@dataclass(frozen=True)
class ServedImage:
    """One image of a mount. `attributes` are those of the interface, by name."""

    path: str
    attributes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as numbers, where they are, and text."""
        values: dict[str, Any] = {"path": self.path}
        for name, value in self.attributes.items():
            if name in _NUMBERS and value.isdecimal():
                values[name] = int(value)
            elif name == "progress":
                values[name] = float(value)
            elif name not in _NOT_STATUS:
                values[name] = value
        return values


@dataclass(frozen=True)
class RefusedImage:
    """An image that a mount leaves out, and why."""

    path: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "state": "refused", "last_error": self.reason}


Status = ServedImage | RefusedImage


def read_status(path: str, names: Iterable[str] | None = None) -> list[Status]:
    """Return the status of one mounted disk, or of all images of the mount whose root is `path`.

    With `names` only these attributes are read, as far as they are there.

    Raises:
        NotMounted: it is neither, or no more.
        UsageError: the mount says something that cannot be understood.
    """

    def served(file: str) -> ServedImage:
        return ServedImage(file, read_attributes(file) if names is None else read_some(file, names))

    if not os.path.isdir(path):
        return [served(path)]
    found: list[Status] = []
    listed, refused = _listed(path)
    for name in listed:
        file = os.path.join(path, name)
        try:
            found.append(served(file))
        except NotMounted:
            # Removed since the list was made, if the mount itself is still there.
            if not is_mounted(path):
                raise
    return [*found, *refused]


def _listed(mountpoint: str) -> tuple[list[str], list[RefusedImage]]:
    """Return what a mount says it serves, by name, and what it leaves out."""
    text = read_attribute(mountpoint, "status")
    try:
        report = json.loads(text)
        names = [str(leaf["name"]) for leaf in report["leaves"]]
        return names, [RefusedImage(str(entry["path"]), str(entry["reason"])) for entry in report["refused"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(mountpoint, "the mount's status cannot be understood (another version of qedfs?)") from error


def status_text(images: Iterable[Status]) -> str:
    """Return a table with a line for each image, its newest error below it; control characters are escaped."""
    rows: list[tuple[str, ...]] = [("IMAGE", "MODE", "STATE", "PROGRESS", "LOCAL", "SIZE", "BACKING")]
    errors: dict[int, str] = {}
    for image in images:
        if isinstance(image, RefusedImage):
            rows.append((image.path, "-", "refused", "-", "-", "-", "-"))
            errors[len(rows) - 1] = image.reason
            continue
        values = image.attributes
        local = values.get("allocated_bytes", "")
        rows.append(
            (
                image.path,
                values.get("mode", "-"),
                values.get("state", "-"),
                f"{values['progress']} %" if "progress" in values else "-",
                size_text(int(local)) if local.isdecimal() else "-",
                size_text(int(values.get("virtual_size", 0))),
                values.get("backing") or "-",
            )
        )
        if values.get("last_error"):
            errors[len(rows) - 1] = values["last_error"]
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
        if number in errors:
            lines.append(f"    {printable(errors[number])}")
    return "\n".join(lines)
