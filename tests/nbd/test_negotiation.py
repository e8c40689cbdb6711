"""Stories of the handshake: each side against a script, and the two sides against each other."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.nbd.constants import OPTION_MAGIC, Info, Option, Reply, TransmissionFlag
from qedfs.nbd.errors import NbdDisconnected, NbdError, NbdOptionRefused, NbdProtocolError, NbdTlsFailed
from qedfs.nbd.negotiation import Agreement, BlockSizes, ClientHandshake, ServerHandshake

READ_ONLY = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY
OFFER = Agreement(1 << 30, READ_ONLY, True, 7, BlockSizes(512, 4096, 1 << 20))


def greeting(flags: int = 3) -> bytes:
    return b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)


def reply(option: Option, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def export_info(size: int = 1 << 20, flags: int = 0x103) -> bytes:
    return reply(Option.GO, Reply.INFO, struct.pack(">HQH", Info.EXPORT, size, flags))


def block_info(minimum: int, preferred: int, maximum: int) -> bytes:
    return reply(Option.GO, Reply.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, minimum, preferred, maximum))


GO_ACK = reply(Option.GO, Reply.ACK)
NO_STRUCTURED = reply(Option.STRUCTURED_REPLY, Reply.ERR_UNSUP)
STRUCTURED = reply(Option.STRUCTURED_REPLY, Reply.ACK)
CONTEXT = reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, struct.pack(">I", 9) + b"base:allocation")
CONTEXT_ACK = reply(Option.SET_META_CONTEXT, Reply.ACK)


def client(*answers: bytes, export: str = "disk") -> Agreement:
    handshake = ClientHandshake(export)
    handshake.receive(b"")
    for answer in answers:
        handshake.receive(answer)
    assert handshake.result is not None
    return handshake.result


def test_client_asks_in_order_and_takes_everything() -> None:
    handshake = ClientHandshake("disk")
    assert handshake.receive(greeting()) == b"\0\0\0\x03" + option(Option.STRUCTURED_REPLY)
    query = string(b"disk") + b"\0\0\0\1" + string(b"base:allocation")
    assert handshake.receive(STRUCTURED) == option(Option.SET_META_CONTEXT, query)
    go = string(b"disk") + struct.pack(">HH", 1, Info.BLOCK_SIZE)
    assert handshake.receive(CONTEXT + CONTEXT_ACK) == option(Option.GO, go)
    assert handshake.receive(export_info() + block_info(512, 4096, 70000)) == b""
    assert handshake.result is None
    assert handshake.receive(GO_ACK) == b""
    assert handshake.wants == 0
    assert handshake.result == Agreement(1 << 20, TransmissionFlag(0x103), True, 9, BlockSizes(512, 4096, 69632))


def test_client_does_without_what_the_server_does_not_know() -> None:
    assert client(greeting(), NO_STRUCTURED, export_info() + GO_ACK) == Agreement(1 << 20, TransmissionFlag(0x103))
    without_context = client(greeting(), STRUCTURED, CONTEXT_ACK, export_info() + GO_ACK)
    assert without_context.structured
    assert without_context.allocation_context is None
    refused = reply(Option.SET_META_CONTEXT, Reply.ERR_UNSUP)
    assert client(greeting(), STRUCTURED, refused, export_info() + GO_ACK).structured


def test_client_falls_back_to_export_name_when_go_is_unknown() -> None:
    handshake = ClientHandshake("disk")
    handshake.receive(greeting())
    handshake.receive(NO_STRUCTURED)
    assert handshake.receive(reply(Option.GO, Reply.ERR_UNSUP)) == option(Option.EXPORT_NAME, b"disk")
    handshake.receive(struct.pack(">QH", 4096, 1))
    assert handshake.result == Agreement(4096, TransmissionFlag(1))


def test_client_reads_the_padding_it_could_not_negotiate_away() -> None:
    handshake = ClientHandshake("disk")
    assert handshake.receive(greeting(flags=0)) == bytes(4) + option(Option.EXPORT_NAME, b"disk")
    handshake.receive(struct.pack(">QH", 4096, 1) + bytes(123))
    assert handshake.wants == 1
    handshake.receive(b"\0")
    assert handshake.result is not None


def test_hang_up_after_export_name_means_no_such_export() -> None:
    handshake = ClientHandshake("disk")
    handshake.receive(greeting(flags=0))
    assert isinstance(handshake.end_of_stream(), NbdOptionRefused)


def test_hang_up_before_is_a_lost_connection() -> None:
    assert isinstance(ClientHandshake("disk").end_of_stream(), NbdDisconnected)


def test_unknown_infos_are_skipped() -> None:
    description = reply(Option.GO, Reply.INFO, struct.pack(">H", Info.DESCRIPTION) + b"hello")
    unknown = reply(Option.GO, Reply.INFO, struct.pack(">H", 4711))
    assert client(greeting(), NO_STRUCTURED, description + unknown + export_info() + GO_ACK).size == 1 << 20


@pytest.mark.parametrize("code", [Reply.ERR_UNKNOWN, Reply.ERR_POLICY, Reply.ERR_TLS_REQD, Reply.ERR_SHUTDOWN])
def test_refusal_carries_code_and_text(code: Reply) -> None:
    with pytest.raises(NbdOptionRefused, match="go away") as caught:
        client(greeting(), NO_STRUCTURED, reply(Option.GO, code, b"go away"))
    assert caught.value.code == code


def test_required_tls_is_told_at_the_first_option() -> None:
    with pytest.raises(NbdOptionRefused, match="TLS"):
        client(greeting(), reply(Option.STRUCTURED_REPLY, Reply.ERR_TLS_REQD))


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([b"SSH-2.0-OpenSSH_9.2p1 Debian"], "does not speak NBD"),
        ([b"NBDMAGIC" + struct.pack(">QH", 0x420281861253, 0)], "oldstyle"),
        ([b"NBDMAGIC" + bytes(10)], "unknown style"),
        ([greeting(), b"x" * 20], "something else"),
        ([greeting(), GO_ACK], "something else"),
        ([greeting(), struct.pack(">QIII", 0x3E889045565A9, 8, 1, 1 << 31)], "too much"),
        ([greeting(), NO_STRUCTURED, GO_ACK], "did not tell the size"),
        ([greeting(), NO_STRUCTURED, export_info(size=1 << 63) + GO_ACK], "impossible size"),
        ([greeting(), NO_STRUCTURED, export_info() + block_info(3, 4096, 8192) + GO_ACK], "block sizes"),
        ([greeting(), NO_STRUCTURED, export_info() + block_info(0, 0, 0) + GO_ACK], "block sizes"),
        ([greeting(), NO_STRUCTURED, export_info() + block_info(1 << 17, 1 << 17, 1 << 20) + GO_ACK], "block sizes"),
        ([greeting(), NO_STRUCTURED, export_info() + block_info(4096, 512, 1 << 20) + GO_ACK], "block sizes"),
        ([greeting(), NO_STRUCTURED, reply(Option.GO, Reply.INFO, b"\0\0xyz") + GO_ACK], "wrong length"),
        ([greeting(), NO_STRUCTURED, reply(Option.GO, Reply.SERVER, b"abcd") + GO_ACK], "something else"),
        ([greeting(), NO_STRUCTURED, export_info() * 300], "does not stop"),
        ([greeting(), STRUCTURED, reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, b"\0\0\0\1other")], "not asked"),
        ([greeting(), NO_STRUCTURED, export_info() + GO_ACK + b"x"], "before it was its turn"),
    ],
)
def test_misbehaving_server_is_found_out(answers: list[bytes], why: str) -> None:
    with pytest.raises(NbdProtocolError, match=why):
        client(*answers, CONTEXT_ACK)


def negotiate(export: str, server: ServerHandshake, chunk: int) -> Agreement:
    """Let both sides talk, `chunk` bytes at a time; return the client's view."""
    talker = ClientHandshake(export)
    to_client, to_server = server.receive(b""), b""
    while talker.result is None:
        assert to_client or to_server
        if to_client:
            to_server += talker.receive(to_client[:chunk])
            to_client = to_client[chunk:]
        else:
            to_client += server.receive(to_server[:chunk])
            to_server = to_server[chunk:]
    return talker.result


