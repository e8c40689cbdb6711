"""Which parts of an image are in it: as runs, as the fields of `qemu-img map`, as a picture."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

import numpy as np

from qedfs.image.image import Image
from qedfs.image.tables import Run, State
from qedfs.report import png

_WORDS = {State.DATA: "data", State.ZERO: "zero", State.BACKING: "backing"}
_SHADES = " ░▒▓█"
DATA, ZERO, BACKING = np.array([[0, 68, 136]]), np.array([[153, 187, 221]]), np.array([[238, 238, 238]])
"""Colours of states, red, green, blue: dark, medium and very light, also for those who see no colours."""
SQUARE = 4
"""Pixels of a place of the PNG, in both directions."""


async def joined_runs(image: Image) -> AsyncGenerator[Run, None]:
    """Yield the runs of the whole disk, neighbours of one state (data: that follow each other in the file too) as one.

    Use it inside `contextlib.aclosing` unless it is read to its end.

    Raises:
        CorruptEntry, LeafError: a table cannot be read or an entry is invalid; what came before is right.
    """
    before: Run | None = None
    async with aclosing(image.stored().runs()) as runs:
        async for run in runs:
            if before is not None and _continues(before, run):
                before = before._replace(length=before.length + run.length)
                continue
            if before is not None:
                yield before
            before = run
    if before is not None:
        yield before


def run_text(run: Run) -> str:
    """Return `start length state`, and the offset in the file of data."""
    line = f"{run.pos:<16} {run.length:<16} {_WORDS[run.state]}"
    return f"{line} {run.offset}" if run.state is State.DATA else line


def run_json(run: Run, *, has_backing: bool) -> str:
    """Return the run with the fields of `qemu-img map --output=json`.

    The backing is not looked into: what would come from it counts as data of depth 1.
    """
    fields: dict[str, Any] = {"start": run.pos, "length": run.length}
    if run.state is State.BACKING:
        fields |= {"depth": int(has_backing), "present": has_backing, "zero": not has_backing, "data": has_backing}
    else:
        data = run.state is State.DATA
        fields |= {"depth": 0, "present": True, "zero": not data, "data": data}
        if data:
            fields["offset"] = run.offset
    return json.dumps(fields)


class Picture:
    """The disk as `cells` places: how much of each is in the image. As characters, each the darker the more it is."""

    def __init__(self, size: int, cells: int) -> None:
        self._size = size
        self._local = [0.0] * cells
        self._data = [0.0] * cells

    def add(self, run: Run) -> None:
        """Note a run of the disk."""
        if run.state is State.BACKING or not self._size:
            return
        cells = len(self._local)
        pos, end = run.pos, run.pos + run.length
        for cell in range(pos * cells // self._size, min(cells, -(-end * cells // self._size))):
            start, stop = cell * self._size / cells, (cell + 1) * self._size / cells
            share = max(0.0, min(end, stop) - max(pos, start)) / (stop - start)
            self._local[cell] += share
            self._data[cell] += share if run.state is State.DATA else 0.0

    def lines(self, width: int) -> Iterable[str]:
        """Yield the picture in lines of `width` characters."""
        for first in range(0, len(self._local), width):
            yield "".join(_shade(local) for local in self._local[first : first + width])

    def png(self, width: int) -> bytes:
        """Return the picture as a PNG of `width` places in a row: each a square in the mixture of the colours of its states."""
        data = np.clip(self._data, 0, 1)[:, None]
        zero = np.clip(self._local, 0, 1)[:, None] - data
        colours = np.round(data * DATA + zero * ZERO + (1 - data - zero) * BACKING).astype(np.uint8)
        squares = colours.reshape(-1, width, 3).repeat(SQUARE, axis=0).repeat(SQUARE, axis=1)
        return png.encode(squares)


def _shade(local: float) -> str:
    # The lightest and the darkest stand for nothing and everything only.
    if local <= 0:
        return _SHADES[0]
    if local >= 1 - 1e-9:
        return _SHADES[-1]
    return _SHADES[1 + min(len(_SHADES) - 3, int(local * (len(_SHADES) - 2)))]


def _continues(before: Run, run: Run) -> bool:
    if before.state is not run.state:
        return False
    return run.state is not State.DATA or before.offset + before.length == run.offset
