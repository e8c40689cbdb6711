"""Every state that a power cut may leave of a file, from the log of what was done to it.

Between two flushes the kernel may bring any part of what was written to the disk, in any order; a sector of 512 bytes
comes whole or not at all. So a *window* runs from where one flush began to where the next one ended, and its states are
the product of independent choices:

- each sector that a write concerns: as it was, or one of the versions written to it;
- each hole punched (whole blocks of the file system): there or not;
- the length: as it was, or what a write past the end or a truncate made of it, with zeros where no data followed.

Choices that cannot be seen (a sector written with what it held) are left out, equal states are made once. A window with
at most `limit` combinations is gone through completely, else: nothing, everything, each prefix, each choice alone, all
without each, and seeded samples.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from qedfs.image.geometry import SECTOR
from tests.image.memory_storage import Operation


class State(NamedTuple):
    """A file after a power cut that may have come after any number of operations from `first` to `last`."""

    content: bytes
    first: int
    last: int


class _Atom(NamedTuple):
    """What comes to the disk whole or not at all: the operation's number, and bytes at `offset`, or a length."""

    number: int
    offset: int
    data: bytes
    length: int = -1


_Choice = tuple[_Atom | None, ...]


@dataclass
class Window:
    """What lies between two flushes: the operations `[begin, end)` of the log over `content`.

    `since` operations had ended when the first of the two flushes had.
    """

    content: bytes
    log: Sequence[Operation]
    begin: int
    since: int
    end: int
    choices: list[_Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        pending = [(n, self.log[n]) for n in range(self.begin, self.end) if self.log[n].kind != "flush"]
        self.choices = _choices(self.content, pending)

    @property
    def combinations(self) -> int:
        return prod(len(choice) for choice in self.choices)

    def states(self, limit: int, samples: int, dice: random.Random) -> Iterator[State]:
        """Yield states, each once: all of them if at most `limit` combinations make them."""
        seen: set[bytes] = set()
        made = itertools.product(*self.choices) if self.combinations <= limit else self._some(samples, dice)
        for chosen in made:
            atoms = sorted(atom for atom in chosen if atom is not None)
            content = bytes(_applied(self.content, atoms))
            if content not in seen:
                seen.add(content)
                yield State(content, max(self.since, atoms[-1].number + 1 if atoms else 0), self.end)

    def _some(self, samples: int, dice: random.Random) -> Iterator[Sequence[_Atom | None]]:
        nothing: list[_Atom | None] = [None] * len(self.choices)
        whole = [choice[-1] for choice in self.choices]
        yield nothing
        for number in range(self.begin, self.end):
            yield [next((a for a in reversed(c) if a and a.number <= number), None) for c in self.choices]
        for i, choice in enumerate(self.choices):
            for atom in choice[1:]:
                yield [*nothing[:i], atom, *nothing[i + 1 :]]
            for other in choice[:-1]:
                yield [*whole[:i], other, *whole[i + 1 :]]
        for _ in range(samples):
            chance = dice.choice((0.1, 0.5, 0.9))
            yield [dice.choice(c[1:]) if dice.random() < chance else None for c in self.choices]


def windows(before: bytes | bytearray, log: Sequence[Operation]) -> Iterator[Window]:
    """Yield the windows of a log, in which a flush has in `offset` how many operations had ended when it began."""
    content, begin, since = bytearray(before), 0, 0
    for end in range(len(log) + 1):
        if end < len(log) and log[end].kind != "flush":
            continue
        yield Window(bytes(content), log, begin, since, end)
        if end < len(log):
            covered = max(begin, log[end].offset)
            for operation in log[begin:covered]:
                apply(content, operation)
            begin, since = covered, end + 1


def apply(content: bytearray, operation: Operation) -> None:
    """Let one operation take effect in full."""
    if operation.kind == "write":
        _put(content, operation.offset, operation.data)
    elif operation.kind == "truncate":
        _resize(content, operation.length)
    elif operation.kind == "punch":
        end = max(operation.offset, min(operation.offset + operation.length, len(content)))
        content[operation.offset : end] = bytes(end - operation.offset)


def _choices(content: bytes, pending: list[tuple[int, Operation]]) -> list[_Choice]:
    sectors: dict[int, list[_Atom]] = {}
    punches: list[_Choice] = []
    lengths: list[_Atom] = []
    length = len(content)
    plain = all(operation.kind == "write" for _, operation in pending)
    for number, operation in pending:
        if operation.kind == "write":
            end = operation.offset + operation.length
            cuts = [operation.offset, *range((operation.offset // SECTOR + 1) * SECTOR, end, SECTOR), end]
            for at, stop in itertools.pairwise(cuts):
                piece = operation.data[at - operation.offset : stop - operation.offset]
                sectors.setdefault(at, []).append(_Atom(number, at, piece))
            if operation.offset + operation.length > length:
                length = operation.offset + operation.length
                lengths.append(_Atom(number, 0, b"", length))
        elif operation.kind == "truncate":
            length = operation.length
            lengths.append(_Atom(number, 0, b"", length))
        elif operation.kind == "punch":
            punches.append((None, _Atom(number, operation.offset, bytes(operation.length))))
    choices = punches
    for offset, atoms in sectors.items():
        # Of what is past the end only the length can be seen as long as it is zeros.
        held = content[offset : offset + len(atoms[0].data)].ljust(len(atoms[0].data), b"\0")
        if plain:
            distinct = {atom.data: atom for atom in reversed(atoms) if atom.data != held}
            atoms = sorted(distinct.values())
        if atoms:
            choices.append((None, *atoms))
    if lengths:
        choices.append((None, *lengths))
    return choices


def _applied(content: bytes, atoms: list[_Atom]) -> bytearray:
    result = bytearray(content)
    for atom in atoms:
        if atom.length < 0:
            _put(result, atom.offset, atom.data)
        else:
            _resize(result, atom.length)
    return result


def _put(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, length: int) -> None:
    del content[length:]
    content.extend(bytes(length - len(content)))
