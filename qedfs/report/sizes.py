"""How numbers of bytes are written for people."""

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
