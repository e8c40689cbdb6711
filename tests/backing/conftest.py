"""Servers that live as long as a test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.backing.object_servers import BUCKET, Put, StoreServer, azurite, fake_gcs, moto, s3rver
from tests.backing.samples import Serve, random_bytes, served_by_nbdkit
from tests.backing.scripted_web import ScriptedWeb, scripted_web
from tests.backing.web_servers import Web, nginx


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Call it with nbdkit's arguments to get the address of an export that lives until the end of the test."""
    folder = tmp_path_factory.mktemp("nbd")  # short: the path of a socket has 107 bytes at most
    with ExitStack() as servers:
        count = 0

        def start(*arguments: object) -> str:
            nonlocal count
            count += 1
            return servers.enter_context(served_by_nbdkit(folder / f"{count}.socket", *arguments))

        yield start


@pytest.fixture(scope="session")
def _store_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StoreServer]]:
    """The servers of object stores that a test has asked for so far; they live until the end of the run."""
    servers: dict[str, StoreServer] = {}
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture
def put(
    _store_servers: dict[str, StoreServer], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Put:
    """Call it with `s3`, `s3rver`, `gs` or `az`, a key and a content; it starts the server and sets the environment."""
    makers: dict[str, Callable[[], StoreServer]] = {
        "s3": moto,
        "s3rver": lambda: s3rver(tmp_path_factory.mktemp("s3rver")),
        "gs": fake_gcs,
        "az": lambda: azurite(tmp_path_factory.mktemp("azurite")),
    }

    def put(kind: str, key: str, content: bytes) -> str:
        if kind not in _store_servers:
            _store_servers[kind] = makers[kind]()
            _store_servers[kind].start()
        server = _store_servers[kind]
        for name, value in server.variables().items():
            monkeypatch.setenv(name, value)
        server.put(key, content)
        return f"{kind[:2]}://{BUCKET}/{key}"

    return put


@pytest.fixture(scope="session")
def _nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with nginx(tmp_path_factory.mktemp("nginx")) as web:
        yield web


@pytest.fixture
def web(_nginx: Web, no_habits: None, monkeypatch: pytest.MonkeyPatch) -> Web:
    """An nginx for all tests of the run, whose certificate is believed; each chooses its own names."""
    monkeypatch.setenv("SSL_CERT_FILE", str(_nginx.authority))
    return _nginx


@pytest.fixture
def no_habits(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Proxies, authorities and passwords of whoever runs the tests are not there."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("NETRC", "QEDFS_HTTP_AUTHORIZATION", "SSL_CERT_FILE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def scripted(no_habits: None) -> Iterator[ScriptedWeb]:
    """A server of 300,000 bytes that does what it is told."""
    with scripted_web(random_bytes(300_000, 1)) as server:
        yield server
