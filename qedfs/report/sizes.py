"""How sizes, rates and times are written for people."""

from __future__ import annotations


def size_text(size: int) -> str:
    """Return `size` bytes in the largest unit of which there is at least one: `1.5 GiB`, `512 B`, `64 KiB`."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def exact_size_text(size: int) -> str:
    """Return `size` bytes for people and to the byte: `1 GiB (1073741824 bytes)`."""
    return f"{size_text(size)} ({size} bytes)"


def rate_text(rate: float) -> str:
    """Return `rate`, in bytes per second, as a size per second: `85 MiB/s`."""
    return f"{size_text(round(rate))}/s"


def duration_text(seconds: float) -> str:
    """Return a time in its two largest units: `2 d 3 h`, `1 min 40 s`, `45 s`; less than a second is `0 s`."""
    left = int(seconds)
    words: list[str] = []
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        amount, left = divmod(left, length)
        if amount and len(words) < 2:
            words.append(f"{amount} {unit}")
        elif words:
            break
    return " ".join(words) or "0 s"
