"""How a client leaves an NBD server that is answering it: other clients must not notice."""

from __future__ import annotations

from pathlib import Path

import trio

from qedfs.backing.nbd import NbdSource, open_nbd
from qedfs.nbd.address import parse_address
from tests.backing.samples import served_by_nbdkit

MIB = 1 << 20
READERS = 32
ROUNDS = 20


async def left_in_the_middle(source: NbdSource, seconds: float) -> None:
    """Be away while as many reads of 1 MiB are under way."""
    async with trio.open_nursery() as nursery:
        for number in range(READERS):
            nursery.start_soon(source.read_into, number * MIB, memoryview(bytearray(MIB)))
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()
    await source.aclose()


async def test_a_server_that_answers_serves_others_when_a_client_leaves_in_the_middle(tmp_path: Path) -> None:
    """nbdkit 1.32 ends by an assertion when a connection goes under an answer."""
    with served_by_nbdkit(tmp_path / "socket", "pattern", f"{READERS}M") as url:
        other = await open_nbd(parse_address(url))
        for number in range(ROUNDS):
            await left_in_the_middle(await open_nbd(parse_address(url)), number * 0.0005)
        buffer = bytearray(16)
        await other.read_into(0, memoryview(buffer))
        assert buffer == bytes(8) + (8).to_bytes(8, "big")
        await other.aclose()


async def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with served_by_nbdkit(tmp_path / "socket", "--filter=delay", "pattern", f"{READERS}M", "rdelay=3600") as url:
        source = await open_nbd(parse_address(url))
        with trio.fail_after(20):
            await left_in_the_middle(source, 0.1)
