"""Leaves on web servers with real mounts: create, mount, info, rebase, outages, chains over several transports."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contrib.boot.server import serving
from tests.backing.samples import KIB, MIB, content_by_qemu, make_foreign, make_qed, random_bytes
from tests.backing.scripted_web import Act, Handler, ScriptedWeb, redirect, status
from tests.backing.web_servers import Web, nginx
from tests.cli.commands import QEDFS, mounted, qedfs, qedfs_json, refused
from tests.failing.rig import until
from tests.image.qemu import qemu_img

CONTENT = random_bytes(4 * MIB, 5)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def attribute(disk: Path, name: str) -> str:
    return os.getxattr(disk, f"user.qedfs.{name}").decode()


def mount_refused(leaf: Path, mountpoint: Path) -> str:
    mountpoint.mkdir(exist_ok=True)
    line = [*QEDFS, "mount", str(leaf), str(mountpoint)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_leaf_of_a_web_server_is_made_mounted_and_streamed(web: Web, tmp_path: Path) -> None:
    web.put("mount/disk one.raw", CONTENT)
    name = f"{web.secure}/mount/disk%20one.raw?signature=secret"
    leaf = tmp_path / "leaf.qed"
    said = qedfs("create", "-b", name, leaf)[0]
    assert "secret" not in said
    info = qedfs_json("info", leaf)
    assert info["virtual-size"] == len(CONTENT)
    assert info["backing-pin"]["size"] == len(CONTENT)
    assert info["backing-pin"]["tag"].startswith('etag:"')
    assert "secret" not in str(info)
    assert str(info["backing-filename"]).endswith("disk%20one.raw?***")
    with mounted(leaf, tmp_path / "mnt", "mode=stream,idle=always,reserve=0") as mnt:
        disk = mnt / "leaf.raw"
        assert "secret" not in attribute(disk, "backing")
        assert disk.read_bytes() == CONTENT
        qedfs("wait", "--timeout", "30", disk)
    assert content_by_qemu(leaf) == CONTENT
    assert "backing-filename" not in qedfs_json("info", leaf)


def test_a_file_that_was_replaced_is_refused_at_mount_and_while_mounted(tmp_path: Path) -> None:
    with nginx(tmp_path) as web:
        web.put("base.raw", CONTENT)
        os.utime(web.files / "base.raw", (1e9, 1e9))
        leaf = tmp_path / "leaf.qed"
        qedfs("create", "-b", f"{web.url}/base.raw", leaf)
        with mounted(leaf, tmp_path / "mnt", "readahead=0,boot_profile=off") as mnt:
            disk = mnt / "leaf.raw"
            with disk.open("rb", buffering=0) as file:
                assert file.read(64 * KIB) == CONTENT[: 64 * KIB]
                web.put("base.raw", CONTENT[::-1])
                file.seek(3 * MIB)
                with pytest.raises(OSError, match="Input/output error"):
                    file.read(64 * KIB)
                file.seek(0)
                assert file.read(64 * KIB) == CONTENT[: 64 * KIB]
            assert "has been replaced" in attribute(disk, "last_error")
            assert attribute(disk, "state") == "backing-error"
        assert "is not what the image was made on" in mount_refused(leaf, tmp_path / "again")


def test_an_outage_stalls_reads_and_heals_and_what_is_local_is_served_throughout(tmp_path: Path) -> None:
    with nginx(tmp_path) as web:
        web.put("base.raw", CONTENT)
        leaf = tmp_path / "leaf.qed"
        qedfs("create", "-b", f"{web.url}/base.raw", leaf)
        with mounted(leaf, tmp_path / "mnt", "readahead=0,boot_profile=off") as mnt:
            disk = mnt / "leaf.raw"
            with disk.open("rb", buffering=0) as file:
                assert file.read(64 * KIB) == CONTENT[: 64 * KIB]
                web.stop()
                command = ["dd", f"if={disk}", "bs=64k", "skip=40", "count=1", "status=none"]
                with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
                    eventually(lambda: "Connection refused" in attribute(disk, "last_error"))
                    file.seek(0)
                    assert file.read(64 * KIB) == CONTENT[: 64 * KIB]
                    assert reader.poll() is None
                    web.start()
                    assert reader.communicate(timeout=30)[0] == CONTENT[40 * 64 * KIB : 41 * 64 * KIB]


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (lambda h: h.answer(200, CONTENT), "the server sends no parts of a file"),
        (
            lambda h: h.answer(200, CONTENT, {"Content-Length": "", "Transfer-Encoding": "chunked"}),
            "nor does it tell the length",
        ),
        (lambda h: h.part(headers={"Content-Encoding": "gzip"}), "sends it compressed (gzip)"),
        (status(401), "it wants credentials (status 401)"),
    ],
)
def test_a_server_that_cannot_be_a_backing_is_one_line_from_create_and_from_mount(
    scripted: ScriptedWeb, tmp_path: Path, act: Act, why: str
) -> None:
    name, made = f"{scripted.url}/base.raw?sig=secret", tmp_path / "made.qed"
    qedfs("create", "-b", name, made)
    scripted.always = act
    for said in (refused("create", "-b", name, tmp_path / "leaf.qed"), mount_refused(made, tmp_path / "mnt")):
        assert why in said
        assert "secret" not in said
    assert not (tmp_path / "leaf.qed").exists()


@pytest.mark.parametrize("code", [401, 403])
def test_a_name_that_expires_while_mounted_is_told_and_what_is_local_stays(
    scripted: ScriptedWeb, tmp_path: Path, code: int
) -> None:
    scripted.content = CONTENT
    leaf = tmp_path / "leaf.qed"
    qedfs("create", "-b", f"{scripted.url}/base.raw?sig=secret", leaf)
    with mounted(leaf, tmp_path / "mnt", "readahead=0,boot_profile=off,reserve=0") as mnt:
        disk = mnt / "leaf.raw"
        with disk.open("rb", buffering=0) as file:
            assert file.read(64 * KIB) == CONTENT[: 64 * KIB]
            scripted.always = status(code)
            file.seek(3 * MIB)
            with pytest.raises(OSError, match="Input/output error"):
                file.read(64 * KIB)
            file.seek(0)
            assert file.read(64 * KIB) == CONTENT[: 64 * KIB]
        qedfs("set", disk, "mode=stream")
        error = attribute(disk, "last_error")
        assert f"(status {code})" in error
        assert "secret" not in error
        assert attribute(disk, "state") == "backing-error"
        assert f"(status {code})" in qedfs("wait", disk, status=1)[1]


def test_a_redirect_to_signed_urls_that_expire_is_not_noticed(scripted: ScriptedWeb, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qed"
    valid = [1]

    def act(handler: Handler) -> None:
        if handler.path == f"/signed?{valid[0]}":
            handler.part()
        elif handler.path.startswith("/signed"):
            handler.answer(403)
        else:
            redirect(f"/signed?{valid[0]}")(handler)

    scripted.always = act
    qedfs("create", "-b", scripted.url + "/base.raw", leaf)
    with mounted(leaf, tmp_path / "mnt", "readahead=0,boot_profile=off") as mnt:
        with (mnt / "leaf.raw").open("rb", buffering=0) as file:
            for number in range(3):
                valid[0] = number
                file.seek(number * 64 * KIB)
                assert file.read(64 * KIB) == scripted.content[number * 64 * KIB :][: 64 * KIB]
        assert not attribute(mnt / "leaf.raw", "last_error")


def test_a_base_that_has_moved_to_a_web_server_is_rebased(web: Web, tmp_path: Path) -> None:
    base, leaf = tmp_path / "base.raw", tmp_path / "leaf.qed"
    base.write_bytes(CONTENT)
    web.put("moved/base.raw", CONTENT)
    web.put("moved/shorter.raw", CONTENT[: 2 * MIB])
    qedfs("create", "-b", base, leaf)
    assert "--force" in refused("rebase", "-b", f"{web.url}/moved/shorter.raw", leaf)
    assert qedfs("rebase", "-b", f"{web.url}/moved/base.raw?token=secret", leaf) == ("", "")
    info = qedfs_json("info", leaf)
    assert info["backing-filename"] == f"{web.url}/moved/base.raw?***"
    assert info["backing-pin"]["tag"].startswith("etag:")
    base.unlink()
    with mounted(leaf, tmp_path / "mnt") as mnt:
        assert (mnt / "leaf.raw").read_bytes() == CONTENT


def test_a_chain_over_several_transports_is_one_disk(web: Web, tmp_path: Path) -> None:
    # leaf -> local QED -> QED by https -> raw by NBD
    raw = tmp_path / "base.raw"
    raw.write_bytes(CONTENT)
    with serving(raw, "nbdkit", "tcp", tmp_path) as nbd:
        far = make_qed(tmp_path / "far.qed", "-b", nbd, "-F", "raw", "4M", commands=["write -P 1 64k 100k"])
        expected = content_by_qemu(far)
        web.put("chains/far.qed", far.read_bytes())
        url = f"{web.secure}/chains/far.qed"
        near = make_qed(tmp_path / "near.qed", "-u", "-b", url, "-F", "qed", "4M")
        leaf = make_qed(tmp_path / "leaf.qed", "-u", "-b", near.name, "-F", "qed", "4M")
        assert "may name only what allow_backing names" in mount_refused(leaf, tmp_path / "mnt0")
        allowed = [f"allow_backing={name}" for name in (near, url, nbd)]
        with mounted(leaf, tmp_path / "mnt", *allowed, "mode=stream,idle=always,reserve=0") as mnt:
            assert (mnt / "leaf.raw").read_bytes() == expected
            qedfs("wait", "--timeout", "30", mnt / "leaf.raw")
    assert content_by_qemu(leaf) == expected


def test_a_leaf_on_a_chain_on_a_server_is_made_if_its_names_are_allowed(web: Web, tmp_path: Path) -> None:
    web.put("images/base.raw", CONTENT)
    middle = make_qed(tmp_path / "middle.qed", "-u", "-b", "base.raw", "-F", "raw", "4M")
    web.put("images/middle.qed", middle.read_bytes())
    leaf, url = tmp_path / "leaf.qed", f"{web.url}/images/middle.qed"
    assert "may name only what allow_backing names" in refused("create", "-b", url, leaf)
    assert "no pattern of allow_backing matches it" in refused("create", "-b", url, "--allow-backing", url, leaf)
    pattern = f"{web.url}/images/*"
    assert qedfs("create", "-b", url, "--allow-backing", pattern, leaf)[0].endswith("middle.qed (qed)\n")
    with mounted(leaf, tmp_path / "mnt", f"allow_backing={pattern}") as mnt:
        assert (mnt / "leaf.raw").read_bytes() == CONTENT
    web.put("images/copy.qed", middle.read_bytes())
    copy = f"{web.url}/images/copy.qed"
    assert "may name only what allow_backing names" in refused("rebase", "-b", copy, leaf)
    qedfs("rebase", "-b", copy, "--allow-backing", pattern, leaf)
    assert qedfs_json("info", leaf)["backing-filename"] == copy


def test_a_leaf_on_a_compressed_qcow2_is_the_disk_that_it_was_made_of(web: Web, tmp_path: Path) -> None:
    raw, image = make_foreign(tmp_path, "qcow2", "-c", "-o", "compression_type=zstd")
    web.put("images/base.qcow2", image.read_bytes())
    leaf = tmp_path / "leaf.qed"
    said = qedfs("create", "-b", f"{web.secure}/images/base.qcow2", leaf)[0]
    assert said.endswith("/images/base.qcow2 (qcow2)\n")
    with mounted(leaf, tmp_path / "mnt") as mnt:
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, mnt / "leaf.raw")


def test_a_second_leaf_with_a_shared_cache_costs_the_server_nothing(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    with nginx(tmp_path) as web:
        web.put("base.raw", CONTENT)
        for name in ("one.qed", "two.qed"):
            qedfs("create", "-b", f"{web.url}/base.raw?secret", images / name)
        with mounted(images, tmp_path / "mnt", f"shared_cache={tmp_path / 'cache'},reserve=0") as mnt:
            assert (mnt / "one.raw").read_bytes() == CONTENT
            until(lambda: web.sent() >= len(CONTENT))  # it is noted after the last byte has gone
            before = web.sent()
            assert before < 1.1 * len(CONTENT)
            assert (mnt / "two.raw").read_bytes() == CONTENT
            assert web.sent() - before < 1000
