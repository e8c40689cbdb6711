"""What every kind of synchronous write makes of the leaf: its data, a flush, its table, a flush, and only then the answer.

Seen from outside: the system calls of the serving process on the leaf, by strace. `direct_io=on` does not cover
RWF_DSYNC on an O_DIRECT handle (docs/durability.md), and the test says so.
"""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

BLOCK = 4096
MARK = b"written!" * (BLOCK // 8)
PATIENCE = 30.0
QEDFS = (sys.executable, "-m", "qedfs")

KINDS = {
    "O_SYNC": (os.O_SYNC, 0),
    "O_DSYNC": (os.O_DSYNC, 0),
    "RWF_DSYNC": (0, os.RWF_DSYNC),
}
HANDLES = {"buffered": 0, "O_DIRECT": os.O_DIRECT}


class Traced(NamedTuple):
    """A mount whose server is traced: what it does to the leaf is appended to `trace`, in order of its ends."""

    disk: Path
    trace: Path

    def calls(self) -> list[str]:
        """`data` (a write that holds the mark), `metadata` (any other) and `flush`, neighbours of a kind as one."""
        found: list[str] = []
        for line in self.trace.read_text(errors="replace").splitlines():
            kind = _kind(line)
            if kind and found[-1:] != [kind]:
                found.append(kind)
        return found


def _kind(line: str) -> str:
    if "fdatasync" in line and re.search(r"= 0$", line):
        return "flush"
    if re.search(r"pwrite|resumed", line) and re.search(r"= \d+$", line):
        return "data" if "written!" in line else "metadata"
    return ""


@contextmanager
def traced(folder: Path, options: str) -> Iterator[Traced]:
    base, leaf, point, trace = (folder / name for name in ("base.raw", "vm.qed", "mnt", "trace"))
    base.write_bytes(b"b" * (1 << 20))
    point.mkdir()
    subprocess.run([*QEDFS, "create", "-b", str(base), str(leaf)], check=True, capture_output=True, timeout=PATIENCE)
    with subprocess.Popen([*QEDFS, "mount", "-f", "-o", options, str(leaf), str(point)]) as server:
        tracer: subprocess.Popen[bytes] | None = None
        try:
            _wait_until(lambda: os.path.ismount(point))
            # Only the leaf: strace resolves descriptors to paths.
            calls = "trace=pwrite64,pwritev,pwritev2,fdatasync,fsync"
            tracer = subprocess.Popen(
                ["strace", "-f", "-s", "16", "-e", calls, "-P", str(leaf), "-o", str(trace), "-p", str(server.pid)],
                stderr=subprocess.DEVNULL,
            )
            _wait_until(lambda: _is_traced(server.pid))
            yield Traced(point / "vm.raw", trace)
        finally:
            if tracer is not None:
                tracer.terminate()
                tracer.wait(PATIENCE)
            server.terminate()
            server.wait(PATIENCE)


def _is_traced(pid: int) -> bool:
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    return all("TracerPid:\t0" not in (task / "status").read_text() for task in tasks)


def _wait_until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def write(disk: Path, pos: int, flags: int, per_write: int) -> None:
    fd = os.open(disk, os.O_RDWR | flags)
    try:
        with mmap.mmap(-1, BLOCK) as buffer:
            buffer[:] = MARK
            assert os.pwritev(fd, [buffer], pos, per_write) == BLOCK
    finally:
        os.close(fd)


@pytest.fixture(scope="module", params=["auto", "on"])
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Traced]]:
    with traced(tmp_path_factory.mktemp("traced"), f"direct_io={request.param}") as found:
        # The first allocation of a mount has flushes of its own.
        write(found.disk, 0, os.O_SYNC, 0)
        yield request.param, found


@pytest.mark.parametrize("handle", HANDLES)
@pytest.mark.parametrize("kind", KINDS)
def test_synchronous_write_is_answered_after_data_and_metadata_are_flushed(
    mounted: tuple[str, Traced], kind: str, handle: str
) -> None:
    option, found = mounted
    flags, per_write = KINDS[kind]
    cluster = 1 + list(KINDS).index(kind) * 2 + list(HANDLES).index(handle)
    before = found.calls()
    write(found.disk, cluster << 16, flags | HANDLES[handle], per_write)
    calls = found.calls()[len(before) :]
    if option == "on" and (kind, handle) == ("RWF_DSYNC", "O_DIRECT"):
        # What `direct_io=on` gives up: the kernel sends no FSYNC, and the request does not show the flag.
        assert "flush" not in calls
        return
    assert calls == ["data", "flush", "metadata", "flush"]
