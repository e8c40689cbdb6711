"""Real images, made and judged by the programs of QEMU."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple


def qemu_img(*arguments: str | Path, status: int = 0) -> str:
    """Run `qemu-img` and return what it printed; it must end with `status`."""
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def qemu_io(image: Path, *commands: str) -> str:
    """Run `qemu-io` on a QED image; every command must succeed."""
    arguments = [argument for command in commands for argument in ("-c", command)]
    line = ["qemu-io", "-f", "qed", *arguments, str(image)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "rror" not in said, said
    assert "failed" not in said, said
    return said


class Verdict(NamedTuple):
    """What `qemu-img check` says of an image; `report` is its JSON, empty when it could not check."""

    status: int
    report: dict[str, Any]


def qemu_check(image: Path) -> Verdict:
    line = ["qemu-img", "check", "-f", "qed", "--output=json", str(image)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    return Verdict(done.returncode, json.loads(done.stdout) if done.stdout.strip() else {})


def entry(image: Path, offset: int) -> int:
    """Return the 64-bit number at `offset` of the file."""
    with image.open("rb") as file:
        file.seek(offset)
        number: int = struct.unpack("<Q", file.read(8))[0]
    return number


def poke(image: Path, offset: int, data: bytes | int) -> None:
    """Write bytes, or a 64-bit number, at `offset` of the file."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<Q", data) if isinstance(data, int) else data)
