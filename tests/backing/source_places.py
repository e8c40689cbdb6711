"""One place for each kind of backing: a disk that can be replaced by another one, and whose server can go and come back."""

from __future__ import annotations

import os
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.backing.object_servers import s3rver
from tests.backing.samples import KIB, MIB, random_bytes, run
from tests.backing.web_servers import nginx

SIZE = 2 * MIB
HOLE = slice(512 * KIB, 1536 * KIB)
CONTENT = random_bytes(512 * KIB, 1) + bytes(MIB) + random_bytes(512 * KIB, 2)
OTHER = random_bytes(512 * KIB, 3) + bytes(MIB) + random_bytes(512 * KIB, 4)


def sparse(path: Path, content: bytes) -> None:
    """Write `content` with its hole, in place of what is there, as a careful writer does."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        for part in (slice(0, HOLE.start), slice(HOLE.stop, len(content))):
            file.seek(part.start)
            file.write(content[part])
        file.truncate(len(content))
    new.rename(path)


class Place(ABC):
    """A backing called `name` that holds `CONTENT` until `replace`. Its servers end with `servers`."""

    name: str
    tells_zeros = True
    """Whether it says where the hole is."""
    tells_content = True
    """Whether another content of the same size can be noticed."""
    notices = True
    """Whether a replacement is noticed by who has it open, who would go on with the old content otherwise."""

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        self.folder = folder
        self.servers = servers

    def replace(self) -> None:
        """Put `OTHER` there, or where that would go unnoticed a part of it."""
        self.put(OTHER if self.tells_content else OTHER[:MIB])

    @abstractmethod
    def put(self, content: bytes) -> None: ...

    def stop(self) -> None:
        """End the server."""
        raise NotImplementedError("there is none")

    def start(self) -> None:
        """Start it again in the same place."""
        raise NotImplementedError("there is none")


class File(Place):
    notices = False  # the name leads to another file; the open one is as it was

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        super().__init__(folder, servers)
        self.name = str(folder / "base.raw")
        self.put(CONTENT)

    def put(self, content: bytes) -> None:
        sparse(Path(self.name), content)


class Nbd(Place):
    """nbdkit, which is started anew for another content, as it has the file open."""

    tells_content = False

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        super().__init__(folder, servers)
        self._file = folder / "nbd.raw"
        self._socket = folder / "s"
        self._process: subprocess.Popen[bytes] | None = None
        self.name = f"nbd+unix:///?socket={self._socket}"
        servers.callback(self.stop)
        self.put(CONTENT)

    def put(self, content: bytes) -> None:
        self.stop()
        sparse(self._file, content)
        self.start()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # asked to end it would wait for its clients
            self._process.wait(timeout=10)
        self._socket.unlink(missing_ok=True)

    def start(self) -> None:
        ready = self._socket.with_suffix(".pid")  # written when it listens; the socket itself is there a little earlier
        ready.unlink(missing_ok=True)
        options = ["--foreground", "--readonly", "--unix", str(self._socket), "--pidfile", str(ready)]
        self._process = subprocess.Popen(["nbdkit", *options, "file", str(self._file)])
        until = time.monotonic() + 20
        while not ready.exists():
            assert self._process.poll() is None, "nbdkit has ended"
            assert time.monotonic() < until, "nbdkit does not listen"
            time.sleep(0.01)


class Http(Place):
    tells_zeros = False
    file = "base.raw"

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        super().__init__(folder, servers)
        (folder / "web").mkdir()
        self._web = servers.enter_context(nginx(folder / "web"))
        self.name = f"{self._web.url}/{self.file}"
        self.put(CONTENT)
        os.utime(self._web.files / self.file, (1e9, 1e9))  # nginx's tags count whole seconds

    def put(self, content: bytes) -> None:
        self._web.put(self.file, content)

    def stop(self) -> None:
        self._web.stop()

    def start(self) -> None:
        self._web.start()


class Objects(Place):
    tells_zeros = False

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        super().__init__(folder, servers)
        self._store = s3rver(folder / "store")
        servers.callback(self.stop)
        self.start()
        environment = servers.enter_context(pytest.MonkeyPatch.context())
        for name, value in self._store.variables().items():
            environment.setenv(name, value)
        self.name = "s3://bucket/base.raw"
        self.put(CONTENT)

    def put(self, content: bytes) -> None:
        self._store.put("base.raw", content)

    def stop(self) -> None:
        self._store.stop()

    def start(self) -> None:
        self._store.start()


class _Image(Http):
    """An image of another format than raw, on a web server."""

    tells_zeros = True
    format: str

    def put(self, content: bytes) -> None:
        raw, image = self.folder / "disk.raw", self.folder / self.file
        sparse(raw, content)
        run("qemu-img", "convert", "-f", "raw", "-O", self.format, raw, image)
        super().put(image.read_bytes())


class Qed(_Image):
    file, format = "base.qed", "qed"


class Qcow2(_Image):
    file, format = "base.qcow2", "qcow2"


class Mirrors(Place):
    """A web server and an NBD server."""

    tells_content = False  # the NBD server does not

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        super().__init__(folder, servers)
        self._both = (Nbd(folder, servers), Http(folder, servers))
        self.name = "mirrors:" + "|".join(one.name for one in self._both)

    def put(self, content: bytes) -> None:
        for one in self._both:
            one.put(content)

    def stop(self) -> None:
        for one in self._both:
            one.stop()

    def start(self) -> None:
        for one in self._both:
            one.start()


PLACES: tuple[type[Place], ...] = (File, Nbd, Http, Objects, Qed, Qcow2, Mirrors)
