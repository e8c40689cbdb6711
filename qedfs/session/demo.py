"""The main job end to end, in a temporary folder: an image on an NBD server, a leaf over it, mounted, used, streamed, checked.

Everything goes through the commands that a user would type. Whatever ends the demonstration, nothing is left behind.
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import STDOUT
from urllib.parse import quote

import trio

from qedfs.backing.file import open_file
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.errors import Interrupted, QedfsError
from qedfs.fuse.mounts import find_mount
from qedfs.nbd.listeners import open_unix_listener
from qedfs.nbd.server import serve
from qedfs.report.mounted import read_attribute
from qedfs.report.sizes import size_text

MIB = 1 << 20
BASE_SIZE = 64 * MIB
_CLEANING_TIME = 20.0
_STEP_TIME = 60.0
"""Seconds for one command, and for all of the reading and writing; each takes less than one where nothing is wrong."""

Say = Callable[[str], None]


class DemoFailed(QedfsError):
    """Something was not as it should be."""


async def run_demo(say: Say) -> None:
    """Show the main job and tell what is done and seen, line by line.

    Raises:
        DemoFailed: a command failed, or a byte was wrong.
        Interrupted: SIGINT or SIGTERM came.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            with tempfile.TemporaryDirectory(prefix="qedfs-demo-") as folder:
                demo = _Demo(Path(folder), say)

                async def watch() -> None:
                    async for _ in signals:
                        demo.work.cancel()

                nursery.start_soon(watch)
                await demo.run()
            nursery.cancel_scope.cancel()


