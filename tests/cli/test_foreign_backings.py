"""Leaves on images in QEMU's formats, from `create` to `unmount`, with real mounts."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfs.config import parse_mount_options, read_secret
from qedfs.errors import UsageError
from tests.backing.samples import MIB, make_foreign, make_qed, run
from tests.cli.commands import QEDFS, mounted, qedfs, qedfs_json, refused
from tests.image.qemu import qemu_img

PATIENCE = 30


def server_of(mountpoint: Path) -> int:
    return int(os.getxattr(mountpoint, "user.qedfs.pid"))


def readers_of(pid: int) -> list[int]:
    """The processes of QEMU below the process `pid`."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "qemu-nbd\n"]


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "vdi", "vpc", "parallels"])
def test_a_leaf_on_any_format_is_the_disk_that_the_image_was_made_of(tmp_path: Path, format: str) -> None:
    raw, image = make_foreign(tmp_path, format, *(("-o", "force_size=on") if format == "vpc" else ()))
    leaf = tmp_path / "leaf.qed"
    told = () if format == "qcow2" else ("-F", format)
    assert qedfs("create", "-b", image.name, *told, leaf)[0].endswith(f"on {image.name} ({format})\n")
    info = qedfs_json("info", leaf)
    assert info["backing-pin"]["format"] == format
    assert [(level["filename"], level["format"]) for level in info["chain"]] == [(str(image), format)]
    with mounted(leaf, tmp_path / "mnt") as mnt:
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, mnt / "leaf.raw")
        assert os.getxattr(mnt / "leaf.raw", "user.qedfs.backing_format") == format.encode()


def test_the_chain_is_shown_through_other_formats(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "middle.qcow2", "3M")
    make_qed(tmp_path / "top.qed", "-b", "middle.qcow2", "-F", "qcow2", "3M")
    qedfs("create", "-b", "top.qed", tmp_path / "leaf.qed")
    chain = qedfs_json("info", tmp_path / "leaf.qed")["chain"]
    assert [(Path(level["filename"]).name, level["format"], level["virtual-size"]) for level in chain] == [
        ("top.qed", "qed", 3 * MIB),
        ("middle.qcow2", "qcow2", 3 * MIB),
        ("base.raw", "raw", MIB),
    ]


def test_zeros_of_the_image_are_not_read(tmp_path: Path) -> None:
    raw, image = make_foreign(tmp_path, "qcow2")
    qedfs("create", "-b", image, tmp_path / "leaf.qed")
    with mounted(tmp_path / "leaf.qed", tmp_path / "mnt", "readahead=0") as mnt:
        disk = mnt / "leaf.raw"
        assert disk.read_bytes() == raw.read_bytes()
        eventually(lambda: os.getxattr(disk, "user.qedfs.clusters_backing") == b"0")
        assert int(os.getxattr(disk, "user.qedfs.clusters_data")) == 12


def test_a_format_without_magic_is_not_guessed_once_its_pin_is_lost(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "vmdk")
    leaf = make_qed(tmp_path / "leaf.qed", "-u", "-b", image.name, "-F", "vmdk", "2M")
    assert _refused_mount(leaf).endswith(
        "image.vmdk: looks like vmdk, and the image that names it does not say so; 'qedfs rebase -F' tells it\n"
    )
    qedfs("rebase", "-b", image.name, "-F", "vmdk", leaf)
    with mounted(leaf, tmp_path / "mnt2") as mnt:
        assert (mnt / "leaf.raw").stat().st_size == 2 * MIB


def test_a_held_leaf_cannot_be_on_a_format_that_only_a_pin_tells(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "vdi")
    assert "that its backing is vdi must be" in refused(
        "create", "--hold", "-b", image, "-F", "vdi", tmp_path / "l.qed"
    )
    assert not (tmp_path / "l.qed").exists()


