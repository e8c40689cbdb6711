"""A leaf that remembers what each flush covered, so that every state a power cut could leave can be rebuilt."""

from __future__ import annotations

import random

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
        _apply(content, operation, dice, 1.0 if number < durable else chance)
    return content


def _apply(content: bytearray, operation: Operation, dice: random.Random, chance: float) -> None:
    if operation.kind == "write":
        for start in range(0, operation.length, SECTOR):
            if chance == 1 or dice.random() < chance:
                piece = operation.data[start : start + SECTOR]
                content.extend(bytes(max(0, operation.offset + start - len(content))))
                content[operation.offset + start : operation.offset + start + len(piece)] = piece
    elif chance < 1 and dice.random() >= chance:
        return
    elif operation.kind == "truncate":
        del content[operation.length :]
        content.extend(bytes(operation.length - len(content)))
    elif operation.kind == "punch":
        end = min(operation.offset + operation.length, len(content))
        content[operation.offset : end] = bytes(max(0, end - operation.offset))