@given(st.integers(1, 200), st.sampled_from(["", "disk"]))
def test_both_sides_agree_however_the_bytes_are_split(chunk: int, export: str) -> None:
    server = ServerHandshake("disk", OFFER)
    assert negotiate(export, server, chunk) == OFFER
    assert server.result == OFFER


def test_server_refuses_an_unknown_export() -> None:
    with pytest.raises(NbdOptionRefused, match="no such export"):
        negotiate("other", ServerHandshake("disk", OFFER), 1000)


def server_after(*options: bytes, flags: int = 3) -> tuple[ServerHandshake, bytes]:
    server = ServerHandshake("disk", OFFER)
    server.receive(b"")
    return server, server.receive(struct.pack(">I", flags) + b"".join(options))


def test_server_lists_its_export() -> None:
    _, answer = server_after(option(Option.LIST))
    assert answer == reply(Option.LIST, Reply.SERVER, string(b"disk")) + reply(Option.LIST, Reply.ACK)


def test_server_answers_info_and_stays_in_the_negotiation() -> None:
    server, answer = server_after(option(Option.INFO, string(b"disk") + b"\0\0"))
    assert answer.endswith(reply(Option.INFO, Reply.ACK))
    assert server.result is None


@pytest.mark.parametrize("no_zeroes", [0, 2])
def test_server_serves_export_name(no_zeroes: int) -> None:
    server, answer = server_after(option(Option.EXPORT_NAME, b"disk"), flags=1 | no_zeroes)
    assert answer == struct.pack(">QH", 1 << 30, 3) + (b"" if no_zeroes else bytes(124))
    assert server.result == Agreement(1 << 30, READ_ONLY, False, None, OFFER.blocks)


