"""Pictures as PNG files (ISO/IEC 15948): 8 bits a colour, no filter, which flat squares do not need. Sans-IO."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUECOLOUR, _DEFLATE, _FILTERS, _NOT_INTERLACED = 2, 0, 0, 0


def encode(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return the PNG of `pixels`, of the shape (height, width, 3): red, green and blue."""
    height, width, _ = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, _TRUECOLOUR, _DEFLATE, _FILTERS, _NOT_INTERLACED)
    # Each row begins with the number of its filter; 0 is none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, 3 * width)], axis=1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
