from __future__ import annotations

import contextlib
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import QEDFS, mounted, qedfs, refused
from tests.image.qemu import qemu_img, qemu_io
from tests.nbd.certificates import Authority


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
            assert server.wait(timeout=30) == 0
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


def _run(*line: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=20, check=False)


def _certificates(folder: Path) -> Path:
    authority = Authority()
    authority.client(folder)
    return authority.server(folder)


def test_by_tls_qemu_libnbd_and_qedfs_read_the_same(base: Path, tmp_path: Path) -> None:
    pki = _certificates(tmp_path / "pki")
    with serving("--listen", "localhost:0", "--tls-certificates", pki, "--tls-verify-peer", base) as uri:
        assert uri.startswith(("nbds://127.0.0.1:", "nbds://[::1]:"))
        named = f"{uri}?tls-certificates={pki}&tls-hostname=localhost"
        assert _run("nbdinfo", "--size", named).stdout.strip() == str(base.stat().st_size)
        assert _run("nbdcopy", named, "copy.raw").returncode == 0
        assert Path("copy.raw").read_bytes() == base.read_bytes()
        port = uri.rpartition(":")[2].strip("/")
        node = f"driver=nbd,host=localhost,port={port},tls-creds=tls0"
        credentials = f"tls-creds-x509,id=tls0,endpoint=client,dir={pki}"
        line = ("qemu-img", "convert", "--object", credentials, "--image-opts", node, "-O", "raw", "by-qemu.raw")
        assert _run(*line).stderr == ""
        # QEMU counts in sectors and fills the last one.
        assert Path("by-qemu.raw").read_bytes()[: base.stat().st_size] == base.read_bytes()
        qedfs("create", "-b", named, "leaf.qed")
        with mounted(tmp_path / "leaf.qed", tmp_path / "mnt") as mnt:
            assert (mnt / "leaf.raw").read_bytes()[: base.stat().st_size] == base.read_bytes()


def test_by_tls_nobody_is_served_without(base: Path, tmp_path: Path) -> None:
    pki = _certificates(tmp_path / "pki")
    with serving("--socket", "s.sock", "--tls-certificates", pki, base) as uri:
        assert uri == f"nbds+unix:///?socket={tmp_path}/s.sock"
        plain = _run("nbdinfo", uri.replace("nbds", "nbd"))
        assert plain.returncode != 0
        assert "opt_go" in plain.stderr  # libnbd does not tell why
        assert "write nbds://" in refused("create", "-b", uri.replace("nbds", "nbd"), "leaf.qed")
        assert "not accepted" in refused("create", "-b", uri, "leaf.qed")
        qedfs("create", "-b", f"{uri}&tls-certificates={pki}", "leaf.qed")


def test_a_verified_peer_needs_a_certificate(base: Path, tmp_path: Path) -> None:
    pki = _certificates(tmp_path / "pki")
    with serving("--socket", "s.sock", "--tls-certificates", pki, "--tls-verify-peer", base) as uri:
        (tmp_path / "ca").mkdir()
        (tmp_path / "ca" / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
        line = refused("create", "-b", f"{uri}&tls-certificates={tmp_path}/ca", "leaf.qed")
        assert "require a client certificate" in line or "requires a client certificate" in line
        stranger = _certificates(tmp_path / "stranger")
        (stranger / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
        assert "accept our client" in refused("create", "-b", f"{uri}&tls-certificates={stranger}", "leaf.qed")
        qedfs("create", "-b", f"{uri}&tls-certificates={pki}", "leaf.qed")


def test_plain_bytes_behind_starttls_end_the_connection(base: Path, tmp_path: Path) -> None:
    pki = _certificates(tmp_path / "pki")
    option = struct.Struct(">8sII")
    with serving("--socket", "s.sock", "--tls-certificates", pki, base), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect("s.sock")
        client.sendall(bytes(3) + b"\3" + option.pack(b"IHAVEOPT", 5, 0) + option.pack(b"IHAVEOPT", 8, 0))
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(4096):
                heard += data
        acknowledged = struct.pack(">QIII", 0x3E889045565A9, 5, 1, 0)
        assert heard[:38] == b"NBDMAGICIHAVEOPT\0\3" + acknowledged
        # An alert of TLS at most, and no answer to the option.
        assert heard[38:39] in (b"", b"\x15")


def test_with_tls_it_may_listen_beyond_loopback(base: Path, tmp_path: Path) -> None:
    pki = _certificates(tmp_path / "pki")
    with serving("--listen", "0.0.0.0:0", "--tls-certificates", pki, base) as uri:
        assert uri.startswith("nbds://0.0.0.0:")
    assert "server-cert.pem" in refused("serve", "--tls-certificates", tmp_path / "none", base)
    assert "--tls-certificates" in refused("serve", "--tls-verify-peer", base)