def test_context_is_void_for_another_name() -> None:
    context = option(Option.SET_META_CONTEXT, string(b"disk") + b"\0\0\0\1" + string(b"base:allocation"))
    server, _ = server_after(option(Option.STRUCTURED_REPLY), context, option(Option.GO, string(b"") + b"\0\0"))
    assert server.result is not None
    assert server.result.allocation_context is None


def test_unknown_context_is_acknowledged_without_being_set() -> None:
    context = option(Option.SET_META_CONTEXT, string(b"disk") + b"\0\0\0\1" + string(b"qemu:dirty-bitmap:x"))
    _, answer = server_after(option(Option.STRUCTURED_REPLY), context)
    assert answer == STRUCTURED + CONTEXT_ACK


@pytest.mark.parametrize("query", [b"", b"base:", b"base:allocation"])
def test_contexts_are_listed(query: bytes) -> None:
    queries = b"\0\0\0\1" + string(query) if query else bytes(4)
    _, answer = server_after(option(Option.LIST_META_CONTEXT, string(b"disk") + queries))
    assert b"base:allocation" in answer


@pytest.mark.parametrize(
    "malformed",
    [
        option(Option.LIST, b"x"),
        option(Option.STRUCTURED_REPLY, b"x"),
        option(Option.GO, b""),
        option(Option.GO, string(b"disk")),
        option(Option.GO, string(b"disk") + b"\0\2\0\3"),
        option(Option.GO, b"\xff\xff\xff\xff"),
        option(Option.SET_META_CONTEXT, string(b"disk") + b"\0\0\0\1" + string(b"base:allocation")),
        option(Option.LIST_META_CONTEXT, string(b"disk") + b"\xff\xff\xff\xff"),
        option(Option.LIST_META_CONTEXT, string(b"disk") + bytes(5)),
    ],
)
def test_malformed_option_is_answered_as_invalid(malformed: bytes) -> None:
    server, answer = server_after(malformed)
    assert struct.unpack_from(">I", answer, 12)[0] == Reply.ERR_INVALID
    assert server.receive(option(4711)) == reply(4711, Reply.ERR_UNSUP, b"not supported")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([b"GET / HTTP/1.1\r\n\r\n"], NbdProtocolError),
        ([struct.pack(">QII", OPTION_MAGIC, Option.GO, 1 << 30)], NbdProtocolError),
        ([option(Option.ABORT)], NbdDisconnected),
        ([option(Option.EXPORT_NAME, b"other")], NbdDisconnected),
    ],
)
def test_server_ends_with_a_client_that_is_out_of_step(options: list[bytes], error: type[NbdError]) -> None:
    with pytest.raises(error):
        server_after(*options)


def test_client_flags_that_were_not_offered_are_refused() -> None:
    with pytest.raises(NbdProtocolError):
        server_after(flags=4)


# TLS.


