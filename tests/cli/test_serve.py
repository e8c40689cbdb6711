from __future__ import annotations

import contextlib
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import QEDFS, mounted, qedfs, refused
from tests.image.qemu import qemu_img, qemu_io


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.raw"
    base.write_bytes(b"\5" * (1 << 20) + b"\6" * 1000)
    return base


@contextlib.contextmanager
def serving(*arguments: str | Path, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """Serve while inside; yield the URI. The server must end cleanly by the signal."""
    line = [*QEDFS, "serve", *map(str, arguments)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            uri = server.stdout.readline().strip()
            assert uri, server.stderr.read()
            yield uri
            server.send_signal(end)
            assert server.wait(timeout=10) == 0
            assert not server.stderr.read()
        finally:
            server.kill()


def test_a_raw_image_is_served_on_a_socket_of_its_owner(base: Path, tmp_path: Path) -> None:
    with serving(base) as uri:
        assert uri == f"nbd+unix:///?socket={tmp_path}/base.raw.sock"
        mode = (tmp_path / "base.raw.sock").stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        qemu_img("compare", "-f", "raw", base, uri)
    assert not (tmp_path / "base.raw.sock").exists()


def test_a_qed_image_is_served_with_its_backings_and_its_holes() -> None:
    qedfs("create", "-b", "base.raw", "leaf.qed")
    qemu_io(Path("leaf.qed"), "write -P 1 64k 64k", "write -z 128k 64k")
    with serving("--listen", "127.0.0.1:0", "--name", "a b", "leaf.qed", end=signal.SIGINT) as uri:
        assert uri.startswith("nbd://127.0.0.1:")
        assert uri.endswith("/a%20b")
        qemu_img("convert", "-f", "raw", "-O", "raw", uri, "copy.raw")
        found = subprocess.run(["nbdinfo", "--map", uri], capture_output=True, text=True, timeout=20, check=True)
    qemu_img("convert", "-O", "raw", "leaf.qed", "expected.raw")
    assert Path("copy.raw").read_bytes() == Path("expected.raw").read_bytes()
    assert any(line.split()[:3] == ["131072", "65536", "3"] for line in found.stdout.splitlines())


def test_the_printed_uri_is_a_backing(base: Path) -> None:
    with serving("--socket", "s.sock", base) as uri:
        qedfs("create", "-b", uri, "leaf.qed")
        qemu_io(Path("leaf.qed"), "read -P 5 0 1M", "read -P 6 1M 1000")


def test_a_disk_in_use_may_be_served(base: Path, tmp_path: Path) -> None:
    qedfs("create", "-b", "base.raw", "leaf.qed")
    with mounted(tmp_path / "leaf.qed", tmp_path / "mnt") as mnt, (mnt / "leaf.raw").open("r+b") as disk:
        disk.write(b"\7" * 4096)
        disk.flush()
        with serving("--socket", "s.sock", mnt / "leaf.raw") as uri:
            qemu_img("compare", "-f", "raw", mnt / "leaf.raw", uri)


def test_beyond_loopback_only_if_asked_for(base: Path) -> None:
    assert "--insecure" in refused("serve", "--listen", "0.0.0.0:0", base)
    assert "--insecure" in refused("serve", "--listen", ":0", base)
    assert "--insecure" in refused("serve", "--listen", "[::]:0", base)
    with serving("--listen", "0.0.0.0:0", "--insecure", base) as uri:
        assert uri.startswith("nbd://0.0.0.0:")


def test_what_cannot_be_served_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    refused("serve", "missing")
    refused("serve", tmp_path)
    refused("serve", "--socket", base, base)
    refused("serve", "--listen", "localhost:port", base)
    refused("serve", "--listen", "no.such.host.invalid:1", base)
    refused("serve", "--listen", "localhost:0", "--socket", "s.sock", base)
    refused("serve", "-F", "vmdk", base)
    refused("serve", "-F", "qed", base)
    assert base.stat().st_size == (1 << 20) + 1000
