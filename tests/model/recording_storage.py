"""A leaf that remembers what each flush covered, so that every state a power cut could leave can be rebuilt."""

from __future__ import annotations

import random
from collections.abc import Iterator

import trio

from qedfs.errors import LeafError
from qedfs.image.geometry import SECTOR
from tests.image.memory_storage import MemoryStorage, Operation


class RecordingStorage(MemoryStorage):
    """As `MemoryStorage`; a logged `flush` has in `offset` how many operations had ended when it began.

    With a `schedule`, operations take a random number of steps, so that the tasks that use it overtake each other, and
    one in `failing` writes (0: none) fails, with a part of it written.
    """

    def __init__(
        self, content: bytes | bytearray = b"", *, schedule: random.Random | None = None, failing: int = 0
    ) -> None:
        super().__init__(content)
        self.before = bytes(content)
        self.failing = failing
        self._schedule = schedule

    async def flush(self) -> None:
        begun = len(self.log)
        await super().flush()
        self.log[-1] = self.log[-1]._replace(offset=begun)

    async def _pass(self, kind: str, offset: int) -> None:
        await super()._pass(kind, offset)
        if self._schedule is not None:
            for _ in range(self._schedule.choice((0, 0, 1, 3, 10))):
                await trio.lowlevel.checkpoint()

    def _at_once(self, kind: str, offset: int) -> bool:
        return super()._at_once(kind, offset) and (self._schedule is None or self._schedule.random() < 0.5)

    def _write(self, offset: int, data: bytes) -> None:
        if self.failing and self._schedule is not None and not self._schedule.randrange(self.failing):
            super()._write(offset, data[: len(data) // 2 // SECTOR * SECTOR])
            raise LeafError(self.name, "cannot be written (provoked)")
        super()._write(offset, data)


def after_power_cut(before: bytes, log: list[Operation], dice: random.Random) -> bytearray:
    """Return the file after a power cut at the end of `log`, which began with `before`.

    What ended before the last flush began is there; of everything later each sector came to the disk or did not.
    """
    content = bytearray(before)
    durable = max((operation.offset for operation in log if operation.kind == "flush"), default=0)
    chance = dice.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    for number, operation in enumerate(log):
        _apply(content, operation, 1 if number < durable else chance, dice)
    return content


def worst_cases(before: bytes, log: list[Operation]) -> Iterator[bytearray]:
    """Yield the file as a power cut may leave it after each operation, in the ways that break an ordering.

    Of what no flush covered: nothing, everything, one operation alone, or all but one came to the disk.
    """
    content = bytearray(before)
    durable = 0
    for cut in range(len(log) + 1):
        covered = max((operation.offset for operation in log[:cut] if operation.kind == "flush"), default=0)
        for operation in log[durable:covered]:
            _apply(content, operation, 1)
        durable = covered
        pending = [operation for operation in log[durable:cut] if operation.kind != "flush"]
        chosen = [pending, *([one] for one in pending), *([o for o in pending if o is not one] for one in pending)]
        for operations in ([], *chosen):
            state = bytearray(content)
            for operation in operations:
                _apply(state, operation, 1)
            yield state


def _apply(content: bytearray, operation: Operation, chance: float, dice: random.Random | None = None) -> None:
    def happens() -> bool:
        return dice is None or chance == 1 or dice.random() < chance

    if operation.kind == "write":
        for start in range(0, operation.length, SECTOR):
            if happens():
                piece = operation.data[start : start + SECTOR]
                content.extend(bytes(max(0, operation.offset + start - len(content))))
                content[operation.offset + start : operation.offset + start + len(piece)] = piece
    elif operation.kind == "truncate" and happens():
        del content[operation.length :]
        content.extend(bytes(operation.length - len(content)))
    elif operation.kind == "punch" and happens():
        end = min(operation.offset + operation.length, len(content))
        content[operation.offset : end] = bytes(max(0, end - operation.offset))
