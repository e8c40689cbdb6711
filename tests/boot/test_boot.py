"""A machine boots from the mount of a leaf over NBD; `contrib.boot.boot` checks the outcome with the field's own tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrib.boot.boot import Options, boot
from contrib.boot.guest import Guest


# Below the limit at which a stuck run as a whole is ended; usually one boot takes some 15 seconds.
@pytest.mark.timeout(220)
@pytest.mark.parametrize(
    "options",
    [
        Options(cache="none", server="qemu-nbd", transport="tcp", timeout=150),
        Options(cache="writeback", server="nbdkit", transport="unix", timeout=150),
    ],
    ids=lambda options: f"{options.cache}-{options.server}-{options.transport}",
)
def test_guest_boots_from_the_mount_and_what_it_wrote_is_in_the_leaf(
    guest: Guest, options: Options, tmp_path: Path
) -> None:
    boot(guest, options, tmp_path)
