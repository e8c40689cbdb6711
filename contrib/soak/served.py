"""Leaves of all kinds of backing in one directory, on one mount, under the loads of the kill rounds."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from contrib.kill.load import MAPPED, TURNS
from contrib.kill.rounds import CHUNK, PATIENCE, QEDFS, Loads, loads, mounted, nbd_server, run, wait_until
from contrib.kill.stamps import PAGE_SECTORS, SECTOR, Ledger, Violation, content

SIZE = 8 << 20
"""Bytes of a disk before it grows; a multiple of `CHUNK`."""
SECTORS = SIZE // SECTOR
PIECE = 128
"""Sectors by which a disk grows at a time."""
MOST_PIECES = 64
KINDS = ("raw", "nbd", "chain")
GUEST = "guest"
"""The leaf that is made anew, added and removed in each round, so that there is always something left to copy."""
COUNTS = ("clusters_data", "clusters_zero", "clusters_backing")


class Bases:
    """What the leaves are made on: a raw file, an NBD server that can be restarted, a QED image over a raw file."""

    def __init__(self, folder: Path, salt: int, stack: ExitStack) -> None:
        self.salt = salt
        self._folder = folder
        raw = folder / "base.raw"
        data = content(salt, np.arange(SECTORS), 0)
        raw.write_bytes(data)
        (folder / "half.raw").write_bytes(data[: SIZE // 2] + bytes(SIZE // 2))
        (folder / "rest").write_bytes(data[SIZE // 2 :])
        middle = folder / "middle.qed"
        run(*QEDFS, "create", "-b", str(folder / "half.raw"), "-F", "raw", str(middle))
        run("qemu-io", "-f", "qed", "-c", f"write -s {folder}/rest {SIZE // 2} {SIZE // 2}", str(middle))
        self._server = stack.enter_context(ExitStack())
        socket = self._server.enter_context(nbd_server(folder))
        self._socket = socket
        self.names = {
            "raw": (str(raw), "raw"),
            "nbd": (f"nbd+unix:///?socket={socket}", "raw"),
            "chain": (str(middle), "qed"),
        }

    def stop_server(self) -> None:
        """Kill the NBD server."""
        self._server.close()
        self._socket.unlink()

    def start_server(self) -> None:
        """Start it again at the same address."""
        self._server.enter_context(nbd_server(self._folder))


class Served:
    """One directory of leaves and where it is mounted. A round: `begin`, `start`, `disturb`, `ended` or a kill, `judge`."""

    def __init__(self, folder: Path, bases: Bases, seed: int, stack: ExitStack) -> None:
        self.point = folder / "mnt"
        self.acknowledged = 0
        self.issued = 0
        self.grown = dict.fromkeys(KINDS, 0)
        self._folder = folder
        self._leaves = folder / "leaves"
        self._bases = bases
        self._random = random.Random(seed)
        self._mapped = np.arange(SECTORS) // PAGE_SECTORS % TURNS == MAPPED
        for path in (folder, self.point, self._leaves, *(folder / name for name in (*KINDS, GUEST))):
            path.mkdir()
        for kind in KINDS:
            self._create(kind, self._leaves / f"{kind}.qed")
        self._ledgers = {kind: Ledger(folder / kind / "ledger", SECTORS, bases.salt) for kind in KINDS}
        self._tails = {kind: Ledger(folder / kind / "tail", MOST_PIECES * PIECE, bases.salt + 1) for kind in KINDS}
        self._loads: dict[str, Loads] = {
            kind: stack.enter_context(loads(self.disk(kind), folder / kind, SECTORS, bases.salt))
            for kind in (*KINDS, GUEST)
        }
        self._mount = stack.enter_context(ExitStack())

    def disk(self, name: str) -> Path:
        return self.point / f"{name}.raw"

    def mount(self) -> subprocess.Popen[bytes]:
        """Mount; all that was acknowledged is there."""
        server = self._mount.enter_context(mounted(QEDFS, self._leaves, self.point))
        for kind in KINDS:
            wait_until(self.disk(kind).exists, f"{kind}.raw")
            self.judge(kind, settle=True)
        return server

    def detach(self) -> None:
        """Kill what still serves, and detach what is left of the mount."""
        self._mount.close()

    def add_guest(self, kind: str) -> None:
        """A fresh leaf over a backing of `kind` appears in the mount."""
        made = self._folder / f"{GUEST}.qed"
        self._create(kind, made)
        (self._folder / GUEST / "ledger").unlink(missing_ok=True)
        self._ledgers[GUEST] = Ledger(self._folder / GUEST / "ledger", SECTORS, self._bases.salt)
        made.rename(self._leaves / made.name)
        wait_until(self.disk(GUEST).exists, "a leaf added live")

    def remove_guest(self) -> None:
        """The leaf goes from the directory while it is open: whoever has it open reads and writes on."""
        fd = os.open(self.disk(GUEST), os.O_RDWR | os.O_DIRECT)
        try:
            (self._leaves / f"{GUEST}.qed").rename(self._folder / f"{GUEST}.qed")
            wait_until(lambda: not self.disk(GUEST).exists(), "the end of a leaf removed live")
            self._judge_open(fd, self._ledgers[GUEST], settle=False)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._count(GUEST)

    def start(self, seed: int, seconds: float) -> None:
        """Start all loads, for some seconds or (0) until the disk goes."""
        for number, name in enumerate(self._ledgers):
            self._loads[name].start(seed * 8 + number, seconds)

    def ended(self) -> None:
        """Wait for all loads; each ended as it should."""
        complaints = {name: self._loads[name].ended() for name in self._ledgers}
        if any(complaints.values()):
            raise Violation(f"{self._folder.name}: loads ended badly: {complaints}")

    def drop_guest(self) -> None:
        """Forget the guest of a mount that has ended; its image is checked first."""
        if GUEST in self._ledgers:
            self._count(GUEST)
            (self._leaves / f"{GUEST}.qed").rename(self._folder / f"{GUEST}.qed")
            check(self._folder / f"{GUEST}.qed")

    def disturb(self) -> None:
        """Do one thing that an administrator might do, to one of the disks."""
        name = self._random.choice(KINDS)
        self._random.choice([self._switch, self._prefetch, self._look, self._grow])(name)

    def judge(self, kind: str, *, settle: bool) -> None:
        """Judge every sector as the mount shows it. `settle` takes it as the state from now on, after a crash."""
        fd = os.open(self.disk(kind), os.O_RDONLY | os.O_DIRECT)
        try:
            self._judge_open(fd, self._ledgers[kind], settle=settle)
            sectors = self.grown[kind] * PIECE
            if os.fstat(fd).st_size != SIZE + sectors * SECTOR:
                raise Violation(f"{kind}: {os.fstat(fd).st_size} bytes after {self.grown[kind]} growths")
            if sectors:
                with mmap.mmap(-1, sectors * SECTOR) as buffer:
                    os.preadv(fd, [buffer], SIZE)
                    self._tails[kind].judge(
                        0, buffer[:], self._tails[kind].acknowledged[:sectors], mixed=np.zeros(sectors, bool)
                    )
        finally:
            os.close(fd)

    def check_copies(self) -> None:
        """A copy of each leaf, taken while it is mounted, passes `qemu-img check`."""
        copy = self._folder / "copy.qed"
        for kind in KINDS:
            copy.write_bytes((self._leaves / f"{kind}.qed").read_bytes())
            check(copy)

    def check_leaves(self) -> None:
        """Each leaf passes `qemu-img check`. It must not be mounted."""
        for kind in KINDS:
            check(self._leaves / f"{kind}.qed")

    def count(self) -> None:
        """Sum up what the permanent leaves were told, at the end."""
        for kind in KINDS:
            self._count(kind)

    def _count(self, name: str) -> None:
        self.issued += int(self._ledgers[name].issued.sum())
        self.acknowledged += int(self._ledgers[name].acknowledged.sum())
        if name == GUEST:
            del self._ledgers[GUEST]

    def _create(self, kind: str, path: Path) -> None:
        path.unlink(missing_ok=True)
        backing, form = self._bases.names[kind]
        run(*QEDFS, "create", "-b", backing, "-F", form, str(path))

    def _judge_open(self, fd: int, ledger: Ledger, *, settle: bool) -> None:
        with mmap.mmap(-1, CHUNK) as buffer:
            for pos in range(0, SIZE, CHUNK):
                first, count = pos // SECTOR, CHUNK // SECTOR
                lowest = ledger.acknowledged[first : first + count].copy()
                if os.preadv(fd, [buffer], pos) != CHUNK:
                    raise Violation(f"a short read at {pos}")
                versions = ledger.judge(first, buffer[:], lowest, mixed=self._mapped[first : first + count])
                if settle:
                    ledger.settle(first, versions)

    def _switch(self, name: str) -> None:
        os.setxattr(self.disk(name), "user.qedfs.mode", self._random.choice([b"cow", b"cor"]))

    def _prefetch(self, name: str) -> None:
        pos = self._random.randrange(SECTORS) * SECTOR
        os.setxattr(self.disk(name), "user.qedfs.prefetch", f"{pos} {min(1 << 20, SIZE - pos)}".encode())

    def _look(self, name: str) -> None:
        disk = self.disk(name)
        os.getxattr(self.point, "user.qedfs.status")
        for attribute in os.listxattr(disk):
            os.getxattr(disk, attribute)
        density = os.getxattr(disk, "user.qedfs.density").decode().split(",")
        if len(density) != 256 or not all(0 <= float(value) <= 100 for value in density):
            raise Violation(f"{name}: a density of {density}")

    def _grow(self, name: str) -> None:
        """Grown space reads as zeros, and holds what is then written there."""
        first = self.grown[name] * PIECE
        if self.grown[name] == MOST_PIECES:
            return
        pos, length = SIZE + first * SECTOR, PIECE * SECTOR
        os.truncate(self.disk(name), pos + length)
        fd = os.open(self.disk(name), os.O_RDWR)
        try:
            if os.pread(fd, length, pos) != bytes(length):
                raise Violation(f"{name}: grown space is not zeros")
            os.pwrite(fd, self._tails[name].issue(first, PIECE), pos)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._tails[name].acknowledge(first, PIECE)
        self.grown[name] += 1


def check(leaf: Path) -> None:
    """`qemu-img check` finds leaked clusters at most."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qed", str(leaf)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode not in (0, 3):
        raise Violation(f"qemu-img check {leaf.name}: {done.returncode}: {done.stdout}{done.stderr}")
