"""Scrapes of a real mount."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.failing.rig import CLUSTER, MIB, PATIENCE, QEDFS, Disk, run, served, until


def port_of(log: Path) -> int:
    """The port that the mount says it has taken."""
    until(lambda: "metrics at" in log.read_text())
    (port,) = re.findall(r"metrics at http://127\.0\.0\.1:(\d+)/metrics", log.read_text())
    return int(port)


class Scraper:
    def __init__(self, disk: Disk) -> None:
        self.port = port_of(Path(f"{disk.point}.log"))

    def get(self, path: str = "/metrics", method: str = "GET") -> tuple[http.client.HTTPResponse, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path)
            response = connection.getresponse()
            return response, response.read().decode()

    def samples(self) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(self.get()[1])
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    def value(self, name: str, *labels: str) -> float:
        return self.samples().get((f"qedfs_{name}", *labels), -1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "base.raw").write_bytes(os.urandom(8 * MIB))
    run(*QEDFS, "create", "-b", tmp_path / "base.raw", "-F", "raw", tmp_path / "vm.qed")
    with served(tmp_path / "vm.qed", tmp_path / "mnt", "metrics=127.0.0.1:0") as disk:
        yield disk
        if disk.server.poll() is None:
            disk.unmount()


def test_a_scrape_tells_what_the_mount_does(disk: Disk) -> None:
    scraper = Scraper(disk)
    until(lambda: scraper.value("disk_missing_bytes", "vm.raw") == 8 * MIB)
    found = scraper.samples()
    assert found["qedfs_disk_size_bytes", "vm.raw"] == 8 * MIB
    assert found["qedfs_disk_mode", "vm.raw", "cor"] == 1
    assert found["qedfs_disk_state", "vm.raw", "passive"] == 1
    assert (found["qedfs_disks",], found["qedfs_refused_images",]) == (1, 0)
    fd = os.open(disk.file, os.O_RDONLY)
    disk.read(0, 2 * CLUSTER)
    until(lambda: scraper.value("disk_copied_bytes_total", "vm.raw") == 2 * CLUSTER)
    found = scraper.samples()
    assert found["qedfs_disk_backing_read_bytes_total", "vm.raw"] == 2 * CLUSTER
    assert found["qedfs_disk_missing_bytes", "vm.raw"] == 8 * MIB - 2 * CLUSTER
    assert found["qedfs_disk_open_handles", "vm.raw"] == 1
    assert found["qedfs_disk_backing_waits_total", "vm.raw"] >= 1
    assert 0 < found["qedfs_disk_backing_wait_seconds_total", "vm.raw"] < PATIENCE
    os.close(fd)
    os.setxattr(disk.file, "user.qedfs.mode", b"stream")
    until(lambda: scraper.value("disk_state", "vm.raw", "complete") == 1)
    assert scraper.value("disk_missing_bytes", "vm.raw") == 0


def test_it_is_http(disk: Disk) -> None:
    scraper = Scraper(disk)
    response, text = scraper.get()
    assert (response.status, response.getheader("Content-Type")) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert int(response.getheader("Content-Length") or 0) == len(text)
    head, nothing = scraper.get(method="HEAD")
    assert (head.status, nothing) == (200, "")
    assert [scraper.get(path)[0].status for path in ("/", "/metrics/x", "/metrics?x=1")] == [404, 404, 200]
    assert scraper.get(method="POST")[0].status == 405
    for nonsense in (b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"\0\xff" * 10 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", scraper.port), PATIENCE) as connection:
            connection.sendall(nonsense)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    with socket.create_connection(("127.0.0.1", scraper.port), PATIENCE) as connection:
        connection.sendall(b"GET /" + b"x" * 9000)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    assert scraper.get()[0].status == 200


def test_whoever_says_nothing_keeps_nobody_waiting(disk: Disk) -> None:
    scraper = Scraper(disk)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", scraper.port), PATIENCE)) for _ in range(40)
        ]
        # The first ones are kept for a while, the others are closed at once.
        assert silent[-1].recv(1) == b""
        assert len(disk.read(0, CLUSTER)) == CLUSTER
        until(lambda: readable(silent[0]))
    assert scraper.get()[0].status == 200


def readable(connection: socket.socket) -> bool:
    """Whether the other side has closed it."""
    connection.settimeout(0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_the_address_is_taken_before_anything_is_mounted(disk: Disk, tmp_path: Path) -> None:
    port = Scraper(disk).port
    run(*QEDFS, "create", "-s", "1M", tmp_path / "other.qed")
    (tmp_path / "other").mkdir()
    option = f"metrics=127.0.0.1:{port}"
    said = run(*QEDFS, "mount", "-o", option, tmp_path / "other.qed", tmp_path / "other", status=1)
    assert said == f"qedfs: 127.0.0.1:{port}: cannot listen there: Address already in use\n"
    assert not os.path.ismount(tmp_path / "other")


def test_it_ends_with_the_mount(disk: Disk) -> None:
    scraper = Scraper(disk)
    disk.unmount()
    with pytest.raises(ConnectionRefusedError):
        scraper.get()
    assert "ERROR" not in Path(f"{disk.point}.log").read_text()


def test_a_mount_without_the_option_listens_nowhere(tmp_path: Path) -> None:
    run(*QEDFS, "create", "-s", "1M", tmp_path / "vm.qed")
    with served(tmp_path / "vm.qed", tmp_path / "mnt") as disk:
        sockets = psutil.Process(disk.server.pid).net_connections("inet")
        assert sockets == []
        disk.unmount()
