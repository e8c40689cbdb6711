"""All images of a mount in one line, for those who look at many services at once. Sans-IO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qedfs.report.sizes import duration_text, rate_text

_TROUBLES = {"backing-error": "without its backing", "no-space": "without room for copies", "failed": "failed"}


@dataclass(frozen=True)
class Image:
    """One image now: `state` as in the interface, `size` and what is `missing` of it in bytes, `rate` in bytes per second.

    `streams` tells whether it is to become complete; `missing` and `eta` (seconds) are None while nobody knows.
    """

    name: str
    state: str
    streams: bool
    size: int
    missing: int | None
    rate: float
    eta: float | None


def summary(images: Iterable[Image]) -> str:
    """Return for instance `3 images, 1 complete; streaming 2: 45.1 % local, 85 MiB/s, 2 min 10 s left; vm3.raw: failed`."""
    images = list(images)
    complete = sum(image.state == "complete" for image in images)
    counts = "1 image" if len(images) == 1 else f"{len(images)} images"
    parts = [f"{counts}, {complete} complete" if complete else counts]
    streaming = [image for image in images if image.streams and image.state != "complete"]
    if streaming:
        parts.append(f"streaming {len(streaming)}{_progress(streaming)}")
    parts += [f"{image.name}: {_TROUBLES[image.state]}" for image in images if image.state in _TROUBLES]
    return "; ".join(parts)


def _progress(images: list[Image]) -> str:
    words = []
    if all(image.missing is not None for image in images):
        missing, size = sum(image.missing or 0 for image in images), sum(image.size for image in images)
        # Never 100.0 while something is missing.
        words.append(f"{int(1000 * (size - missing) / size) / 10 if size else 0:.1f} % local")
    if rate := round(sum(image.rate for image in images)):
        words.append(rate_text(rate))
        if all(image.eta is not None for image in images):
            words.append(f"{duration_text(max(image.eta or 0 for image in images))} left")
    return f": {', '.join(words)}" if words else ""
