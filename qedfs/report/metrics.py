"""How the images of a mount are, in Prometheus's text format (version 0.0.4). Sans-IO.

Names are `qedfs_…` in base units; what only grows ends in `_total`. What is one of several words is a series for each word, 1 for
the present one. A value that nobody knows yet is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MODES = ("cow", "cor", "stream")
STATES = (
    *("passive", "held", "idle-wait", "streaming", "paused"),
    *("backing-error", "no-space", "failed", "complete"),
)
BACKING_STATES = ("idle", "healthy", "unavailable", "refused", "damaged")


@dataclass(frozen=True)
class ImageMetrics:
    """One image now. Sizes are in bytes, times in seconds; None: not known. `mode`, `state` and `backing_state` as in the interface."""

    name: str
    size: int
    missing: int | None
    allocated: int
    mode: str
    state: str
    backing_state: str
    handles: int
    backing_bytes: int
    asked_twice: int
    copied: int
    misses: int
    missed_seconds: float
    waiting: int
    errors: int
    rate: float
    eta: float | None


class _Family(NamedTuple):
    name: str
    kind: str
    help: str
    value: str
    """The field of `ImageMetrics`."""
    words: tuple[str, ...] = ()
    """What the field may be, where it is a word."""


_FAMILIES = (
    _Family("disk_size_bytes", "gauge", "Size of the disk.", "size"),
    _Family("disk_missing_bytes", "gauge", "Bytes of the disk that are not in the leaf.", "missing"),
    _Family("disk_allocated_bytes", "gauge", "Bytes of data clusters in the leaf.", "allocated"),
    _Family("disk_mode", "gauge", "The mode: 1 for the present one.", "mode", MODES),
    _Family("disk_state", "gauge", "The state: 1 for the present one.", "state", STATES),
    _Family(
        "disk_backing_state", "gauge", "How the backing is: 1 for the present one.", "backing_state", BACKING_STATES
    ),
    _Family("disk_open_handles", "gauge", "How many times the disk is open.", "handles"),
    _Family("disk_backing_read_bytes_total", "counter", "Bytes asked of the backing.", "backing_bytes"),
    _Family("disk_backing_stragglers_total", "counter", "Requests to the backing made a second time.", "asked_twice"),
    _Family("disk_copied_bytes_total", "counter", "Bytes copied from the backing into the leaf.", "copied"),
    _Family("disk_backing_waits_total", "counter", "Requests, or parts of one, that waited for the backing.", "misses"),
    _Family("disk_backing_wait_seconds_total", "counter", "How long they waited, together.", "missed_seconds"),
    _Family("disk_backing_waiting", "gauge", "Requests, or parts of one, that wait for the backing now.", "waiting"),
    _Family("disk_errors_total", "counter", "Errors of the leaf or the backing.", "errors"),
    _Family("disk_copy_rate_bytes_per_second", "gauge", "Rate of copying over the last seconds.", "rate"),
    _Family("disk_eta_seconds", "gauge", "Time until the image is complete.", "eta"),
)


def metrics_text(version: str, images: Sequence[ImageMetrics], refused: int) -> Iterator[str]:
    """Yield, in parts of a few hundred microseconds' work for 50 images, what a scrape gets.

    That is the version of qedfs, each image, and how many images the mount has left out.
    """
    lines = [
        *_head("build_info", "gauge", "The version of qedfs."),
        f'qedfs_build_info{{version="{_escaped(version)}"}} 1',
        *_head("disks", "gauge", "Disks that are served."),
        f"qedfs_disks {len(images)}",
        *_head("refused_images", "gauge", "Images that could not be served."),
        f"qedfs_refused_images {refused}",
    ]
    yield "\n".join(lines) + "\n"
    for family in _FAMILIES:
        lines = [*_head(family.name, family.kind, family.help)]
        for image in images:
            lines += _samples(family, image)
        yield "\n".join(lines) + "\n"


def _head(name: str, kind: str, help_: str) -> tuple[str, str]:
    return f"# HELP qedfs_{name} {help_}", f"# TYPE qedfs_{name} {kind}"


def _samples(family: _Family, image: ImageMetrics) -> list[str]:
    value = getattr(image, family.value)
    disk = f'disk="{_escaped(image.name)}"'
    if family.words:
        word = family.name.rpartition("_")[2]  # mode or state
        return [f'qedfs_{family.name}{{{disk},{word}="{w}"}} {int(w == value)}' for w in family.words]
    return [] if value is None else [f"qedfs_{family.name}{{{disk}}} {_number(value)}"]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")


def _escaped(text: str) -> str:
    """Return `text` as the value of a label: valid UTF-8, on one line."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
