"""QMP: how messages are cut and understood, and how a connection ends."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import MonitorLost, MonitorRefused, UsageError
from qedfs.migrate.monitor import MonitorAddress, greeted, open_monitor, parse_monitor, wait_for_monitor
from qedfs.migrate.protocol import MAX_LINE, Answer, Decoder, Event, Greeting, ProtocolError, Refusal, encode

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}\r\n'
TALK = (
    GREETING
    + b'{"return": {}, "id": 1}\r\n'
    + b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
    + b'{"id": 2, "error": {"class": "GenericError", "desc": "no"}}\r\n'
    + b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n'
    + b'{"event": "MIGRATION", "data": {"status": "active"}}\n'
)
HEARD = [
    Greeting("7.2.22"),
    Answer(1, {}),
    Event("STOP", {}),
    Refusal(2, "no"),
    Refusal(None, "JSON parse error"),
    Event("MIGRATION", {"status": "active"}),
]


@given(st.lists(st.integers(0, len(TALK)), max_size=8))
def test_messages_are_the_same_however_the_bytes_arrive(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(TALK)]
    decoder = Decoder()
    heard = [m for start, end in pairwise(edges) for m in decoder.feed(TALK[start:end])]
    assert heard == HEARD


@pytest.mark.parametrize(
    "line",
    [b"HTTP/1.1 400 Bad Request\r\n", b"\xff\xfe\n", b"[1]\n", b'{"return": {}}\n', b"[" * 100_000 + b"\n", b"7\n"],
    ids=["http", "bytes", "list", "no number", "deep", "number"],
)
def test_what_is_no_qmp_is_told(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder().feed(line)


def test_a_message_without_end_is_refused() -> None:
    decoder = Decoder()
    assert decoder.feed(b"{" + b" " * (MAX_LINE - 1)) == []
    with pytest.raises(ProtocolError, match="more than"):
        decoder.feed(b" ")


def test_a_command_is_one_line() -> None:
    assert (
        encode(3, "migrate", {"uri": "exec:a\nb"})
        == b'{"execute": "migrate", "arguments": {"uri": "exec:a\\nb"}, "id": 3}\n'
    )
    assert encode(4, "cont", {}) == b'{"execute": "cont", "id": 4}\n'


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/vm.qmp", MonitorAddress(path="/run/vm.qmp")),
        ("/run/vm.qmp,server=on,wait=off", MonitorAddress(path="/run/vm.qmp")),
        ("tcp:host:4444", MonitorAddress(host="host", port=4444)),
        ("10.0.0.1:4444", MonitorAddress(host="10.0.0.1", port=4444)),
        ("tcp:[::1]:4444", MonitorAddress(host="::1", port=4444)),
    ],
)
def test_addresses_are_in_the_words_of_qemu(text: str, address: MonitorAddress) -> None:
    assert parse_monitor(text, "--source") == address
    assert parse_monitor(str(address), "--source") == address


@pytest.mark.parametrize("text", ["", "unix:", "host", "host:0", "host:70000", "udp:host:1", "::1:4"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no QMP socket"):
        parse_monitor(text, "--source")


async def test_news_between_command_and_answer_is_kept() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(GREETING + b'{"return": {}, "id": 1}\n')
    monitor = await greeted("source", ours)
    await theirs.send_all(b'{"event": "STOP"}\n{"return": [7], "id": 2}\n')
    assert await monitor.execute("query-x") == [7]
    with trio.fail_after(1):
        await monitor.news(60)
    await theirs.send_all(b'{"error": {"class": "GenericError", "desc": "it is late"}, "id": 3}\n')
    with pytest.raises(MonitorRefused, match="source: cont: it is late"):
        await monitor.execute("cont")
    await monitor.aclose()


async def test_an_answer_that_came_too_late_is_not_taken_for_another(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(GREETING + b'{"return": {}, "id": 1}\n')
    monitor = await greeted("source", ours)
    with pytest.raises(MonitorLost, match="no answer to stop within 30 s"):
        await monitor.execute("stop")
    await theirs.send_all(b'{"return": "late", "id": 2}\n{"return": "right", "id": 3}\n')
    assert await monitor.execute("query-status") == "right"
    await monitor.aclose()


async def test_a_socket_that_another_client_has_is_told(autojump_clock: trio.testing.MockClock) -> None:
    ours, _theirs = trio.testing.memory_stream_pair()
    with pytest.raises(MonitorLost, match="no greeting: QMP serves one client at a time"):
        await greeted("source", ours)


async def test_a_connection_that_ends_is_told() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(GREETING[:20])
    await theirs.send_eof()
    with pytest.raises(MonitorLost, match="source: the connection has ended"):
        await greeted("source", ours)


async def test_another_protocol_is_told() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(b"SSH-2.0-OpenSSH_9.2\r\n")
    with pytest.raises(MonitorLost, match="does not speak QMP"):
        await greeted("source", ours)


async def test_nobody_there_is_told_and_somebody_who_comes_is_waited_for(tmp_path: Path) -> None:
    address = MonitorAddress(path=str(tmp_path / "qmp"))
    with pytest.raises(MonitorLost, match=r"cannot be reached at unix:.*qmp \(No such file"):
        await open_monitor("destination", address)

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(GREETING)
        assert b"qmp_capabilities" in await stream.receive_some()
        await stream.send_all(b'{"return": {}, "id": 1}\n')
        assert await stream.receive_some() == b""

    async with trio.open_nursery() as nursery:
        waiting = trio.Event()

        async def wait() -> None:
            waiting.set()
            await (await wait_for_monitor("destination", address, 20)).aclose()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait)
        await waiting.wait()
        with trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(address.path)
            listening.listen()
            await trio.serve_listeners(answer, [trio.SocketListener(listening)])
