"""The NBD source by TLS: against nbdkit and qemu-nbd, and against servers that would like to do without."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.backing.base import Extent
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.nbd import open_nbd
from qedfs.backing.policy import Policy
from qedfs.errors import BackingRefused, BackingUnavailable, NotAllowed
from qedfs.nbd.address import NbdAddress
from qedfs.nbd.constants import Option, Reply
from qedfs.nbd.negotiation import ServerHandshake
from qedfs.nbd.tls import ENVIRONMENT, server_context
from tests.backing.test_nbd_source import AGREEMENT, MIB, Peer, RealServer, check_parallel_reads, opened, pattern, read
from tests.nbd.certificates import Authority


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path / "nbd.sock")
    yield server
    server.vanish()


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Path:
    """One folder with everything a client and a server need."""
    authority.client(tmp_path / "pki")
    return authority.server(tmp_path / "pki")


def nbdkit(folder: Path, what: str = "pattern 4M", more: str = "") -> str:
    return f"nbdkit -f --tls=require --tls-certificates={folder} {more} {what}"


def qemu_nbd(folder: Path, image: Path) -> str:
    credentials = f"tls-creds-x509,id=tls0,endpoint=server,dir={folder},verify-peer=on"
    return f"qemu-nbd -t -r -e 8 -f raw --object {credentials} --tls-creds tls0 {image}"


def by_tls(server: RealServer, folder: Path | str = "", hostname: str = "") -> NbdAddress:
    return replace(server.address, tls=True, certificates=str(folder), hostname=hostname)


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
async def test_reads_and_extents_with_certificates_on_both_sides(
    real: RealServer, files: Path, tmp_path: Path, kind: str
) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.write(pattern(0, 2 * MIB))
        file.truncate(4 * MIB)
    content = image.read_bytes()
    real.start(qemu_nbd(files, image) if kind == "qemu-nbd" else nbdkit(files, f"file {image}", "-r --tls-verify-peer"))
    async with opened(by_tls(real, files)) as source:
        assert await read(source, 0, source.size) == content
        await check_parallel_reads(source, lambda pos, length: content[pos : pos + length])
        assert await source.extents(MIB, 2 * MIB) == [Extent(MIB, False), Extent(MIB, True)]
        assert source.connections > 1


async def test_tcp_verifies_the_host_of_the_address(files: Path, authority: Authority) -> None:
    server = RealServer(None)
    try:
        server.start(nbdkit(files))
        async with opened(by_tls(server, files)) as source:
            await check_parallel_reads(source, pattern, 50)
        authority.server(files, "elsewhere.example")
        server.kill()
        server.start(nbdkit(files))
        with pytest.raises(BackingRefused, match=r"certificate that is not accepted: .*127\.0\.0\.1"):
            await open_nbd(by_tls(server, files))
    finally:
        server.vanish()


async def test_a_server_that_is_killed_and_started_again_goes_unnoticed(real: RealServer, files: Path) -> None:
    real.start(nbdkit(files))
    async with opened(by_tls(real, files)) as source:
        assert await read(source, 8, 100_000) == pattern(8, 100_000)
        real.kill()
        real.start(nbdkit(files))
        assert await read(source, 16, 2 * MIB) == pattern(16, 2 * MIB)


async def test_a_cancelled_read_leaves_the_connection_usable(real: RealServer, files: Path) -> None:
    real.start(nbdkit(files))
    async with opened(by_tls(real, files), connections=1) as source:
        for _ in range(5):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read, source, 0, 4 * MIB)
                    await trio.lowlevel.checkpoint()
                    scope.cancel()
        assert await read(source, 0, 4 * MIB) == pattern(0, 4 * MIB)


async def test_a_certificate_of_another_authority_is_refused(real: RealServer, files: Path, tmp_path: Path) -> None:
    real.start(nbdkit(files))
    stranger = Authority("stranger").believed(tmp_path / "stranger")
    for folder in (stranger, ""):  # empty: the authorities of the machine
        with pytest.raises(BackingRefused, match="shows a certificate that is not accepted"):
            await open_nbd(by_tls(real, folder))


async def test_another_name_is_refused_unless_it_is_the_one_to_verify(
    real: RealServer, authority: Authority, files: Path
) -> None:
    authority.server(files, "store.example")
    real.start(nbdkit(files))
    with pytest.raises(BackingRefused, match=r"[Hh]ostname mismatch.*localhost"):
        await open_nbd(by_tls(real, files))
    async with opened(by_tls(real, files, "store.example")) as source:
        assert await read(source, 0, 100) == pattern(0, 100)


async def test_an_expired_certificate_may_be_renewed(real: RealServer, authority: Authority, files: Path) -> None:
    authority.server(files, days=-1)
    real.start(nbdkit(files))
    with pytest.raises(BackingUnavailable, match="not accepted: certificate has expired"):
        await open_nbd(by_tls(real, files))


async def test_a_revoked_certificate_is_refused(real: RealServer, authority: Authority, files: Path) -> None:
    real.start(nbdkit(files))
    authority.revoke(files, "server-cert.pem")
    with pytest.raises(BackingRefused, match="not accepted: certificate revoked"):
        await open_nbd(by_tls(real, files))


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
async def test_a_client_without_certificate_is_told_what_may_be_missing(
    real: RealServer, authority: Authority, files: Path, tmp_path: Path, kind: str
) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    real.start(qemu_nbd(files, image) if kind == "qemu-nbd" else nbdkit(files, more="--tls-verify-peer"))
    for _ in range(5):  # whether our first bytes still find the server is a race
        with pytest.raises(BackingUnavailable, match="hung up as soon as TLS had begun; it may require a client cert"):
            await open_nbd(by_tls(real, authority.believed(tmp_path / "ca")))
        stranger = Authority("stranger").client(tmp_path / "stranger")
        authority.believed(stranger)
        with pytest.raises(BackingUnavailable, match="it may not accept our client certificate"):
            await open_nbd(by_tls(real, stranger))


async def test_a_server_that_says_what_it_wants_is_believed(authority: Authority, files: Path, tmp_path: Path) -> None:
    """OpenSSL sends alerts; what they say is final."""
    context = server_context(str(files), verify_peer=True)
    stranger = Authority("stranger").client(tmp_path / "stranger")
    authority.believed(stranger)
    cases = [(authority.believed(tmp_path / "ca"), "requires a client cert"), (stranger, "does not accept our client")]
    for folder, why in cases:
        with socket.socket(socket.AF_UNIX) as listener:
            path = folder / "s"
            listener.bind(str(path))
            listener.listen()

            def serve(listener: socket.socket = listener) -> None:
                peer, _ = listener.accept()
                peer.settimeout(10)
                peer.sendall(_GREETING)
                heard = b""
                while len(heard) < 20:
                    heard += peer.recv(20 - len(heard))
                peer.sendall(_ACK)
                with contextlib.suppress(OSError), context.wrap_socket(peer, server_side=True):
                    pass
                peer.close()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: trio.to_thread.run_sync(serve))
                with pytest.raises(BackingRefused, match=why):
                    await open_nbd(NbdAddress(True, None, 0, str(path), "", certificates=str(folder)))


async def test_folders_that_are_of_no_use_are_told_in_one_line(
    real: RealServer, authority: Authority, files: Path, tmp_path: Path
) -> None:
    real.start(nbdkit(files))
    with pytest.raises(BackingRefused, match=r"/none holds neither ca-cert.pem nor client-cert.pem"):
        await open_nbd(by_tls(real, tmp_path / "none"))
    broken = authority.client(tmp_path / "broken")
    (broken / "client-key.pem").unlink()
    with pytest.raises(BackingRefused, match=r"client-key.pem cannot be used \(No such file"):
        await open_nbd(by_tls(real, broken))
    (broken / "ca-cert.pem").write_text("nonsense")
    with pytest.raises(BackingRefused, match=r"ca-cert.pem cannot be used"):
        await open_nbd(by_tls(real, broken))


async def test_an_encrypted_key_is_refused_without_asking_anybody(real: RealServer, files: Path) -> None:
    key = files / "client-key.pem"
    await trio.run_process(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", files / "locked.pem"]
    )
    (files / "locked.pem").rename(key)
    with pytest.raises(BackingRefused, match="the key is encrypted"):
        await open_nbd(by_tls(real, files))


async def test_an_answer_in_the_record_of_another_one_is_not_left_there(tmp_path: Path, files: Path) -> None:
    """The end of the driver's answer and all of another's come as one record: then the socket has nothing to read."""
    context = server_context(str(files), verify_peer=True)

    async def serve(stream: trio.SocketStream) -> None:
        handshake = ServerHandshake("", AGREEMENT, tls=True)
        await stream.send_all(handshake.receive(b""))
        while not handshake.tls_due:
            await stream.send_all(handshake.receive(bytes(await stream.receive_some(handshake.wants))))
        channel = trio.SSLStream(stream, context, server_side=True)
        await channel.do_handshake()
        handshake.secured()
        while wanted := handshake.wants:
            await channel.send_all(handshake.receive(bytes(await channel.receive_some(wanted))))
        assert handshake.result is not None
        peer = Peer(channel, handshake.result)
        first, second = await peer.next(), await peer.next()
        assert first is not None
        assert second is not None
        long, short = peer.data(first), peer.data(second)
        await channel.send_all(long[:-100])
        await trio.testing.wait_all_tasks_blocked()
        await channel.send_all(long[-100:] + short)
        await trio.sleep_forever()

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(os.fspath(tmp_path / "s"))
    listener.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        address = NbdAddress(True, None, 0, str(tmp_path / "s"), "", certificates=str(files))
        async with opened(address, connections=1) as source:

            async def check(pos: int, length: int) -> None:
                assert await read(source, pos, length) == pattern(pos, length)

            with trio.fail_after(10):
                async with trio.open_nursery() as readers:
                    readers.start_soon(check, 0, 60_000)
                    await trio.testing.wait_all_tasks_blocked()
                    readers.start_soon(check, 64, 100)
        nursery.cancel_scope.cancel()


# Whose credentials.


async def test_an_untrusted_image_gets_no_client_certificate_but_the_mounters_authorities(
    real: RealServer, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(files))
    real.start(nbdkit(files))
    for credentials in (True, False):
        source = await open_nbd(by_tls(real), credentials=credentials)
        await source.aclose()
    real.kill()
    real.start(nbdkit(files, more="--tls-verify-peer"))
    source = await open_nbd(by_tls(real))
    await source.aclose()
    with pytest.raises(BackingUnavailable, match="may require a client certificate"):
        await open_nbd(by_tls(real), credentials=False)


async def test_an_untrusted_image_may_not_name_a_folder_of_certificates(
    real: RealServer, files: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"")
    image.chmod(0o666)
    name = str(by_tls(real, files))
    reference = Reference(name, "raw", str(image), image.stat())
    with pytest.raises(NotAllowed):
        await open_backing(reference, Policy())
    with pytest.raises(BackingRefused, match="may not be given credentials"):
        await open_backing(reference, Policy(allow_backing=("nbds*",)))
    real.start(nbdkit(files))
    source = await open_backing(replace(reference, status=None), Policy())
    assert source.name == name
    await source.aclose()


# Servers, or people in between, who would like to do without.


async def test_a_server_without_tls_is_refused(real: RealServer, files: Path) -> None:
    for command in ("nbdkit -f pattern 1M", "nbdkit -f -o memory 1M"):
        real.start(command)
        with pytest.raises(BackingRefused):
            await open_nbd(by_tls(real, files))
        real.kill()
    real.start("nbdkit -f pattern 1M")
    with pytest.raises(BackingRefused, match="does not offer TLS; nbds: is never replaced by an open connection"):
        await open_nbd(by_tls(real, files))


async def test_a_server_that_requires_tls_says_how(real: RealServer, files: Path) -> None:
    real.start(nbdkit(files))
    with pytest.raises(BackingRefused, match="write nbds:// for nbd://"):
        await open_nbd(real.address)


def _reply(option: Option, kind: Reply, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


_GREETING = b"NBDMAGICIHAVEOPT\0\3"
_ACK = _reply(Option.STARTTLS, Reply.ACK)
_IN_THE_CLEAR = (
    _reply(Option.STRUCTURED_REPLY, Reply.ACK)
    + _reply(Option.GO, Reply.INFO, struct.pack(">HQH", 0, MIB, 3))
    + _reply(Option.GO, Reply.ACK)
)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (_ACK + _IN_THE_CLEAR, BackingRefused),
        (_IN_THE_CLEAR, BackingRefused),
        (_reply(Option.STARTTLS, Reply.INFO, b"\0\0") + _ACK, BackingRefused),
        (_reply(Option.STARTTLS, Reply.ERR_UNSUP) + _IN_THE_CLEAR, BackingRefused),
        (_reply(Option.STARTTLS, Reply.ERR_POLICY) + _IN_THE_CLEAR, BackingRefused),
        (_ACK, BackingUnavailable),
        (_ACK[:7], BackingUnavailable),
    ],
    ids=["behind the answer", "instead", "before the answer", "unsupported", "policy", "hang up", "cut off"],
)
async def test_what_is_put_in_before_tls_is_never_believed(
    tmp_path: Path, files: Path, said: bytes, kind: type[Exception]
) -> None:
    heard = bytearray()

    async def talk(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(_GREETING)
            while len(heard) < 20:
                heard.extend(await stream.receive_some())
            await stream.send_all(said)
            await stream.send_eof()
            async for data in stream:
                heard.extend(data)

    await _refused_by(talk, tmp_path / "s", files, kind)
    # Flags and STARTTLS, and then nothing but records of TLS (a handshake or an alert).
    assert heard[4:20] == b"IHAVEOPT" + struct.pack(">II", Option.STARTTLS, 0)
    assert bytes(heard[20:21]) in (b"", b"\x15", b"\x16")


async def test_flags_that_leave_out_the_options_are_no_way_around_tls(tmp_path: Path, files: Path) -> None:
    async def talk(stream: trio.SocketStream) -> None:
        await stream.send_all(b"NBDMAGICIHAVEOPT\0\0")

    await _refused_by(talk, tmp_path / "s", files, BackingRefused)


async def _refused_by(
    talk: Callable[[trio.SocketStream], object], path: Path, files: Path, kind: type[Exception]
) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(os.fspath(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, talk, [trio.SocketListener(listener)])
        with pytest.raises(kind):
            await open_nbd(NbdAddress(True, None, 0, str(path), "", certificates=str(files)))
        nursery.cancel_scope.cancel()
