"""Servers that live as long as a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.backing.object_servers import BUCKET, Put, StoreServer, azurite, fake_gcs, moto, s3rver
from tests.backing.samples import Serve, served_by_nbdkit


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
