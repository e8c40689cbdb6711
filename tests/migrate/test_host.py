"""What a migration does on its own host, with real mounts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from contrib.boot.server import serving
from qedfs.errors import BackingUnavailable, LeafError, MigrationFailed
from qedfs.migrate import host
from qedfs.migrate.host import LocalHost
from qedfs.migrate.plan import Order
from tests.cli.commands import mounted, qedfs

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(range(256)) * (MIB // 256))
    return base


@pytest.fixture
def local() -> LocalHost:
    return LocalHost(lambda images: None)


@pytest.fixture
def held(base: Path, tmp_path: Path) -> Iterator[Path]:
    """The disk of a held leaf on a file."""
    qedfs("create", "--hold", "-b", base, "-F", "raw", tmp_path / "vm.qed")
    with mounted(tmp_path / "vm.qed", tmp_path / "mnt") as mnt:
        yield mnt / "vm.raw"


async def test_an_export_that_has_gone_is_told(base: Path, tmp_path: Path, local: LocalHost) -> None:
    with serving(base, "nbdkit", "unix", tmp_path) as url:
        order = Order(str(tmp_path / "vm.qed"), "/mnt", "/mnt/vm.raw", url, "tcp:h:1", "tcp:h:1")
        await local.probe(order)
    with pytest.raises(BackingUnavailable, match=r"nbd\.socket"):
        await local.probe(order)


async def test_the_hold_is_released_and_the_disk_completes(held: Path, local: LocalHost) -> None:
    await local.set(str(held), "hold", "0")
    await local.set(str(held), "mode", "stream")
    await local.complete(str(held))
    assert os.getxattr(held, "user.qedfs.state") == b"complete"


async def test_a_command_that_fails_says_why(tmp_path: Path, local: LocalHost) -> None:
    with pytest.raises(MigrationFailed, match=r"^create: .*none\.raw: cannot be opened"):
        await local.run(("create", "-b", str(tmp_path / "none.raw"), str(tmp_path / "vm.qed")))


async def test_a_mount_that_somebody_uses_is_detached_and_told(
    base: Path, tmp_path: Path, local: LocalHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "BUSY_PATIENCE", 0.0)
    leaf, mnt = tmp_path / "vm.qed", tmp_path / "mnt"
    mnt.mkdir()
    await local.run(("create", "--hold", "-b", str(base), "-F", "raw", str(leaf)))
    await local.run(("mount", "--log-file", f"{mnt}.log", str(leaf), str(mnt)))
    with (mnt / "vm.raw").open("rb") as user:
        assert f"(pid {os.getpid()})" in await local.unmount(str(mnt))
        assert not os.path.ismount(mnt)
        await local.remove(str(leaf))
        assert user.read(3) == b"\0\1\2", "served until the last close"
    assert not leaf.exists()
    assert await local.unmount(str(mnt)) == "its server had ended"


async def test_a_leaf_that_cannot_be_removed_is_told(tmp_path: Path, local: LocalHost) -> None:
    with pytest.raises(LeafError, match="cannot be removed, and must not be used"):
        await local.remove(str(tmp_path / "none.qed"))
