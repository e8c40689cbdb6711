"""Images in QEMU's formats with broken headers and tables: an answer in seconds, one line, and no harm done."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from pathlib import Path

import pytest
import trio

from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.errors import QedfsError

MIB = 1 << 20
LIMIT = 5.0
"""Seconds of processor time for an answer, good or bad; four times as many by the clock."""
ROUNDS = int(os.environ.get("QEDFS_HOSTILE_ROUNDS", "12"))
"""Of each format; a sweep takes more."""
FORMATS = ("qcow2", "vmdk", "vhdx", "vdi", "vpc", "parallels")
EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def mutated(original: bytes, chance: random.Random) -> bytes:
    """Return the image with some fields of its first pages replaced by extreme or random values."""
    content = bytearray(original)
    for _ in range(chance.randint(1, 4)):
        # Mostly of the header, where each byte means something.
        end = chance.choice((104, 512, 4096, min(len(content), 512 << 10))) - 8
        at = chance.randrange(4, end)
        value = chance.choice((*EXTREMES, chance.getrandbits(32)))
        kind = chance.choice((">I", "<I", ">Q", "<Q", "B"))
        struct.pack_into(kind, content, at, value & 0xFF if kind == "B" else value)
    return bytes(content)


@pytest.mark.parametrize("format", FORMATS)
async def test_broken_images_are_answered_in_time_and_in_one_line(tmp_path: Path, format: str) -> None:
    made = tmp_path / "made"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, made, "4M"], check=True, timeout=60)
    subprocess.run(
        ["qemu-io", "-f", format, "-c", "write -P 7 1M 1M", made], check=True, timeout=60, capture_output=True
    )
    original = made.read_bytes()
    chance = random.Random(format)
    complaints: list[str] = []
    buffer = bytearray(2 * MIB)
    for number in range(ROUNDS):
        path = tmp_path / f"{number}.{format}"
        path.write_bytes(mutated(original, chance))
        before = time.process_time()
        try:
            with trio.fail_after(LIMIT * 4):
                source = await open_backing(Reference(str(path), format, "/leaf.qed"), Policy())
                try:
                    await source.read_into(0, memoryview(buffer)[: min(source.size, len(buffer))])
                finally:
                    await source.aclose()
        except QedfsError as error:
            complaints.append(str(error).removeprefix(f"{path}: "))
        assert time.process_time() - before < LIMIT, path
    assert not [line for line in complaints if "\n" in line or str(tmp_path) in line]
    assert 0 < len(complaints) < ROUNDS