class _Demo:
    def __init__(self, folder: Path, say: Say) -> None:
        self._base = folder / "base.raw"
        self._leaf = folder / "vm.qed"
        self._mountpoint = folder / "mnt"
        self._disk = self._mountpoint / "vm.raw"
        self._socket = folder / "base.sock"
        self._say = say
        self._random = random.Random("qedfs")
        self.work = trio.CancelScope()
        """Cancel it to end the demonstration early and in good order."""

    async def run(self) -> None:
        content = bytearray(await trio.to_thread.run_sync(self._make_base))
        base = bytes(content)
        self._say(f"A base image: {size_text(BASE_SIZE)}, the second half of it empty; an NBD server has it.")
        with self.work:
            async with self._serving():
                await self._use(content)
            await self._verify(bytes(content))
        if self.work.cancelled_caught:
            raise Interrupted("demo", "interrupted; everything is removed")
        _expect(await trio.to_thread.run_sync(self._base.read_bytes) == base, "the base was changed")
        self._say("The base image is as it was. That was the main job: a disk in use at once, and whole later.")

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        """Have the base served. That outlives a cancelled use: a read that waits in the kernel cannot be given up."""
        source = await open_file(str(self._base))
        # Shielded: the mount would wait for the server, and the read for the mount.
        scope = trio.CancelScope(shield=True)

        async def run(*, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
            with scope:
                await serve(source, [await open_unix_listener(self._socket)], name="base", task_status=task_status)

        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(run)
                try:
                    yield
                finally:
                    scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await source.aclose()

    def _make_base(self) -> bytes:
        data = self._random.randbytes(BASE_SIZE // 2)
        with self._base.open("wb") as file:
            file.write(data)
            file.truncate(BASE_SIZE)
        self._mountpoint.mkdir()
        return data + bytes(BASE_SIZE - len(data))

    async def _use(self, content: bytearray) -> None:
        uri = f"nbd+unix:///base?socket={quote(str(self._socket))}"
        await self._command("create", "-b", uri, "-F", "raw", str(self._leaf))
        try:
            await self._command("mount", "-o", "idle=always", str(self._leaf), str(self._mountpoint))
            with trio.fail_after(_STEP_TIME):
                await self._read_and_write(content)
            await self._command("status", str(self._mountpoint))
            await self._command("stream", str(self._disk))
            with trio.fail_after(_STEP_TIME):
                await self._read_everything(content)
            await self._command("unmount", str(self._mountpoint))
        except trio.TooSlowError as error:
            raise DemoFailed("demo", "the mounted disk does not answer") from error
        finally:
            with trio.CancelScope(shield=True):
                await self._detach()

    async def _read_and_write(self, content: bytearray) -> None:
        size = (await trio.to_thread.run_sync(self._disk.stat)).st_size
        _expect(size == BASE_SIZE, f"the disk has {size} bytes instead of {BASE_SIZE}")
        start = await trio.to_thread.run_sync(self._pread, 8 * MIB, 4 * MIB)
        _expect(start == content[8 * MIB : 12 * MIB], "a read differs from the base")
        fetched = int(await self._attribute("backing_bytes_read"))
        self._say(f"Read 4 MiB at 8 MiB: as in the base; {size_text(fetched)} came over NBD, and stay in the leaf.")
        for pos, length in ((20 * MIB + 777, 5000), (BASE_SIZE - 4096, 4096), (9 * MIB, MIB)):
            data = self._random.randbytes(length)
            await trio.to_thread.run_sync(self._pwrite, pos, data)
            content[pos : pos + length] = data
            _expect(await trio.to_thread.run_sync(self._pread, pos, length) == data, "a write does not read back")
        self._say("Wrote in three places, with fsync: it reads back.")

    async def _read_everything(self, content: bytearray) -> None:
        _expect(await self._attribute("state") == "complete", "the disk is not complete after streaming")
        everything = await trio.to_thread.run_sync(self._pread, 0, BASE_SIZE)
        _expect(everything == content, "the whole disk differs from base and writes put together")
        self._say("Read the whole disk: base and writes, put together byte by byte, and all of it local.")

    async def _verify(self, content: bytes) -> None:
        """Check the leaf, and look into it without mount and server: all is in it."""
        await self._command("check", str(self._leaf))
        source = await open_backing(Reference(str(self._leaf), "qed", str(self._leaf)), Policy())
        try:
            buffer = bytearray(len(content))
            await source.read_into(0, memoryview(buffer))
        finally:
            with trio.CancelScope(shield=True):
                await source.aclose()
        _expect(buffer == content, "the leaf does not hold all that was read and written")

    def _pread(self, pos: int, length: int) -> bytes:
        with self._disk.open("rb", buffering=0) as file:
            data = bytearray()
            while len(data) < length:
                piece = os.pread(file.fileno(), length - len(data), pos + len(data))
                if not piece:
                    break
                data += piece
            return bytes(data)

    def _pwrite(self, pos: int, data: bytes) -> None:
        with self._disk.open("r+b", buffering=0) as file:
            written = os.pwrite(file.fileno(), data, pos)
            _expect(written == len(data), "a write was cut short")
            os.fsync(file.fileno())

    async def _attribute(self, name: str) -> str:
        return await trio.to_thread.run_sync(read_attribute, str(self._disk), name)

    async def _command(self, *arguments: str) -> None:
        """Run a command of qedfs, showing it and what it says."""
        self._say(f"$ qedfs {shlex.join(arguments)}")
        done = None
        with trio.move_on_after(_STEP_TIME):
            line = [sys.executable, "-m", "qedfs", *arguments]
            done = await trio.run_process(line, stdin=b"", capture_stdout=True, stderr=STDOUT, check=False)
        said = done.stdout.decode(errors="replace").strip() if done else "no answer"
        for text in said.splitlines():
            self._say(f"  {text}")
        if done is None or done.returncode:
            raise DemoFailed(arguments[0], said.splitlines()[-1].removeprefix("qedfs: ") if said else "failed")

    async def _detach(self) -> None:
        """End the mount if there is one, and wait for the process behind it, as long as it is not stuck."""
        for lazy in ([], ["--lazy"]):
            if find_mount(str(self._mountpoint)):
                line = [sys.executable, "-m", "qedfs", "unmount", *lazy, str(self._mountpoint)]
                with trio.move_on_after(_CLEANING_TIME):
                    await trio.run_process(line, stdin=b"", capture_stdout=True, stderr=STDOUT, check=False)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DemoFailed("demo", otherwise)
