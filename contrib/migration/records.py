"""The records that the guest writes, in numpy: what must be on its disk after so many of them. `recorder.c` says it in C."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

SLOT = 4096
WORDS = SLOT // 8
HEAD = 3
_PIECE = 1024
"""Slots that are looked at at once: 4 MiB."""

Words = npt.NDArray[np.uint64]


def mix(x: Words) -> Words:
    """Return splitmix64 of each word."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def newest(seed: int, slots: int, records: int) -> Words:
    """Return for each slot the number of the last record in it after `records` have been written."""
    numbers = np.arange(1, records + 1, dtype=np.uint64)
    last = np.zeros(slots, np.uint64)
    np.maximum.at(last, slots_of(seed, slots, numbers), numbers)
    return last


def slots_of(seed: int, slots: int, numbers: Words) -> npt.NDArray[np.intp]:
    """Return the slot of each record."""
    return (mix(mix(_words(seed)) ^ numbers) % np.uint64(slots)).astype(np.intp)


def contents(seed: int, first: int, numbers: Words) -> Words:
    """Return the words of slots from `first` on, one a row, that hold the records `numbers`."""
    slots = np.arange(first, first + len(numbers), dtype=np.uint64)
    keys = mix(mix(mix(_words(seed)) ^ slots) ^ numbers)
    words = mix(keys[:, None] + np.arange(WORDS, dtype=np.uint64)[None, :])
    words[:, 0], words[:, 1], words[:, 2] = np.uint64(seed), slots, numbers
    return words


def make_disk(path: Path, seed: int, slots: int) -> None:
    """Write the disk as the guest finds it: record 0 in each slot."""
    with path.open("wb") as file:
        for first in range(0, slots, _PIECE):
            count = min(_PIECE, slots - first)
            file.write(contents(seed, first, np.zeros(count, np.uint64)).astype("<u8").tobytes())


def judge(path: Path, seed: int, slots: int, records: int, *, in_doubt: bool) -> list[str]:
    """Return what is wrong with the raw disk `path` after `records` acknowledged records: a line for each wrong slot.

    `in_doubt`: the guest was killed, so one more record may be there or not.
    """
    wrong = []
    last = newest(seed, slots, records)
    doubt = int(slots_of(seed, slots, np.array([records + 1], np.uint64))[0]) if in_doubt else -1
    with path.open("rb") as file:
        for first in range(0, slots, _PIECE):
            numbers = last[first : first + _PIECE]
            found = np.frombuffer(file.read(len(numbers) * SLOT), "<u8").astype(np.uint64).reshape(-1, WORDS)
            for row in np.nonzero((found != contents(seed, first, numbers)).any(axis=1))[0]:
                slot = first + int(row)
                unacknowledged = contents(seed, slot, np.array([records + 1], np.uint64))[0]
                if slot != doubt or (found[row] != unacknowledged).any():
                    wrong.append(f"slot {slot} has record {found[row][2]} of slot {found[row][1]}, not {numbers[row]}")
    return wrong


def _words(value: int) -> Words:
    return np.array([value], np.uint64)
