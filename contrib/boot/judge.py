"""Judge a run from outside, with the tools of the field: is the image sound, and is on it exactly what must be there?"""

from __future__ import annotations

import hashlib
from pathlib import Path

from contrib.boot.guest import BootError, run, sums_of


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_leaf(leaf: Path) -> None:
    """Raise BootError unless `qemu-img check` finds the QED image without an error and without a leak."""
    run("qemu-img", "check", "-q", "-f", "qed", leaf)


def check_files(leaf: Path, expected: dict[str, str], folder: Path) -> None:
    """Raise BootError unless the disk of `leaf` has a clean ext4 with exactly the `expected` files (path: SHA-256).

    The backing must be reachable. `folder` gets a raw copy of the disk and of its files.
    """
    raw, tree = folder / "after.raw", folder / "after"
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", leaf, raw)
    run("e2fsck", "-fn", raw)
    tree.mkdir()
    run("debugfs", "-R", f'rdump / "{tree}"', raw)
    found = sums_of(tree)
    wrong = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
    if wrong:
        states = (f"{path} {difference(path in expected, path in found)}" for path in wrong)
        raise BootError(f"the disk after the run: {', '.join(states)}")


def difference(is_expected: bool, is_found: bool) -> str:
    if not is_found:
        return "is missing"
    return "has other content" if is_expected else "should not be there"
