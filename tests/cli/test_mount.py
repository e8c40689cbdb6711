"""`qedfs mount` and `qedfs unmount` as a user runs them: real images, real mounts, real processes."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qedfs
from contrib.boot.server import listens
from qedfs.fuse.busy import find_holders
from tests.namespaces import FORGET_MOUNTS

QEDFS = (sys.executable, "-m", "qedfs")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(qedfs.__file__).parents[1])}
PATIENCE = 60
"""Seconds for one command, on a machine that does other things too."""
SIZE = 4 << 20
BLOCK = 65536

Finished = subprocess.CompletedProcess[str]


def run(*command: object, cwd: Path | None = None) -> Finished:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT, cwd=cwd, check=False
    )


def qemu_img(*arguments: object) -> str:
    done = run("qemu-img", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition`: what another process does after a look at a directory has no other end to wait for."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def can_be_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


class Place:
    """A folder with a base, a mountpoint `mnt` and a folder `images`, and the mounts made there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mnt = folder / "mnt"
        self.mnt.mkdir()
        self.images = folder / "images"
        self.images.mkdir()
        self.base = folder / "base.raw"
        self.base.write_bytes(b"".join(bytes([n]) * BLOCK for n in range(SIZE // BLOCK)))
        self.log = folder / "log"

    def leaf(self, path: str, backing: object = None, *, format: str = "raw") -> Path:
        leaf = self.folder / path
        qemu_img("create", "-q", "-f", "qed", "-u", "-b", backing or self.base, "-F", format, leaf, SIZE)
        return leaf

    def try_mount(self, *arguments: object, mountpoint: Path | None = None) -> Finished:
        return run(*QEDFS, "mount", "--log-file", self.log, *arguments, mountpoint or self.mnt, cwd=self.folder)

    def mount(self, *arguments: object) -> int:
        """Mount and return the pid of the server."""
        done = self.try_mount(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return int(os.getxattr(self.mnt, "user.qedfs.pid"))

    def unmount(self, *arguments: object) -> None:
        done = run(*QEDFS, "unmount", *arguments, self.mnt)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not self.is_mounted()

    def is_mounted(self) -> bool:
        return any(line.split()[4] == str(self.mnt) for line in Path("/proc/self/mountinfo").read_text().splitlines())

    def status(self) -> dict[str, list[dict[str, str]]]:
        status: dict[str, list[dict[str, str]]] = json.loads(os.getxattr(self.mnt, "user.qedfs.status"))
        return status


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    if place.is_mounted():
        with contextlib.suppress(OSError):
            os.kill(int(os.getxattr(place.mnt, "user.qedfs.pid")), signal.SIGKILL)
        run("fusermount3", "-uz", place.mnt)


def wait_ended(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(fd):
        assert select.select([fd], [], [], PATIENCE)[0], "the server did not end"


# --- the main job -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_in_the_leaf_and_the_base_is_untouched(place: Place) -> None:
    before = place.base.read_bytes()
    leaf = place.leaf("vm.qed")
    place.mount(leaf)
    raw = place.mnt / "vm.raw"
    assert raw.read_bytes() == before
    with raw.open("r+b") as disk:
        disk.seek(100_000)
        disk.write(b"guest" * 1000)
    place.unmount()
    expected = before[:100_000] + b"guest" * 1000 + before[105_000:]
    qemu_img("check", "-q", leaf)
    qemu_img("convert", "-f", "qed", "-O", "raw", leaf, place.folder / "out.raw")
    assert (place.folder / "out.raw").read_bytes() == expected
    assert place.base.read_bytes() == before


@contextlib.contextmanager
def nbd_server(image: Path, path: Path) -> Iterator[str]:
    command = ["qemu-nbd", "-r", "-f", "raw", "-k", str(path), "-e", "9", "-t", str(image)]
    with subprocess.Popen(command) as server:
        try:
            eventually(lambda: listens(path))
            yield f"nbd+unix:///?socket={path}"
        finally:
            server.terminate()


def test_leaf_over_nbd(place: Place) -> None:
    with nbd_server(place.base, place.folder / "socket") as url:
        leaf = place.leaf("vm.qed", url)
        place.mount(leaf)
        raw = place.mnt / "vm.raw"
        assert raw.read_bytes() == place.base.read_bytes()
        with raw.open("r+b") as disk:
            disk.write(b"x" * 512)
            disk.flush()
            os.fsync(disk.fileno())
        place.unmount()
        qemu_img("check", "-q", leaf)
        qemu_img("convert", "-f", "qed", "-O", "raw", leaf, place.folder / "out.raw")
    assert (place.folder / "out.raw").read_bytes() == b"x" * 512 + place.base.read_bytes()[512:]


def test_leaf_whose_server_is_away_is_mounted_and_says_so(place: Place) -> None:
    leaf = place.leaf("vm.qed", f"nbd+unix:///?socket={place.folder}/socket")
    done = place.try_mount("-o", "backing_timeout=1", leaf)
    assert done.returncode == 0
    assert done.stderr.startswith("qedfs: nbd+unix:")
    assert done.stderr.count("\n") == 1
    raw = place.mnt / "vm.raw"
    with pytest.raises(OSError, match="Input/output error"):
        raw.read_bytes()
    with nbd_server(place.base, place.folder / "socket"):
        eventually(lambda: can_be_read(raw))
        assert raw.read_bytes() == place.base.read_bytes()
        place.unmount()


def test_two_leaves_of_one_base_in_one_mount(place: Place) -> None:
    place.mount(place.leaf("a.qed"), place.leaf("b.img"))
    assert sorted(os.listdir(place.mnt)) == ["a.raw", "b.img.raw"]
    with (place.mnt / "a.raw").open("r+b") as disk:
        disk.write(b"only in a")
    assert (place.mnt / "b.img.raw").read_bytes() == place.base.read_bytes()
    place.unmount()


def test_paths_are_relative_to_where_the_command_was_given(place: Place) -> None:
    place.leaf("vm.qed", "base.raw")
    done = run(*QEDFS, "mount", "--log-file", "log", "vm.qed", "mnt", cwd=place.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (place.mnt / "vm.raw").read_bytes() == place.base.read_bytes()
    assert place.log.exists()
    done = run(*QEDFS, "unmount", "mnt", cwd=place.folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_read_only_mount_writes_nothing(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    before = leaf.read_bytes()
    place.mount("-o", "ro", leaf)
    assert (place.mnt / "vm.raw").read_bytes() == place.base.read_bytes()
    with pytest.raises(OSError, match="Read-only file system"):
        (place.mnt / "vm.raw").open("r+b")
    place.unmount()
    assert leaf.read_bytes() == before


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make mounts for a test")


@needs_root
def test_leaf_that_cannot_be_written_is_served_read_only(place: Place) -> None:
    # Root may write what has no permission bits; an immutable mount of the folder stops it too.
    leaf = place.leaf("images/vm.qed")
    assert run("mount", "--bind", place.images, place.images).returncode == 0
    try:
        assert run("mount", "-o", "remount,bind,ro", place.images).returncode == 0
        done = place.try_mount(leaf)
        assert done.returncode == 0
        assert done.stderr == f"qedfs: {leaf}: cannot be opened for writing (Read-only file system); served read-only\n"
        assert (place.mnt / "vm.raw").read_bytes() == place.base.read_bytes()
        with pytest.raises(OSError, match="Read-only file system"):
            (place.mnt / "vm.raw").open("r+b")
        place.unmount()
    finally:
        run("umount", "-l", place.images)


# --- the background process -------------------------------------------------------------------------------------------


def test_background_process_lets_go_of_everything(place: Place) -> None:
    # A pipeline ends only when nobody holds its pipe any more.
    command = f"exec 7>{place.folder}/lock; {' '.join(QEDFS)} mount --log-file {place.log} {place.leaf('vm.qed')} {place.mnt} | cat"
    done = subprocess.run(
        ["sh", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(os.getxattr(place.mnt, "user.qedfs.pid"))
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)
    files = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    assert str(place.folder / "lock") not in files
    assert [os.readlink(f"/proc/{pid}/fd/{n}") for n in range(3)] == ["/dev/null"] * 3
    place.unmount()


def test_foreground_logs_to_standard_error_and_ends_by_unmount(place: Place) -> None:
    command = [*QEDFS, "mount", "-f", str(place.leaf("vm.qed")), str(place.mnt)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        eventually(place.is_mounted)
        assert (place.mnt / "vm.raw").stat().st_size == SIZE
        place.unmount()
        assert server.wait(PATIENCE) == 0
        assert server.stderr
        assert f"qedfs: {place.folder}/vm.qed: served as vm.raw\n" in server.stderr.read()


def test_unmount_returns_when_the_leaf_is_closed(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    pid = place.mount(leaf)
    (place.mnt / "vm.raw").read_bytes()
    place.unmount()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # where nobody collects the dead, a zombie stays
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    qemu_img("check", "-q", leaf)  # clean, and not locked


def test_mount_can_be_made_again_at_once(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    for _ in range(3):
        place.mount(leaf)
        place.unmount()


# --- ends that nobody planned -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_unmounts(number: signal.Signals, place: Place) -> None:
    leaf = place.leaf("vm.qed")
    pid = place.mount(leaf)
    os.kill(pid, number)
    wait_ended(pid)
    assert not place.is_mounted()
    qemu_img("check", "-q", leaf)


def test_sigterm_with_dirty_pages_of_a_mapping_loses_nothing(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    pid = place.mount(leaf)
    with (place.mnt / "vm.raw").open("r+b") as disk, mmap.mmap(disk.fileno(), SIZE) as mapping:
        mapping[:5] = b"dirty"
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not place.is_mounted())
        os.kill(pid, signal.SIGTERM)  # impatience changes nothing
        mapping[BLOCK : BLOCK + 5] = b"later"  # detached, and still served
    wait_ended(pid)
    qemu_img("check", "-q", leaf)
    qemu_img("convert", "-f", "qed", "-O", "raw", leaf, place.folder / "out.raw")
    content = (place.folder / "out.raw").read_bytes()
    assert (content[:5], content[BLOCK : BLOCK + 5]) == (b"dirty", b"later")


def test_killed_server_leaves_a_mount_that_says_so_and_can_be_removed(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    pid = place.mount(leaf)
    with (place.mnt / "vm.raw").open("r+b") as disk:
        disk.write(b"synced")
        disk.flush()
        os.fsync(disk.fileno())
    os.kill(pid, signal.SIGKILL)
    wait_ended(pid)
    again = place.try_mount(leaf)
    assert again.returncode == 1
    assert "'qedfs unmount' removes it" in again.stderr
    assert again.stderr.count("\n") == 1
    place.unmount()
    place.mount(leaf)
    assert (place.mnt / "vm.raw").read_bytes()[:6] == b"synced"
    place.unmount()
    qemu_img("check", "-q", leaf)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_the_start_leaves_nothing(number: signal.Signals, place: Place) -> None:
    leaf = place.leaf("vm.qed", f"nbd+unix:///?socket={place.folder}/socket")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(place.folder / "socket"))
        silent.listen()
        command = [*QEDFS, "mount", "-f", str(leaf), str(place.mnt)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
            silent.settimeout(PATIENCE)
            with contextlib.closing(silent.accept()[0]):  # the start now waits for the backing
                server.send_signal(number)
                assert server.wait(PATIENCE) == 128 + number
            assert server.stderr
            assert "Traceback" not in server.stderr.read()
    assert not place.is_mounted()
    qemu_img("info", leaf)


def test_plain_umount_ends_the_server_in_good_order(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    pid = place.mount(leaf)
    (place.mnt / "vm.raw").read_bytes()
    assert run("umount", place.mnt).returncode == 0
    wait_ended(pid)
    qemu_img("check", "-q", leaf)


# --- busy and lazy ----------------------------------------------------------------------------------------------------


def test_busy_mount_stays_and_unmount_says_who_holds_it(place: Place) -> None:
    place.mount(place.leaf("vm.qed"))
    with (place.mnt / "vm.raw").open() as disk:
        holder = subprocess.Popen(["sleep", "100"], stdin=disk)
    with holder:
        try:
            done = run(*QEDFS, "unmount", place.mnt)
            assert done.returncode == 1
            assert done.stderr.count("\n") == 1
            assert f"sleep (pid {holder.pid})" in done.stderr
            assert place.is_mounted()
        finally:
            holder.kill()
    place.unmount()


def test_lazy_unmount_serves_until_the_last_close(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    pid = place.mount(leaf)
    with (place.mnt / "vm.raw").open("r+b") as disk:
        place.unmount("--lazy")
        disk.write(b"after")
        disk.seek(0)
        assert disk.read(5) == b"after"
    wait_ended(pid)
    qemu_img("check", "-q", leaf)


# --- locks ------------------------------------------------------------------------------------------------------------


def test_mounted_leaf_is_refused_by_qemu_and_by_a_second_mount(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    place.mount(leaf)
    assert "lock" in run("qemu-img", "check", leaf).stderr
    other = place.folder / "other"
    other.mkdir()
    done = place.try_mount(leaf, mountpoint=other)
    assert (done.returncode, done.stderr) == (1, f"qedfs: {leaf}: somebody else has it open for writing\n")
    place.unmount()


def test_unmount_says_at_once_who_waits_for_an_unreachable_backing(place: Place) -> None:
    socket = place.folder / "socket"
    with nbd_server(place.base, socket) as backing:
        leaf = place.leaf("vm.qed", backing)
        pid = place.mount("-o", "direct_io=on", leaf)
    write = ["dd", "if=/dev/zero", f"of={place.mnt}/vm.raw", "bs=512", "count=1", "oflag=direct", "conv=notrunc"]
    with subprocess.Popen(write, stderr=subprocess.DEVNULL) as writer:
        eventually(lambda: bool(find_holders(str(place.mnt))))
        done = run(*QEDFS, "unmount", place.mnt)
        os.kill(pid, signal.SIGKILL)
    assert (done.returncode, done.stderr) == (1, f"qedfs: {place.mnt}: is in use by dd (pid {writer.pid})\n")
    run("umount", "-l", place.mnt)


def test_leaf_that_qemu_has_open_is_refused(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    ready = place.folder / "ready"  # written when it has the image open; it listens earlier
    command = ["qemu-nbd", "-f", "qed", "-k", str(place.folder / "socket"), "--pid-file", str(ready), "-t", str(leaf)]
    with subprocess.Popen(command) as server:
        try:
            eventually(ready.exists)
            before = leaf.read_bytes()
            done = place.try_mount(leaf)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith(f"qedfs: {leaf}: somebody else has it open")
            assert leaf.read_bytes() == before
            assert not place.is_mounted()
        finally:
            server.terminate()


# --- directories ------------------------------------------------------------------------------------------------------


def test_directory_shows_its_leaves_and_status_lists_what_is_left_out(place: Place) -> None:
    place.leaf("images/good.qed")
    (place.images / "bad.qed").write_bytes(b"QED\0" + b"\xff" * 100)
    place.leaf("images/orphan.qed", "nothing.raw")
    (place.images / "notes.txt").write_text("no image")
    (place.images / "sub").mkdir()
    done = place.try_mount("images")
    assert done.returncode == 0
    assert os.listdir(place.mnt) == ["good.raw"]
    status = place.status()
    assert status["leaves"] == [{"name": "good.raw", "path": str(place.images / "good.qed")}]
    assert [entry["path"] for entry in status["refused"]] == [
        str(place.images / "bad.qed"),
        str(place.images / "orphan.qed"),
    ]
    assert "nothing.raw" in status["refused"][1]["reason"]
    place.unmount()


def test_image_under_another_one_is_no_leaf(place: Place) -> None:
    place.leaf("images/base.qed")
    place.leaf("images/vm.qed", "base.qed", format="qed")
    place.mount("images")
    assert os.listdir(place.mnt) == ["vm.raw"]
    assert (place.mnt / "vm.raw").read_bytes() == place.base.read_bytes()
    place.unmount()


def test_leaves_come_and_go_with_their_files(place: Place) -> None:
    place.leaf("images/one.qed")
    place.mount("images")
    two = place.leaf("images/two.qed")
    eventually((place.mnt / "two.raw").exists)
    with (place.mnt / "two.raw").open("r+b") as disk:
        two.unlink()
        eventually(lambda: os.listdir(place.mnt) == ["one.raw"])
        disk.write(b"still usable")
        disk.seek(0)
        assert disk.read(12) == b"still usable"
    place.unmount()


def test_names_that_are_left_out_are_listed_and_logged_once(place: Place) -> None:
    place.leaf("images/vm")
    place.leaf("images/vm.qed")
    (place.images / "vm2.qed").symlink_to("vm")
    assert place.try_mount("images").returncode == 0
    place.leaf("images/later.qed")  # it is there after two more looks
    eventually((place.mnt / "later.raw").exists)
    vm = place.images / "vm"
    assert sorted(os.listdir(place.mnt)) == ["later.raw", "vm.raw"]
    assert {left_out["path"]: left_out["reason"] for left_out in place.status()["refused"]} == {
        f"{vm}.qed": f"{vm}.qed: would be called vm.raw, as {vm} is",
        f"{vm}2.qed": f"{vm}2.qed: is the same image as {vm}",
    }
    log = place.log.read_text()
    assert (log.count("would be called"), log.count("is the same image as")) == (1, 1)
    place.unmount()


def test_refused_file_is_tried_again_when_it_changes(place: Place) -> None:
    bad = place.images / "vm.qed"
    bad.write_bytes(b"QED\0" + b"\xff" * 100)
    assert place.try_mount("images").returncode == 0
    assert os.listdir(place.mnt) == []
    bad.unlink()
    place.leaf("images/vm.qed")
    eventually(lambda: os.listdir(place.mnt) == ["vm.raw"])
    assert place.status()["refused"] == []
    place.unmount()


def test_second_leaf_of_the_same_name_is_refused_and_listed(place: Place) -> None:
    place.leaf("images/vm")
    place.leaf("images/vm.qed")
    assert place.try_mount("images").returncode == 0
    assert os.listdir(place.mnt) == ["vm.raw"]
    images = place.images
    assert place.status()["leaves"] == [{"name": "vm.raw", "path": f"{images}/vm"}]
    assert place.status()["refused"][0]["reason"] == f"{images}/vm.qed: would be called vm.raw, as {images}/vm is"
    place.unmount()


def test_newcomer_over_a_served_leaf_is_refused_and_listed(place: Place) -> None:
    place.leaf("images/vm.qed")
    place.mount("images")
    place.leaf("images/new.qed", "vm.qed", format="qed")
    eventually(lambda: bool(place.status()["refused"]))
    assert place.status()["refused"][0]["reason"] == f"{place.images}/new.qed: its backing is a leaf of this mount"
    assert os.listdir(place.mnt) == ["vm.raw"]
    place.unmount()


# --- bad input: one line, non-zero, nothing written, nothing mounted --------------------------------------------------


def _bad_magic(place: Place) -> list[object]:
    (place.folder / "x.qed").write_bytes(b"nothing" * 100)
    return ["x.qed"]


def _header_of_ff(place: Place) -> list[object]:
    (place.folder / "x.qed").write_bytes(b"QED\0" + b"\xff" * 100)
    return ["x.qed"]


def _fifo(place: Place) -> list[object]:
    os.mkfifo(place.folder / "x.qed")
    return ["x.qed"]


def _loop(place: Place) -> list[object]:
    place.leaf("x.qed", "y.qed", format="qed")
    place.leaf("y.qed", "x.qed", format="qed")
    return ["x.qed"]


def _itself(place: Place) -> list[object]:
    place.leaf("x.qed", "x.qed", format="qed")
    return ["x.qed"]


def _backing_below_mountpoint(place: Place) -> list[object]:
    place.leaf("x.qed", "mnt/base.raw")
    return ["x.qed"]


def _same_name(place: Place) -> list[object]:
    return [place.leaf("x.qed"), place.leaf("images/x.qed")]


def _nbd_that_is_none(place: Place) -> list[object]:
    place.leaf("x.qed", "nbd://host:99999/x")
    return ["x.qed"]


def _one_of_two(place: Place) -> list[object]:
    place.leaf("good.qed")
    return ["good.qed", "missing.qed"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: ["missing.qed"], "missing.qed: "),
        (_bad_magic, "not a QED image"),
        (_header_of_ff, "QED features"),
        (_fifo, "neither a regular file nor a block device"),
        (lambda place: [place.leaf("x.qed", "gone.raw")], "gone.raw"),
        (_loop, "leads back"),
        (_itself, "leads back"),
        (_backing_below_mountpoint, "mnt/base.raw: "),
        (_same_name, "would be called x.raw"),
        (_nbd_that_is_none, "nbd://host:99999/x"),
        (_one_of_two, "missing.qed: "),
        (lambda place: ["-o", "mod=cow", place.leaf("x.qed")], "did you mean 'mode'?"),
        (lambda place: ["-o", "metrics=:1", place.leaf("x.qed")], "is not of the form HOST:PORT"),
        (lambda place: ["-o", "metrics=127.0.0.1:1,metrics=192.0.2.1:1", place.leaf("x.qed")], "cannot listen there"),
        (lambda place: ["--log-file", "no/log", place.leaf("x.qed")], "no/log: cannot be written"),
        (lambda place: [place.folder], "lies inside its own source"),
        (lambda place: [place.leaf("mnt/x.qed")], "would cover its own source"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    make: Callable[[Place], list[object]], words: str, place: Place
) -> None:
    arguments = make(place)
    before = {path: path.read_bytes() for path in place.folder.rglob("*.qed") if path.is_file()}
    start = time.monotonic()
    done = place.try_mount(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert done.stderr.startswith("qedfs: ")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 30
    assert not place.is_mounted()
    assert {path: path.read_bytes() for path in before} == before


def test_mountpoint_must_be_there(place: Place) -> None:
    done = place.try_mount(place.leaf("x.qed"), mountpoint=place.folder / "none")
    assert (done.returncode, done.stderr) == (1, f"qedfs: {place.folder}/none: No such file or directory\n")


def test_mounted_mountpoint_is_refused(place: Place) -> None:
    place.mount(place.leaf("x.qed"))
    done = place.try_mount(place.leaf("y.qed"))
    assert done.returncode == 1
    assert f"{place.folder}/x.qed is mounted here already" in done.stderr
    place.unmount()


@pytest.mark.parametrize("name", ["images", "none", "base.raw"])
def test_unmount_of_what_is_no_mount_is_one_line(name: str, place: Place) -> None:
    done = run(*QEDFS, "unmount", place.folder / name)
    assert (done.returncode, done.stderr) == (1, f"qedfs: {place.folder / name}: is not a qedfs mount\n")


def test_log_file_tells_the_story(place: Place) -> None:
    place.mount(place.leaf("vm.qed"))
    place.unmount()
    lines = place.log.read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in lines] == [
        f"{place.folder}/vm.qed: served as vm.raw",
        f"{place.folder}/vm.qed: closed",
    ]


# --- users and namespaces ---------------------------------------------------------------------------------------------

# An ordinary user who may, other than such users, read the interpreter wherever it is installed.
_AS_USER = (
    "setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
)
_OPEN_FUSE, _SHUT_FUSE = (
    f"mount -t tmpfs none /mnt && mknod -m {mode} /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse"
    for mode in ("666", "600")
)
_NO_FUSE = "mount -t tmpfs none /mnt && mknod /mnt/null c 1 3 && mknod /mnt/urandom c 1 9 && mount --bind /mnt /dev"


def in_namespace(script: str) -> Finished:
    """Run a shell script whose mounts nobody else sees; in it AS_USER and QEDFS stand for these commands."""
    script = script.replace("AS_USER", _AS_USER).replace("QEDFS", " ".join(QEDFS))
    return run("unshare", "-m", "sh", "-ec", f"{FORGET_MOUNTS}; {script}")


@needs_root
def test_missing_fuse_device_is_one_line(place: Place) -> None:
    done = in_namespace(f"{_NO_FUSE}; QEDFS mount {place.leaf('x.qed')} {place.mnt}")
    assert (done.returncode, done.stderr) == (
        1,
        "qedfs: /dev/fuse: does not exist (is the kernel module fuse loaded?)\n",
    )


@needs_root
def test_ordinary_user_mounts_reads_and_unmounts(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    for path in (place.folder, place.mnt, place.base, leaf):
        os.chown(path, 1000, 1000)
    done = in_namespace(
        f"{_OPEN_FUSE}; AS_USER mkdir /mnt/m; AS_USER QEDFS mount --log-file {place.log} {leaf} /mnt/m; "
        f"AS_USER cmp /mnt/m/vm.raw {place.base}; AS_USER QEDFS unmount /mnt/m"
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert done.returncode == 0
    qemu_img("check", "-q", leaf)


@needs_root
def test_user_who_may_not_mount_is_told_why(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    for path in (place.folder, place.base, leaf):
        os.chown(path, 1000, 1000)
    done = in_namespace(f"{_SHUT_FUSE}; AS_USER mkdir /mnt/m; AS_USER QEDFS mount {leaf} /mnt/m")
    assert done.returncode == 1
    assert done.stderr == "qedfs: /mnt/m: failed to open /dev/fuse: Permission denied\n"


# --- pins -------------------------------------------------------------------------------------------------------------


def test_backing_that_changed_is_refused_until_it_is_trusted(place: Place) -> None:
    leaf = place.leaf("vm.qed")
    place.mount(leaf)
    place.unmount()
    shutil.copyfile(place.base, place.folder / "new")
    os.truncate(place.folder / "new", SIZE - BLOCK)
    os.replace(place.folder / "new", place.base)
    done = place.try_mount(leaf)
    assert done.returncode == 1
    assert "is not what the image was made on" in done.stderr
    assert "trust_backing" in done.stderr
    place.mount("-o", "trust_backing", leaf)
    place.unmount()
    place.mount(leaf)
    place.unmount()
