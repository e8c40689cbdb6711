"""An image file in memory: every operation is logged, may be held at a gate, and may be made to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import trio

from qedfs.image.storage import Storage


class Operation(NamedTuple):
    """One operation as it took effect. `kind` is a method's name; `data` what was written, `length` what it concerned."""

    kind: str
    offset: int = 0
    length: int = 0
    data: bytes = b""


class Gate:
    """Stops operations until `release`. Made by `MemoryStorage.hold`."""

    def __init__(self) -> None:
        self._open = trio.Event()
        self._arrived = trio.Event()
        self.waiting = 0

    def release(self) -> None:
        """Let everything pass, now and later."""
        self._open.set()

    async def arrived(self) -> None:
        """Return when an operation stands, or stood, at the gate."""
        await self._arrived.wait()

    async def pass_through(self) -> None:
        if self._open.is_set():
            return
        self._arrived.set()
        self.waiting += 1
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1


class MemoryStorage(Storage):
    """A `Storage` over `content`, which tests may look at and change.

    `log` holds, in order, what changed the file or made it durable (`write`, `truncate`, `punch`, `flush`); reads are
    not logged. Operations take effect when they have passed their gate. `durable` is the content at the last flush.
    """

    def __init__(self, content: bytes | bytearray = b"", *, name: str = "leaf.qed", writable: bool = True) -> None:
        self.content = bytearray(content)
        self.durable = bytes(content)
        self.name = name
        self.writable = writable
        self.nowait = True
        """Whether the `…_nowait` methods answer; set it to False to send everything through the others."""
        self.closed = False
        self.log: list[Operation] = []
        self._gates: dict[str, list[tuple[Gate, Callable[[int], bool]]]] = {}
        self._faults: dict[str, list[tuple[Exception, Callable[[int], bool]]]] = {}

    # -- what a test does ----------------------------------------------------------------------------------------------

    def hold(self, kind: str, where: Callable[[int], bool] = lambda offset: True) -> Gate:
        """Stop operations of one kind (`read`, `write`, `truncate`, `flush`, `punch`) whose offset satisfies `where`."""
        gate = Gate()
        self._gates.setdefault(kind, []).append((gate, where))
        return gate

    def fail(self, kind: str, error: Exception, where: Callable[[int], bool] = lambda offset: True) -> None:
        """Let operations of one kind raise `error`, without taking effect, until `heal`."""
        self._faults.setdefault(kind, []).append((error, where))

    def heal(self) -> None:
        """Let nothing fail any more."""
        self._faults.clear()

    def kinds(self) -> list[str]:
        """The kinds of the logged operations, in order."""
        return [operation.kind for operation in self.log]

    # -- what a Storage does -------------------------------------------------------------------------------------------

    def length(self) -> int:
        return len(self.content)

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        if not self._at_once("read", offset) or offset + len(buffer) > len(self.content):
            return False
        buffer[:] = self.content[offset : offset + len(buffer)]
        return True

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        if not self._at_once("write", offset):
            return False
        self._write(offset, bytes(data))
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._pass("read", offset)
        piece = self.content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        buffer[len(piece) :] = bytes(len(buffer) - len(piece))

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert self.writable
        copy = bytes(data)
        await self._pass("write", offset)
        self._write(offset, copy)

    async def truncate(self, length: int) -> None:
        assert self.writable
        await self._pass("truncate", length)
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))
        self.log.append(Operation("truncate", length=length))

    async def flush(self) -> None:
        before = bytes(self.content)  # a flush promises what ended before it began
        await self._pass("flush", 0)
        self.durable = before
        self.log.append(Operation("flush"))

    async def punch(self, offset: int, length: int) -> bool:
        assert self.writable
        await self._pass("punch", offset)
        end = min(offset + length, len(self.content))
        self.content[offset:end] = bytes(max(0, end - offset))
        self.log.append(Operation("punch", offset, length))
        return True

    async def aclose(self) -> None:
        self.closed = True

    def _write(self, offset: int, data: bytes) -> None:
        self.content.extend(bytes(max(0, offset - len(self.content))))
        self.content[offset : offset + len(data)] = data
        self.log.append(Operation("write", offset, len(data), data))

    def _at_once(self, kind: str, offset: int) -> bool:
        self._raise_fault(kind, offset)
        held = any(where(offset) and not gate._open.is_set() for gate, where in self._gates.get(kind, ()))
        return self.nowait and not held

    async def _pass(self, kind: str, offset: int) -> None:
        await trio.lowlevel.checkpoint()
        for gate, where in self._gates.get(kind, ()):
            if where(offset):
                await gate.pass_through()
        self._raise_fault(kind, offset)

    def _raise_fault(self, kind: str, offset: int) -> None:
        for error, where in self._faults.get(kind, ()):
            if where(offset):
                raise error