def due(handshake: ClientHandshake | ServerHandshake) -> bool:
    return handshake.tls_due


def test_client_starts_tls_before_anything_else() -> None:
    handshake = ClientHandshake("disk", tls=True)
    assert handshake.receive(greeting()) == b"\0\0\0\x03" + option(Option.STARTTLS)
    assert not due(handshake)
    assert handshake.receive(reply(Option.STARTTLS, Reply.ACK)) == b""
    assert due(handshake)
    assert handshake.wants == 0
    assert handshake.secured() == option(Option.STRUCTURED_REPLY)
    assert not due(handshake)
    handshake.receive(NO_STRUCTURED)
    handshake.receive(export_info() + GO_ACK)
    assert handshake.result is not None


def test_client_takes_nothing_that_was_read_ahead_of_tls() -> None:
    handshake = ClientHandshake("disk", tls=True)
    handshake.receive(greeting())
    with pytest.raises(NbdProtocolError, match="before it was its turn"):
        handshake.receive(reply(Option.STARTTLS, Reply.ACK) + NO_STRUCTURED)


@pytest.mark.parametrize("code", [Reply.ERR_UNSUP, Reply.ERR_POLICY, Reply.ERR_INVALID, Reply.ERR_PLATFORM])
def test_client_never_does_without_tls(code: Reply) -> None:
    handshake = ClientHandshake("disk", tls=True)
    handshake.receive(greeting())
    with pytest.raises(NbdTlsFailed, match="does not offer TLS"):
        handshake.receive(reply(Option.STARTTLS, code))


def test_client_with_tls_does_not_fall_back_to_the_negotiation_without_options() -> None:
    with pytest.raises(NbdTlsFailed):
        ClientHandshake("disk", tls=True).receive(greeting(flags=2))


def test_server_that_shuts_down_before_tls_may_come_back() -> None:
    handshake = ClientHandshake("disk", tls=True)
    handshake.receive(greeting())
    with pytest.raises(NbdOptionRefused):
        handshake.receive(reply(Option.STARTTLS, Reply.ERR_SHUTDOWN))


def test_server_with_tls_tells_nothing_before() -> None:
    server = ServerHandshake("disk", OFFER, tls=True)
    server.receive(b"")
    asked = [Option.STRUCTURED_REPLY, Option.LIST, Option.INFO, Option.GO, Option.SET_META_CONTEXT]
    answer = server.receive(b"\0\0\0\3" + b"".join(option(one, string(b"disk") + b"\0\0") for one in asked))
    why = b"this server serves nobody without TLS"
    assert answer == b"".join(reply(one, Reply.ERR_TLS_REQD, why) for one in asked)
    assert server.result is None
    with pytest.raises(NbdDisconnected, match="without TLS"):
        server.receive(option(Option.EXPORT_NAME, b"disk"))


def test_server_begins_tls_once_and_with_nothing_from_before() -> None:
    server = ServerHandshake("disk", OFFER, tls=True)
    server.receive(b"")
    # Structured replies that somebody asks for in the clear must not hold for the client behind TLS.
    server.receive(b"\0\0\0\3" + option(Option.STRUCTURED_REPLY))
    with_data = server.receive(option(Option.STARTTLS, b"x"))
    assert struct.unpack_from(">I", with_data, 12)[0] == Reply.ERR_INVALID
    assert not due(server)
    assert server.receive(option(Option.STARTTLS)) == reply(Option.STARTTLS, Reply.ACK)
    assert due(server)
    assert server.secured() == b""
    again = server.receive(option(Option.STARTTLS))
    assert struct.unpack_from(">I", again, 12)[0] == Reply.ERR_INVALID
    server.receive(option(Option.GO, string(b"disk") + b"\0\0"))
    assert server.result is not None
    assert not server.result.structured


def test_server_takes_nothing_that_was_read_ahead_of_tls() -> None:
    server = ServerHandshake("disk", OFFER, tls=True)
    server.receive(b"")
    with pytest.raises(NbdProtocolError, match="before it was its turn"):
        server.receive(b"\0\0\0\3" + option(Option.STARTTLS) + option(Option.LIST))


def test_server_without_tls_says_so() -> None:
    _, answer = server_after(option(Option.STARTTLS))
    assert struct.unpack_from(">I", answer, 12)[0] == Reply.ERR_UNSUP
