"""Ways around the rule of trust, each tried: what an image may name is judged from who answers for it, on open files."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from pathlib import Path

import pytest

from qedfs.backing.policy import Policy
from qedfs.config import MountOptions
from qedfs.errors import BackingRefused, NotAllowed, QedfsError
from qedfs.session.admission import Terms, admitted
from tests.policy.people import (
    MALLORY,
    NOBODY,
    ROOT,
    SECRET,
    folder,
    give,
    image,
    link,
    open_backing_of,
    secret,
    served,
    start_of,
)

# --- the file as the owner of the image could open it -----------------------------------------------------------------


@pytest.mark.parametrize("owner", [NOBODY, MALLORY])
async def test_a_readable_file_in_a_closed_folder_stays_closed(shared: Path, owner: int) -> None:
    closed = folder(shared / "closed", mode=0o700)
    target = secret(closed / "readable", mode=0o644)
    leaf = await image(shared / "leaf.qed", target, owner)
    with pytest.raises(NotAllowed, match="Permission denied"):
        await open_backing_of(leaf, target)
    give(closed, ROOT, 0o711)
    assert await start_of(await open_backing_of(leaf, target)) == SECRET


@pytest.mark.parametrize("owner", [NOBODY, MALLORY])
async def test_what_this_process_has_open_is_no_way_into_a_closed_folder(shared: Path, owner: int) -> None:
    # Of its own descriptors a thread of ours may follow the links in /proc, whoever it plays.
    target = secret(folder(shared / "closed", mode=0o700) / "readable", mode=0o644)
    with target.open("rb") as held:
        name = f"/proc/self/fd/{held.fileno()}"
        disguised = link(shared / "innocent.raw", name, owner)
        for backing in (name, f"/proc/{os.getpid()}/fd/{held.fileno()}", f"/dev/fd/{held.fileno()}", disguised):
            leaf = await image(shared / "leaf.qed", backing, owner)
            with pytest.raises(NotAllowed):
                await open_backing_of(leaf, backing)
            leaf.unlink()


async def test_the_root_of_another_process_is_no_way_in(shared: Path) -> None:
    target = secret(folder(shared / "closed", mode=0o700) / "readable", mode=0o644)
    name = f"/proc/{os.getppid()}/root{target}"
    leaf = await image(shared / "leaf.qed", name, MALLORY)
    with pytest.raises(QedfsError):
        await open_backing_of(leaf, name)


async def test_dots_do_not_lead_out_of_a_closed_folder_or_into_it(shared: Path) -> None:
    target = secret(folder(shared / "closed", mode=0o700) / "readable", mode=0o644)
    home = folder(shared / "home", MALLORY)
    for name in ("../closed/readable", f"../home/../../{shared.name}/closed/readable", f"{home}/../closed/readable"):
        leaf = await image(home / "leaf.qed", name, MALLORY)
        with pytest.raises(NotAllowed, match="Permission denied"):
            await open_backing_of(leaf, name)
        leaf.unlink()
    assert target.exists()


async def test_groups_are_those_of_the_owner_and_not_ours(shared: Path) -> None:
    target = secret(shared / "of-the-group", mode=0o640)  # group root, which this process has
    leaf = await image(shared / "leaf.qed", target, MALLORY)
    with pytest.raises(NotAllowed, match="Permission denied"):
        await open_backing_of(leaf, target)


async def test_rights_taken_for_one_file_are_given_back(shared: Path) -> None:
    leaf = await image(shared / "leaf.qed", "x", MALLORY)
    with pytest.raises(QedfsError):
        await open_backing_of(leaf, secret(shared / "x"))
    assert (os.getresuid(), os.getresgid()) == ((0, 0, 0), (0, 0, 0))
    own = await image(shared / "own.qed", shared / "x")
    assert await start_of(await open_backing_of(own, shared / "x")) == SECRET


async def test_an_ordinary_mounter_lends_no_rights_to_another_ones_image(shared: Path) -> None:
    target = secret(shared / "x", mode=0o644)
    leaf = await image(shared / "leaf.qed", target, MALLORY)
    with pytest.raises(NotAllowed, match=f"belongs to user {MALLORY}"):
        await open_backing_of(leaf, target, Policy(mounter=NOBODY))


# --- who may write the image ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o620, 0o602])
async def test_an_image_that_others_may_write_names_nothing(shared: Path, mode: int) -> None:
    target = secret(shared / "x", mode=0o644)
    leaf = await image(shared / "leaf.qed", target, ROOT, mode)
    with pytest.raises(NotAllowed, match="may be written by its group or by others"):
        await open_backing_of(leaf, target)
    assert await start_of(await open_backing_of(leaf, target, Policy(ROOT, (str(target),)))) == SECRET


async def test_an_access_list_that_lets_another_user_write_takes_the_trust_away(shared: Path) -> None:
    target = secret(shared / "x")
    leaf = await image(shared / "leaf.qed", target)
    os.setxattr(leaf, "system.posix_acl_access", _acl(MALLORY, 0o6))
    with pytest.raises(NotAllowed, match="may be written by its group or by others"):
        await open_backing_of(leaf, target)
    os.setxattr(leaf, "system.posix_acl_access", _acl(MALLORY, 0o4))
    assert await start_of(await open_backing_of(leaf, target)) == SECRET


def _acl(uid: int, rights: int) -> bytes:
    """Return an access list that gives `uid` `rights` (acl(5); layout: linux/posix_acl_xattr.h)."""
    user_obj, user, group_obj, mask, other, nobody = 1, 2, 4, 16, 32, 0xFFFFFFFF
    entries = [(user_obj, 6, nobody), (user, rights, uid), (group_obj, 4, nobody), (mask, 6 & (rights | 4), nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in [*entries, (other, 4, nobody)])


# --- images of a chain speak for themselves, and only where they lie -----------------------------------------------------


async def test_a_link_to_a_trusted_image_does_not_move_its_relative_names(shared: Path) -> None:
    # Root's image says "base.raw" and means the one beside it. Mallory puts a link to it beside a base of hers.
    roots = folder(shared / "root")
    secret(roots / "base.raw").write_bytes(b"the real base".ljust(512))
    middle = await image(roots / "middle.qed", "base.raw")
    home = folder(shared / "home", MALLORY)
    link(home / "middle.qed", middle, MALLORY)
    link(home / "base.raw", secret(shared / "shadow"), MALLORY)
    leaf = await image(home / "leaf.qed", "middle.qed", MALLORY, raw=False)
    assert (await start_of(await open_backing_of(leaf, "middle.qed"))).startswith(b"the real base")


async def test_a_linked_leaf_does_not_move_its_relative_names_either(shared: Path) -> None:
    roots = folder(shared / "root")
    secret(roots / "base.raw").write_bytes(b"the real base".ljust(512))
    home = folder(shared / "home", MALLORY)
    leaf = link(home / "leaf.qed", await image(roots / "leaf.qed", "base.raw"), MALLORY)
    link(home / "base.raw", secret(shared / "shadow"), MALLORY)
    async with admitted(str(leaf), Terms(MountOptions(), "/nowhere", ROOT)) as (disk, _):
        assert bytes(await disk.read(0, 13)) == b"the real base"


async def test_a_trusted_image_in_a_strangers_folder_lends_it_no_rights(shared: Path) -> None:
    # Moved there or hard-linked: what lies beside it is not what its owner meant.
    home = folder(shared / "home", MALLORY)
    os.link(await image(shared / "middle.qed", "base.raw"), home / "middle.qed")
    link(home / "base.raw", secret(shared / "shadow"), MALLORY)
    leaf = await image(home / "leaf.qed", "middle.qed", MALLORY, raw=False)
    with pytest.raises(NotAllowed):
        await open_backing_of(leaf, "middle.qed")


async def test_an_untrusted_image_below_a_trusted_one_is_not_trusted(shared: Path) -> None:
    shadow = secret(shared / "shadow")
    middle = await image(shared / "middle.qed", shadow, MALLORY)
    leaf = await image(shared / "leaf.qed", middle, raw=False)
    with pytest.raises(NotAllowed, match="Permission denied"):
        await open_backing_of(leaf, middle)


# --- what is swapped between the look and the opening -------------------------------------------------------------------


async def test_a_link_swapped_while_it_is_judged_opens_only_what_was_judged(shared: Path) -> None:
    home = folder(shared / "home", MALLORY)
    mine = secret(home / "mine", MALLORY)
    mine.write_bytes(b"mine".ljust(512))
    shadow = secret(folder(shared / "closed", mode=0o700) / "shadow", mode=0o644)
    name = home / "base.raw"
    leaf = await image(home / "leaf.qed", name, MALLORY)
    link(name, mine, MALLORY)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for target in (shadow, mine):
                (home / "next").symlink_to(target)
                (home / "next").rename(name)

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = {"refused": 0, "mine": 0}
    try:
        for _ in range(300):
            try:
                content = await start_of(await open_backing_of(leaf, name))
            except NotAllowed:
                seen["refused"] += 1
            else:
                assert content.startswith(b"mine")
                seen["mine"] += 1
    finally:
        stop.set()
        swapping.join()
    assert all(seen.values()), seen


# --- what is no file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [ROOT, MALLORY])
async def test_what_is_no_file_is_refused_without_being_opened(shared: Path, uid: int) -> None:
    fifo = shared / "fifo"
    os.mkfifo(fifo)
    device = shared / "watchdog"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(10, 130))
    unix = shared / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(unix))
        listener.listen()
        listener.setblocking(False)
        for path in (fifo, device, unix, shared, Path("/dev/zero"), link(shared / "link", fifo, uid)):
            if not path.is_symlink():
                os.chmod(path, 0o777) if path.parent == shared else None
            leaf = await image(shared / "leaf.qed", path, uid)
            with pytest.raises(BackingRefused, match="is neither a regular file nor a block device"):
                await open_backing_of(leaf, path)
            leaf.unlink()
        with pytest.raises(BlockingIOError):
            listener.accept()
    # A FIFO that was opened for reading would let a writer in.
    with pytest.raises(OSError, match="No such device or address"):
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


# --- sockets and servers ------------------------------------------------------------------------------------------------


async def test_a_strangers_image_makes_nobody_connect_to_a_socket_or_server(shared: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.create_server(("127.0.0.1", 0)) as server:
        listener.bind(str(shared / "socket"))
        os.chmod(shared / "socket", 0o777)
        listener.listen()
        port = server.getsockname()[1]
        for held in (listener, server):
            held.setblocking(False)
        names = [f"nbd+unix:///?socket={shared}/socket", f"nbd:unix:{shared}/socket", f"nbd://127.0.0.1:{port}/x"]
        names.append(f'json:{{"driver":"nbd","server":{{"type":"unix","path":"{shared}/socket"}}}}')
        for uid, mode in ((MALLORY, 0o644), (ROOT, 0o664)):
            for name in names:
                leaf = await image(shared / "leaf.qed", name, uid, mode)
                with pytest.raises(NotAllowed, match="it may name only what allow_backing names"):
                    await open_backing_of(leaf, name)
                leaf.unlink()
        for held in (listener, server):
            with pytest.raises(BlockingIOError):
                held.accept()


@pytest.mark.parametrize("patterns", [(), ("*",)])
@pytest.mark.parametrize(
    "name", ["{}/shadow", "shadow", "../shadow", "file:{}/shadow", 'json:{{"driver":"file","filename":"{}/shadow"}}',
             "nbd+unix:///?socket={}/socket", "nbd:unix:{}/socket"],
)  # fmt: skip
async def test_an_image_read_from_a_server_names_nothing_local(
    shared: Path, name: str, patterns: tuple[str, ...]
) -> None:
    secret(shared / "shadow")
    remote = await image(shared / "remote.qed", name.format(shared))
    async with served(remote) as address:
        leaf = await image(shared / "leaf.qed", address, raw=False)
        with pytest.raises(BackingRefused, match=r"may not name anything local|a relative name has no meaning"):
            await open_backing_of(leaf, address, Policy(ROOT, patterns))


async def test_an_image_read_from_a_server_sends_us_to_no_other_server(shared: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        remote = await image(shared / "remote.qed", f"nbd://127.0.0.1:{other.getsockname()[1]}/x")
        async with served(remote) as address:
            leaf = await image(shared / "leaf.qed", address, raw=False)
            for patterns in ((), (address,)):
                with pytest.raises(NotAllowed, match="allow_backing"):
                    await open_backing_of(leaf, address, Policy(ROOT, patterns))
        with pytest.raises(BlockingIOError):
            other.accept()
