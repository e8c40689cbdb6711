"""From names to open chains: formats, loops, depth, and who may name what, with real files and servers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.backing import locate
from qedfs.backing.base import Source
from qedfs.backing.locate import MAX_DEPTH, Reference, open_backing, qedfs_devices
from qedfs.backing.policy import Policy
from qedfs.errors import BackingRefused, BackingUnavailable, NotAllowed
from tests.backing.samples import KIB, MIB, Serve, content_by_qemu, make_qed, random_bytes, run

NOBODY = 65534


async def open_named(name: object, format: str | None = None, policy: Policy | None = None) -> Source:
    """Open what a person at the command line named."""
    return await open_backing(Reference(str(name), format, "/leaf.qed"), policy or Policy())


async def open_backing_of(image: Path, name: object, policy: Policy | None = None) -> Source:
    """Open what the header of `image` names."""
    return await open_backing(Reference(str(name), None, str(image), image.stat()), policy or Policy())


async def content_of(source: Source) -> bytes:
    buffer = bytearray(source.size)
    await source.read_into(0, memoryview(buffer))
    await source.aclose()
    return bytes(buffer)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = descriptors()
    yield
    # Not more than before; fewer there may be, as connections of an object store of an earlier test end late.
    assert len(descriptors()) <= len(before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(random_bytes(MIB))
    return path


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    path = tmp_path / "leaf.qed"
    path.write_bytes(b"")
    path.chmod(0o644)
    return path


# ---- formats ----


async def test_a_format_that_is_not_told_is_seen_from_the_magic(tmp_path: Path, base: Path) -> None:
    image = make_qed(tmp_path / "i.qed", "1M", commands=["write -P 1 0 64k"])
    for path, format in ((base, "raw"), (image, "qed")):
        source = await open_named(path)
        assert source.format == format
        await source.aclose()


async def test_what_is_told_to_be_raw_is_never_looked_into(tmp_path: Path) -> None:
    image = make_qed(tmp_path / "i.qed", "1M")
    assert await content_of(await open_named(image, "raw")) == image.read_bytes()


async def test_the_no_probe_flag_of_a_layer_holds_for_the_next(tmp_path: Path) -> None:
    planted = make_qed(tmp_path / "planted.raw", "1M")
    image = make_qed(tmp_path / "i.qed", "-b", planted.name, "-F", "raw", "1M")
    size = planted.stat().st_size
    assert await content_of(await open_named(image)) == planted.read_bytes() + bytes(MIB - size)


async def test_a_layer_without_the_flag_has_its_backing_probed_as_qemu_does(tmp_path: Path) -> None:
    below = make_qed(tmp_path / "below.qed", "1M", commands=["write -P 5 64k 64k"])
    image = make_qed(tmp_path / "i.qed", "-b", below.name, "-F", "qed", "1M")
    assert await content_of(await open_named(image)) == content_by_qemu(image)


async def test_a_qcow2_is_seen_from_its_magic_unless_another_format_is_told(tmp_path: Path) -> None:
    image = tmp_path / "i.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    source = await open_named(image)
    assert source.format == "qcow2"
    assert await content_of(source) == bytes(MIB)
    assert await content_of(await open_named(image, "raw")) == image.read_bytes()


async def test_what_is_no_format_is_refused_in_one_line(base: Path) -> None:
    with pytest.raises(BackingRefused, match=r"base\.raw: the format ext4 is none of raw, qed, qcow2, "):
        await open_named(base, "ext4")
    with pytest.raises(BackingRefused, match="not a QED image"):
        await open_named(base, "qed")


async def test_a_file_of_less_than_a_magic_is_raw(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"QED")
    assert await content_of(await open_named(tmp_path / "x")) == b"QED"


# ---- chains ----


async def test_an_image_that_names_itself_is_a_loop(tmp_path: Path) -> None:
    image = make_qed(tmp_path / "i.qed", "-u", "-b", "i.qed", "-F", "qed", "1M")
    with pytest.raises(BackingRefused, match=r"i\.qed: the chain of backings leads back to it"):
        await open_named(image)


async def test_a_loop_is_seen_through_links_and_over_several_images(tmp_path: Path) -> None:
    make_qed(tmp_path / "a.qed", "-u", "-b", "b.qed", "-F", "qed", "1M")
    make_qed(tmp_path / "b.qed", "-u", "-b", "link", "-F", "qed", "1M")
    os.link(tmp_path / "a.qed", tmp_path / "link")
    with pytest.raises(BackingRefused, match="leads back to it"):
        await open_named(tmp_path / "a.qed")


async def test_a_leaf_below_itself_is_a_loop(leaf: Path) -> None:
    with pytest.raises(BackingRefused, match=r"leaf\.qed: the chain of backings leads back to it"):
        await open_backing_of(leaf, "leaf.qed")


@pytest.mark.parametrize(("layers", "opens"), [(MAX_DEPTH - 1, True), (MAX_DEPTH, False)])
async def test_a_chain_has_at_most_sixty_four_backings(tmp_path: Path, base: Path, layers: int, opens: bool) -> None:
    template = make_qed(tmp_path / "t.qed", "-u", "-b", "0000.img", "-F", "qed", "1M").read_bytes()
    base.rename(tmp_path / "0000.img")
    for number in range(1, layers + 1):
        name = b"%04d.img" % (number - 1)
        (tmp_path / f"{number:04}.img").write_bytes(template.replace(b"0000.img", name))
    top = tmp_path / f"{layers:04}.img"
    if opens:
        assert await content_of(await open_named(top)) == random_bytes(MIB)
    else:
        with pytest.raises(BackingRefused, match="more than 64 deep"):
            await open_named(top)


async def test_a_chain_is_another_one_when_any_of_its_layers_is(tmp_path: Path, base: Path) -> None:
    image = make_qed(tmp_path / "i.qed", "-b", base.name, "-F", "raw", "1M")
    top = make_qed(tmp_path / "top.qed", "-b", image.name, "-F", "qed", "1M")

    async def identity() -> object:
        source = await open_named(top)
        await source.aclose()
        return source.identity

    before = await identity()
    assert await identity() == before
    os.utime(base, ns=(1, 1))
    assert await identity() != before


async def test_a_chain_over_nbd(tmp_path: Path, base: Path, serve: Serve) -> None:
    address = serve("file", base)
    image = make_qed(tmp_path / "i.qed", "-u", "-b", address, "-F", "raw", "1M", commands=[])
    with open(image, "rb") as file:
        assert address.encode() in file.read(4096)
    assert await content_of(await open_named(image)) == random_bytes(MIB)


async def test_a_server_that_is_not_there_may_come_back(tmp_path: Path) -> None:
    with pytest.raises(BackingUnavailable):
        await open_named(f"nbd+unix:///?socket={tmp_path}/nobody")


# ---- policy ----


async def test_a_remote_image_may_name_nothing_local(tmp_path: Path, base: Path, serve: Serve) -> None:
    for name, why in (
        (str(base), "may not name anything local"),
        ("nbd+unix:///?socket=/run/x", "may not name anything local"),
        ("nbd://127.0.0.1:1/x", "may name only what allow_backing names"),
    ):
        image = make_qed(tmp_path / "remote.qed", "-u", "-b", name, "-F", "raw", "1M")
        with pytest.raises(NotAllowed, match=why):
            await open_named(serve("file", image))


async def test_a_remote_image_with_a_relative_name_is_refused(tmp_path: Path, serve: Serve) -> None:
    image = make_qed(tmp_path / "remote.qed", "-u", "-b", "base.raw", "-F", "raw", "1M")
    with pytest.raises(BackingRefused, match="a relative name has no meaning"):
        await open_named(serve("file", image))


async def test_a_group_writable_leaf_names_nothing_by_itself(leaf: Path, base: Path) -> None:
    leaf.chmod(0o664)
    with pytest.raises(NotAllowed, match="may be written by its group or by others"):
        await open_backing_of(leaf, base)
    source = await open_backing_of(leaf, base, Policy(allow_backing=(str(base.parent) + "/*",)))
    await source.aclose()


async def test_a_pattern_is_held_against_the_real_path(tmp_path: Path, leaf: Path, base: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link.raw").symlink_to(base)
    policy = Policy(allow_backing=(f"{allowed}/*",))
    for name in (base, allowed / "link.raw", f"{allowed}/../base.raw"):
        with pytest.raises(NotAllowed, match=f"{base}: no pattern of allow_backing matches it"):
            await open_backing_of(leaf, name, policy)


async def test_a_pattern_is_held_against_the_canonical_address(leaf: Path) -> None:
    policy = Policy(allow_backing=("nbd://host/allowed/*",))
    with pytest.raises(NotAllowed, match="nbd://host/secret"):
        await open_backing_of(leaf, "nbd:host:10809:exportname=secret", policy)


async def test_a_backing_under_the_mountpoint_is_refused(tmp_path: Path, leaf: Path, base: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    (mountpoint / "base.raw").write_bytes(b"x" * KIB)
    (tmp_path / "link").symlink_to(mountpoint)
    policy = Policy(forbidden_roots=(str(mountpoint),))
    for name in ("mnt/base.raw", "link/base.raw", f"{tmp_path}/x/../mnt/base.raw"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(NotAllowed, match="lies under the mountpoint"):
            await open_backing_of(leaf, name, policy)
    await (await open_backing_of(leaf, "base.raw", policy)).aclose()


def test_the_mounts_of_qedfs_are_known_by_their_device() -> None:
    mounts = [
        "36 25 0:31 / /mnt/with\\040blank rw,nosuid shared:1 master:2 - fuse.qedfs /images rw,user_id=0\n",
        "37 25 0:32 / /mnt/fuse.qedfs rw - fuse.sshfs host: rw\n",
        "38 25 254:1 / / rw - ext4 /dev/vda1 rw\n",
    ]
    assert qedfs_devices(mounts) == {os.makedev(0, 31)}


async def test_a_file_on_a_qedfs_mount_is_refused(leaf: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "qedfs_devices", lambda mounts: {base.stat().st_dev})
    with pytest.raises(NotAllowed, match="lies on a qedfs mount; name the image under it instead"):
        await open_backing_of(leaf, base)


async def test_every_image_of_a_chain_decides_with_its_own_rights(tmp_path: Path, leaf: Path, base: Path) -> None:
    middle = make_qed(tmp_path / "middle.qed", "-b", base.name, "-F", "raw", "1M")
    middle.chmod(0o666)
    with pytest.raises(NotAllowed, match=f"{base}: the image that names it may be written by its group or by others"):
        await open_backing_of(leaf, middle)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can own files as somebody else")
async def test_a_strangers_leaf_opens_what_the_stranger_could() -> None:
    folder = Path("/tmp") / f"qedfs-locate-{os.getpid()}"  # pytest's own folders are closed to others
    folder.mkdir(mode=0o755)
    try:
        folder.chmod(0o755)
        leaf, base = folder / "leaf.qed", folder / "base.raw"
        for path in (leaf, base):
            path.write_bytes(random_bytes(KIB))
            path.chmod(0o600)
        os.chown(leaf, NOBODY, NOBODY)
        with pytest.raises(NotAllowed, match="Permission denied"):
            await open_backing_of(leaf, base)
        with pytest.raises(NotAllowed, match="Permission denied"):
            await open_backing_of(leaf, base, Policy(allow_backing=("*",)))
        with pytest.raises(NotAllowed, match="belongs to user 65534"):
            await open_backing_of(leaf, "nbd://127.0.0.1:1/x")
        with pytest.raises(NotAllowed, match="belongs to user 65534"):
            await open_backing_of(leaf, base, Policy(mounter=1000))
        os.chown(base, NOBODY, NOBODY)
        assert await content_of(await open_backing_of(leaf, base)) == random_bytes(KIB)
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)
