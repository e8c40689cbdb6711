"""What the guest finds on its disk and what it leaves there, file by file; `guest-init` is the same in the guest's words.

A tree of files is a mapping of absolute paths on the guest's disk to contents, or to SHA-256 sums in hexadecimal.
"""

from __future__ import annotations

import hashlib
import random

PARTS = 8
PART_BYTES = 4 << 20
PARTS_READ = 4
"""The guest reads the first so many parts from end to end, and pieces of others."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def seeded(name: str, length: int) -> bytes:
    """Return `length` bytes that look random, no compressor can shrink, and are the same for the same name everywhere."""
    return random.Random(name).randbytes(length)


def part(number: int) -> bytes:
    return seeded(f"part {number}", PART_BYTES)


def base_files() -> dict[str, bytes]:
    """Return the data files of the base image: 41 MiB."""
    files = {f"/base/part-{number}": part(number) for number in range(PARTS)}
    files["/base/overwritten"] = seeded("overwritten", 2 << 20)
    files["/base/scattered"] = seeded("scattered", 4 << 20)
    files["/base/zeroed"] = seeded("zeroed", 1 << 20)
    files["/base/removed"] = seeded("removed", 2 << 20)
    return files


def sums_after(base: dict[str, str], token: str) -> dict[str, str]:
    """Return the sums of all files on the disk after a run with `token`, given those of the base image."""
    part_6 = part(6)
    overwritten = bytearray(seeded("overwritten", 2 << 20))
    overwritten[501_000:1_201_000] = part_6[11_000:711_000]
    scattered = bytearray(seeded("scattered", 4 << 20))
    for page in range(16):
        target = (page * 61 + 7) * 4096
        scattered[target : target + 4096] = part_6[page * 4096 : (page + 1) * 4096]
    zeroed = bytearray(seeded("zeroed", 1 << 20))
    zeroed[3 << 16 : 11 << 16] = bytes(8 << 16)
    written = {
        "/guest/token": f"{token}\n".encode(),
        "/guest/base.sums": sum_lines({f"/base/part-{n}": sha256(part(n)) for n in range(PARTS_READ)}),
        "/guest/lines": "".join(f"{token} {n}\n" for n in range(1, 100_001)).encode(),
        "/guest/piece": part(5)[7_000:3_007_000],
        "/guest/zeros": bytes(1 << 20),
        "/base/overwritten": bytes(overwritten),
        "/base/scattered": bytes(scattered),
        "/base/zeroed": bytes(zeroed),
    }
    sums = {path: sha256(content) for path, content in written.items()}
    after = base | sums | {"/guest/SHA256SUMS": sha256(sum_lines(sums))}
    del after["/base/removed"]
    return after


def sum_lines(sums: dict[str, str]) -> bytes:
    """Return what `sha256sum` prints for these files."""
    return "".join(f"{value}  {path}\n" for path, value in sums.items()).encode()
