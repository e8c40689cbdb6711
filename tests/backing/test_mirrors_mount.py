"""Leaves whose backing has mirrors, with real servers and mounts: create, mount, info, rebase, failing over, caches, policy."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from contrib.boot.server import free_port
from qedfs.backing.locate import Reference, Route, open_backing
from qedfs.backing.policy import Policy
from qedfs.errors import BackingRefused, NotAllowed
from tests.backing.samples import KIB, Serve, content_by_qemu, make_qed, random_bytes
from tests.backing.scripted_web import Handler, ScriptedWeb, scripted_web, status
from tests.backing.test_http_mount import attribute, eventually
from tests.cli.commands import QEDFS, mounted, qedfs, qedfs_json, refused

CONTENT = random_bytes(300_032, 1)
OPTIONS = "readahead=0,boot_profile=off"


@pytest.fixture
def webs(no_habits: None) -> Iterator[list[ScriptedWeb]]:
    with ExitStack() as servers:
        yield [servers.enter_context(scripted_web(CONTENT)) for _ in range(2)]


def name_of(webs: list[ScriptedWeb]) -> str:
    return "mirrors:" + "|".join(f"{web.url}/base.raw?sig=secret" for web in webs)


def read_at(disk: Path, pos: int) -> None:
    with disk.open("rb", buffering=0) as file:
        file.seek(pos)
        assert file.read(4096) == CONTENT[pos : pos + 4096]


def parts(web: ScriptedWeb) -> int:
    """Return how many longer parts than a sample were asked for."""
    return sum(_length(request.headers["Range"]) > 4096 for request in web.requests)


def _length(header: str) -> int:
    first, last = header.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def test_a_leaf_is_made_mounted_read_past_a_failure_and_streamed(webs: list[ScriptedWeb], tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qed"
    said = qedfs("create", "-b", name_of(webs), leaf)[0]
    assert "secret" not in said
    info = qedfs_json("info", leaf)
    assert info["backing-pin"]["tag"].startswith("mirrors:")
    assert "secret" not in str(info)
    first, second = webs
    with mounted(leaf, tmp_path / "mnt0", OPTIONS) as mnt:
        disk = mnt / "leaf.raw"
        assert "secret" not in attribute(disk, "backing")
        # The second one has been compared, and stands by.
        eventually(lambda: len(second.requests) > 16 + 1 + 16)
        read_at(disk, 0)
        assert parts(second) == 0
        first.always = status(503)
        read_at(disk, 128 * KIB)
        assert parts(second) == 1
        assert "status 503" in attribute(disk, "last_error")
        assert "secret" not in attribute(disk, "last_error")
        assert attribute(disk, "state") == "passive"
        qedfs("set", disk, "mode=stream")
        qedfs("wait", "--timeout", "30", disk)
    assert content_by_qemu(leaf)[: len(CONTENT)] == CONTENT


def test_it_mounts_with_one_and_refuses_when_each_has_changed(webs: list[ScriptedWeb], tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qed"
    qedfs("create", "-b", name_of(webs), leaf)
    first, second = webs
    first.always = status(503)
    with mounted(leaf, tmp_path / "mnt1", OPTIONS) as mnt:
        read_at(mnt / "leaf.raw", 0)
    first.always = Handler.part
    first.headers["ETag"] = '"other"'
    with mounted(leaf, tmp_path / "mnt2", OPTIONS) as mnt:
        read_at(mnt / "leaf.raw", 128 * KIB)
        assert "is not what the image was made on" in attribute(mnt / "leaf.raw", "last_error")
    second.headers["ETag"] = '"another"'
    (tmp_path / "mnt3").mkdir()
    line = [*QEDFS, "mount", str(leaf), str(tmp_path / "mnt3")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    warning, said = done.stderr.splitlines()
    assert done.returncode == 1
    assert warning.endswith("this mirror is left out")
    assert "is not what the image was made on" in said
    assert "trust_backing" in said
    assert "secret" not in done.stderr


def test_what_is_no_mirror_makes_no_leaf(webs: list[ScriptedWeb], tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qed"
    webs[1].content = CONTENT[:-1] + b"!"
    assert "holds other bytes than" in refused("create", "-b", name_of(webs), leaf)
    webs[1].content = CONTENT[:-512]
    assert "has 299520 bytes, the backing 300032" in refused("create", "-b", name_of(webs), leaf)
    webs[1].content = CONTENT
    assert "cannot have mirrors" in refused("create", "--hold", "-b", name_of(webs), leaf)
    port = free_port()
    assert "cannot connect" in refused("create", "-b", f"mirrors:{webs[0].url}/x|http://127.0.0.1:{port}/x", leaf)
    assert not leaf.exists()


def test_a_leaf_of_one_server_gets_a_mirror_by_rebase(webs: list[ScriptedWeb], tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qed"
    qedfs("create", "-b", f"{webs[0].url}/base.raw", leaf)
    qedfs("rebase", "-b", name_of(webs), leaf)
    webs[0].always = status(503)
    with mounted(leaf, tmp_path / "mnt3", OPTIONS) as mnt:
        read_at(mnt / "leaf.raw", 0)


def test_leaves_share_one_cache_of_mirrors(webs: list[ScriptedWeb], tmp_path: Path) -> None:
    folder = tmp_path / "leaves"
    folder.mkdir()
    for leaf in ("one", "two"):
        qedfs("create", "-b", name_of(webs), folder / f"{leaf}.qed")
    with mounted(folder, tmp_path / "shared0", f"{OPTIONS},shared_cache={tmp_path}/cache") as mnt:
        read_at(mnt / "one.raw", 0)
        webs[0].always = status(503)
        read_at(mnt / "one.raw", 64 * KIB)
        read_at(mnt / "two.raw", 64 * KIB)
        assert attribute(mnt / "two.raw", "backing_bytes_read") == "0"
    assert parts(webs[1]) == 1
    # The cache is known again at the next mount, whichever mirror works then.
    webs[1].requests.clear()
    with mounted(folder, tmp_path / "shared1", f"{OPTIONS},shared_cache={tmp_path}/cache") as mnt:
        read_at(mnt / "two.raw", 0)
    assert parts(webs[1]) == 0


def test_a_leaf_that_knows_less_of_its_mirrors_lets_none_into_the_cache_of_another(
    webs: list[ScriptedWeb], tmp_path: Path
) -> None:
    folder = tmp_path / "leaves"
    folder.mkdir()
    first, second = webs
    qedfs("create", "-b", name_of(webs), folder / "pinned.qed")
    make_qed(folder / "new.qed", "-u", "-b", name_of(webs), "-F", "raw", "300032")
    second.headers["ETag"] = '"other"'
    options = f"{OPTIONS},backing_timeout=1,shared_cache={tmp_path}/cache"
    with mounted(folder, tmp_path / "mnt6", options) as mnt:
        read_at(mnt / "new.raw", 0)
        read_at(mnt / "pinned.raw", 0)
        eventually(lambda: "is not what the image was made on" in attribute(mnt / "pinned.raw", "last_error"))
        eventually(lambda: len(second.requests) > 16)
        first.always = status(503)
        read_at(mnt / "new.raw", 128 * KIB)
        with pytest.raises(OSError, match="Input/output error"):
            read_at(mnt / "pinned.raw", 128 * KIB)


async def test_mirrors_may_be_on_different_transports_and_be_qed_images(
    webs: list[ScriptedWeb], serve: Serve, tmp_path: Path
) -> None:
    image = make_qed(tmp_path / "base.qed", "1M", commands=["write -P 1 3k 200k"])
    webs[0].content = image.read_bytes()
    name = f"mirrors:{webs[0].url}/base.qed|{serve('file', image)}"
    source = await open_backing(Reference(name, None, "/leaf.qed"), Policy())
    assert source.format == "qed"
    assert not source.tells_content  # one of them tells only its size
    buffer = bytearray(source.size)
    await source.read_into(0, memoryview(buffer))
    assert buffer == content_by_qemu(image)
    await source.aclose()


# --- who may name them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0, 1])
async def test_every_mirror_must_be_allowed_before_any_is_asked(
    webs: list[ScriptedWeb], tmp_path: Path, allowed: int
) -> None:
    policy = Policy(allow_backing=(f"{webs[allowed].url}/*",))
    reference = Reference(name_of(webs), "raw", str(tmp_path / "leaf.qed"))
    with pytest.raises(NotAllowed, match="no pattern of allow_backing matches it"):
        await Route(reference, policy, None, changing=False).open()
    assert not webs[0].requests
    assert not webs[1].requests
    both = Policy(allow_backing=tuple(f"{web.url}/*" for web in webs))
    source = await Route(reference, both, None, changing=False).open()
    await source.aclose()


async def test_an_untrusted_image_names_mirrors_only_if_they_are_allowed(
    webs: list[ScriptedWeb], tmp_path: Path
) -> None:
    image = tmp_path / "leaf.qed"
    image.write_bytes(b"")
    image.chmod(0o666)
    reference = Reference(name_of(webs), "raw", str(image), image.stat())
    with pytest.raises(NotAllowed, match="it may name only what allow_backing names"):
        await Route(reference, Policy(), None, changing=False).open()
    assert not webs[0].requests


async def test_an_image_below_cannot_have_mirrors(webs: list[ScriptedWeb], tmp_path: Path) -> None:
    image = make_qed(tmp_path / "middle.qed", "-u", "-b", name_of(webs), "-F", "raw", "1M")
    with pytest.raises(BackingRefused, match="only the image that is mounted can have mirrors") as caught:
        await open_backing(Reference(str(image), "qed", "/leaf.qed"), Policy())
    assert "secret" not in str(caught.value)


async def test_a_held_image_cannot_have_mirrors(webs: list[ScriptedWeb]) -> None:
    route = Route(Reference(name_of(webs), "raw", "/leaf.qed"), Policy(), None, changing=True)
    with pytest.raises(BackingRefused, match="a held image cannot have mirrors"):
        await route.open()


def test_the_pin_of_a_leaf_that_knew_only_one_is_completed(webs: list[ScriptedWeb], tmp_path: Path) -> None:
    leaf = make_qed(tmp_path / "leaf.qed", "-u", "-b", name_of(webs), "-F", "raw", "300032")
    with mounted(leaf, tmp_path / "mnt4", OPTIONS) as mnt:
        eventually(lambda: len(webs[1].requests) == 1 + 16)
        read_at(mnt / "leaf.raw", 0)
    known = qedfs_json("info", leaf)["backing-pin"]["tag"]
    assert known.endswith(",-")
    webs[0].always = status(503)
    with mounted(leaf, tmp_path / "mnt5", OPTIONS) as mnt:
        read_at(mnt / "leaf.raw", 0)
    assert "-" not in qedfs_json("info", leaf)["backing-pin"]["tag"]
    assert qedfs_json("info", leaf)["backing-pin"]["tag"].startswith(known[:-1])


@contextmanager
def exported(content: bytes, port: int, folder: Path) -> Iterator[None]:
    """Have nbdkit serve `content` on a port, of which nothing can be told but the size; killed at the end."""
    file, ready = folder / f"{port}.raw", folder / f"{port}.pid"
    file.write_bytes(content)
    ready.unlink(missing_ok=True)
    command = [
        "nbdkit",
        "--foreground",
        "--readonly",
        "-i",
        "127.0.0.1",
        "-p",
        str(port),
        "-P",
        str(ready),
        "file",
        str(file),
    ]
    with subprocess.Popen(command) as server:
        try:
            eventually(ready.exists)
            yield
        finally:
            server.kill()


def test_a_mirror_that_comes_back_with_other_content_is_not_read_though_it_is_the_only_one(tmp_path: Path) -> None:
    """Its NBD source connects anew by itself, and when it is needed nobody is there to compare it with."""
    ports = [free_port(), free_port()]
    other = random_bytes(len(CONTENT), 2)
    leaf, log = tmp_path / "leaf.qed", tmp_path / "mnt.log"
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(exported(CONTENT, ports[0], tmp_path))
        second.enter_context(exported(CONTENT, ports[1], tmp_path))
        name = "mirrors:" + "|".join(f"nbd://127.0.0.1:{port}/" for port in ports)
        qedfs("create", "-b", name, leaf)
        with mounted(leaf, tmp_path / "mnt", f"{OPTIONS},backing_timeout=3") as mnt:
            read_at(mnt / "leaf.raw", 0)
            eventually(lambda: "stands by" in log.read_text())
            second.close()
            with exported(other, ports[1], tmp_path):
                first.close()
                with pytest.raises(OSError, match="Input/output error"):
                    read_at(mnt / "leaf.raw", 131_072)
                assert "holds other bytes than before" in log.read_text()
                with exported(CONTENT, ports[0], tmp_path):
                    eventually(lambda: readable(mnt))
                    read_at(mnt / "leaf.raw", 131_072)
    assert log.read_text().count("left out") == 1


def readable(mnt: Path) -> bool:
    try:
        read_at(mnt / "leaf.raw", 262_144)
    except OSError:
        return False
    return True
