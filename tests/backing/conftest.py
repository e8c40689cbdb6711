"""Servers that live as long as a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

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
