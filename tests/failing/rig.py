"""Leaves on file systems that fail: small ones, and one that fails on demand."""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QEDFS = (sys.executable, "-m", "qedfs")
PATIENCE = 60.0
"""Seconds for anything that is waited for."""
CLUSTER = 65536
MIB = 1 << 20


def run(*command: str | Path, status: int = 0) -> str:
    """Run a program that must end with `status`; return what it said on both outputs."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=ROOT)
    assert done.returncode == status, (command, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


class Disk:
    """A leaf being served: `file` is the raw file, `leaf` the image, `server` the process."""

    def __init__(self, leaf: Path, point: Path, server: subprocess.Popen[bytes]) -> None:
        self.leaf = leaf
        self.point = point
        self.server = server
        self.file = point / "vm.raw"

    def attribute(self, name: str) -> str:
        return os.getxattr(self.file, f"user.qedfs.{name}").decode()

    def read(self, pos: int, length: int) -> bytes:
        """Read past the page cache."""
        with opened(self.file, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, length) as buffer:
            assert os.preadv(fd, [buffer], pos) == length
            return buffer[:]

    def write(self, pos: int, data: bytes) -> None:
        """Write past the page cache; raises what the guest sees."""
        with opened(self.file, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            assert os.pwritev(fd, [buffer], pos) == len(data)

    def sync(self) -> None:
        with opened(self.file, os.O_RDWR) as fd:
            os.fsync(fd)

    def kill(self) -> None:
        self.server.kill()
        self.server.wait()
        subprocess.run(["umount", "-l", str(self.point)], check=True, timeout=PATIENCE)

    def unmount(self, *, status: int = 0) -> str:
        """Unmount by the command, which must end with `status`, the server too; return what the command said."""
        said = run(*QEDFS, "unmount", self.point, status=status)
        assert self.server.wait(PATIENCE) == status
        return said


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def served(leaf: Path, point: Path, *options: str) -> Iterator[Disk]:
    """Mount `leaf` as `vm.raw` while inside; the test may have unmounted it before."""
    point.mkdir(exist_ok=True)
    more = [argument for option in ("readahead=0", *options) for argument in ("-o", option)]
    command = [*QEDFS, "mount", "-f", *more, "--log-file", f"{point}.log", str(leaf), str(point)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: os.path.ismount(point) or server.poll() is not None)
            assert server.poll() is None, Path(f"{point}.log").read_text()
            yield Disk(leaf, point, server)
        finally:
            server.kill()
            server.wait()
            subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True, timeout=PATIENCE)


@contextlib.contextmanager
def file_system(kind: str, point: Path, size: int) -> Iterator[Path]:
    """Have a new file system of `size` bytes, `tmpfs` or one in a file (ext4, xfs, vfat), mounted while inside. Needs root."""
    point.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", point)
    else:
        image = point.with_name(f"{point.name}.image")
        with image.open("wb") as file:
            file.truncate(size)
        ext = kind.startswith("ext")
        run(*(("mke2fs", "-q", "-t", kind, "-m", "0") if ext else (f"mkfs.{kind}",)), image)
        run("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        run("umount", "-l", point)


def fill(folder: Path) -> Path:
    """Take all room of the file system; removing the file that is returned gives it back."""
    filler = folder / "filler"
    with opened(filler, os.O_WRONLY | os.O_CREAT) as fd:
        for size in (MIB, 4096, 512):
            with contextlib.suppress(OSError):
                while os.write(fd, bytes(size)):
                    pass
    return filler


class FaultyFolder:
    """A mounted folder with the files of another one, which fails when told to (`faulty_fs.py`)."""

    def __init__(self, point: Path, process: subprocess.Popen[str]) -> None:
        self.point = point
        self._process = process
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def _collect(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._answers.put(line)

    def answer(self) -> None:
        assert self._answers.get(timeout=PATIENCE) == "ok\n"

    def tell(self, line: str) -> None:
        """`fail OPERATION ERRNO [BELOW]` or `heal`."""
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        self.answer()


@contextlib.contextmanager
def faulty_folder(folder: Path, point: Path) -> Iterator[FaultyFolder]:
    point.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("faulty_fs.py")), str(folder), str(point)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            faulty = FaultyFolder(point, process)
            faulty.answer()
            yield faulty
        finally:
            subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True, timeout=PATIENCE)
            process.kill()
            process.wait()
            faulty._reader.join(PATIENCE)