def test_a_changed_image_is_refused_at_the_next_mount(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    qedfs("create", "-b", image, tmp_path / "leaf.qed")
    os.utime(image, (1, 1))
    assert "is not what the image was made on" in _refused_mount(tmp_path / "leaf.qed")


def test_qemus_process_may_die_and_ends_with_the_mount(tmp_path: Path) -> None:
    raw, image = make_foreign(tmp_path, "qcow2")
    qedfs("create", "-b", image, "--mode", "cow", tmp_path / "leaf.qed")
    with mounted(tmp_path / "leaf.qed", tmp_path / "mnt") as mnt:
        disk, server = mnt / "leaf.raw", server_of(mnt)
        for _ in range(2):
            (reader,) = readers_of(server)
            os.kill(reader, signal.SIGKILL)
            with open(disk, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read() == raw.read_bytes()
        (reader,) = readers_of(server)
    assert not Path(f"/proc/{reader}").exists()


def test_no_process_is_left_when_the_mount_is_killed(tmp_path: Path) -> None:
    _, image = make_foreign(tmp_path, "qcow2")
    qedfs("create", "-b", image, tmp_path / "leaf.qed")
    mnt = _folder(tmp_path / "mnt")
    subprocess.run([*QEDFS, "mount", str(tmp_path / "leaf.qed"), str(mnt)], check=True, timeout=PATIENCE)
    server = server_of(mnt)
    (reader,) = readers_of(server)
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{reader}").exists())
    qedfs("unmount", mnt)


# ---- encrypted images ----


SECRET = ("--object", "secret,id=s,data=open sesame")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return what makes a raw image, and one of the same disk and of a format that the passphrase `open sesame` opens."""
    folder = tmp_path_factory.mktemp("encrypted")
    raw, _ = make_foreign(folder, "qcow2")

    @functools.cache
    def make(format: str) -> tuple[Path, Path]:
        path = folder / f"locked.{format}"
        kind, prefix = ("", "") if format == "luks" else ("encrypt.format=luks,", "encrypt.")
        options = f"{kind}{prefix}key-secret=s,{prefix}iter-time=10"
        create: list[str | Path] = ["qemu-img", "create", "-q", "-f", format, *SECRET, "-o", options, path, "2M"]
        # QEMU 7.2 measures the machine to choose the work of a key, and gives up at once if a clock of it stood still.
        for _ in range(50):
            done = subprocess.run(create, capture_output=True, text=True, timeout=PATIENCE, check=False)
            if "accurate CPU usage" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr
        target = f"driver={format},{prefix}key-secret=s,file.filename={path}"
        run("qemu-img", "convert", "-n", *SECRET, "-f", "raw", "--target-image-opts", raw, target)
        return raw, path

    return make


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_an_encrypted_image_is_opened_by_a_passphrase_from_a_descriptor(
    tmp_path: Path, encrypted: Callable[[str], tuple[Path, Path]], format: str
) -> None:
    (raw, image), leaf = encrypted(format), tmp_path / "leaf.qed"
    assert "is encrypted, and no passphrase was given" in refused("create", "-b", image, "-F", format, leaf)
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("open sesame\n")
    qedfs("create", "-b", image, "-F", format, "--secret", f"file:{passphrase}", leaf)
    mnt = _folder(tmp_path / "mnt")
    with passphrase.open("rb") as given:
        command = [*QEDFS, "mount", "-o", f"mode=cow,secret=fd:{given.fileno()}", str(leaf), str(mnt)]
        subprocess.run(command, check=True, timeout=PATIENCE, pass_fds=[given.fileno()])
    try:
        os.kill(readers_of(server_of(mnt))[0], signal.SIGKILL)  # the next one needs it again
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, mnt / "leaf.raw")
        assert b"sesame" not in Path(f"/proc/{readers_of(server_of(mnt))[0]}/cmdline").read_bytes()
    finally:
        qedfs("unmount", mnt)


def test_a_wrong_passphrase_is_told(tmp_path: Path, encrypted: Callable[[str], tuple[Path, Path]]) -> None:
    _, image = encrypted("luks")
    (tmp_path / "wrong").write_text("open barley")
    line = refused(*("create", "-b", image, "-F", "luks", "--secret", f"file:{tmp_path / 'wrong'}", tmp_path / "l.qed"))
    assert line.endswith("QEMU does not open it as luks: Invalid password, cannot unlock any keyslot")


@pytest.mark.parametrize("text", ["open sesame", "fd:", "fd:x", "fd:99", "file:/nowhere", "data:x", "fd:-1"])
def test_a_passphrase_comes_from_a_descriptor_or_a_file(text: str) -> None:
    with pytest.raises(UsageError, match=r"^secret: "):
        read_secret(text, "secret")


def test_a_passphrase_is_read_at_once_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"open sesame\n\n")
    options = parse_mount_options([f"secret=file:{tmp_path / 's'}"])
    (tmp_path / "s").unlink()
    assert options.secret == b"open sesame\n"
    assert "sesame" not in repr(options)
    for content in (b"", b"\n", b"x" * 4098):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(UsageError, match="holds no passphrase"):
            read_secret(f"file:{tmp_path / 's'}", "secret")
    with pytest.raises(UsageError, match="holds no passphrase"):
        read_secret("file:/dev/zero", "secret")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _refused_mount(leaf: Path) -> str:
    """Mount in a process of its own, which must refuse; return the one line that it says."""
    command = [*QEDFS, "mount", str(leaf), str(_folder(leaf.parent / "refused"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr
