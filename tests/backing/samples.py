"""Images made by QEMU's tools, what they must read as by QEMU's judgement, and servers for them."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20

Serve = Callable[..., str]


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=60, stdout=subprocess.DEVNULL)


def random_bytes(length: int, seed: int = 0) -> bytes:
    """Return bytes that differ from place to place and are the same in every run."""
    return random.Random(seed).randbytes(length)


def make_qed(path: Path, *options: object, commands: list[str] | None = None) -> Path:
    """Make a QED image by `qemu-img create` with `options`, and change it by `commands` of `qemu-io`."""
    run("qemu-img", "create", "-q", "-f", "qed", *options[:-1], path, options[-1])
    if commands:
        arguments = [argument for command in commands for argument in ("-c", command)]
        run("qemu-io", "-f", "qed", *arguments, path)
    return path


def content_by_qemu(path: Path, format: str = "qed") -> bytes:
    """Return what QEMU says the disk holds."""
    raw = path.with_name(path.name + ".converted")
    run("qemu-img", "convert", "-f", format, "-O", "raw", path, raw)
    return raw.read_bytes()


def make_chain(folder: Path) -> Path:
    """Make a chain of three: a raw base, a middle layer shorter than both neighbours, and return the top."""
    base = folder / "base.raw"
    base.write_bytes(random_bytes(3 * MIB - 12345))
    middle = folder / "middle.qed"
    geometry = "cluster_size=4k,table_size=2"
    commands = ["write -P 0x22 100k 70k", "write -z 300k 200k", "write -P 0x23 1530k 6k"]
    make_qed(middle, "-o", geometry, "-b", base.name, "-F", "raw", "1536k", commands=commands)
    top = folder / "top.qed"
    commands = ["write -P 0x31 0 5k", "write -z 64k 64k", "write -P 0x32 1000k 90k", "write -P 0x33 3999k 30k"]
    return make_qed(top, "-o", "cluster_size=64k", "-b", middle.name, "-F", "qed", "5000k", commands=commands)


@contextmanager
def served_by_nbdkit(socket: Path, *arguments: object) -> Iterator[str]:
    """Run nbdkit on a unix socket until the end of the block; the address comes out."""
    ready = socket.with_suffix(".pid")  # written when it listens; the socket itself is there a little earlier
    options = ["--foreground", "--readonly", "--pidfile", str(ready), "--unix", str(socket)]
    command = ["nbdkit", *options, *map(str, arguments)]
    with subprocess.Popen(command) as server:
        try:
            until = time.monotonic() + 20
            while not ready.exists():
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()


def make_foreign(folder: Path, format: str, *options: str) -> tuple[Path, Path]:
    """Make a raw disk of 2 MiB, its second and fourth part zeros, and an image of `format` by `qemu-img convert`."""
    raw = folder / "disk.raw"
    first, second = random_bytes(512) * 512, random_bytes(512, 1) * 1024  # what can be compressed
    raw.write_bytes(first + bytes(256 * KIB) + second + bytes(MIB))
    image = folder / f"image.{format}"
    run("qemu-img", "convert", "-f", "raw", "-O", format, *options, raw, image)
    return raw, image
