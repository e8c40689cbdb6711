"""The handshake of fixed newstyle NBD, both sides, without I/O.

A handshake is told as a story: a generator that sends by calling `_send` and names the number of bytes it must see to go
on. The driver moves the bytes:

    to_send = handshake.receive(b"")
    while handshake.result is None: send to_send; to_send = handshake.receive(what came)

`wants` is exact: a driver that never reads more than `wants` leaves everything behind the handshake in the socket, for
the transmission phase, or for TLS, which has to start at once behind the answer to STARTTLS with nothing read ahead.

TLS: when `tls_due`, the driver sends what it was given, makes the connection an encrypted one and calls `secured`; all
bytes go through TLS from then on. STARTTLS is the first option a client sends, and the only one a server with TLS
answers before: nothing that was negotiated in the clear, where anybody on the way could have put it in, is left behind
it. Plain bytes behind STARTTLS or its answer end up in the TLS handshake, which they break. A client that shall have TLS
has it or fails; a server that has TLS serves nobody without.

The rules: the server greets; the client sends one option at a time and waits for its final reply (an ACK or an error),
which may follow any number of others; GO or EXPORT_NAME ends it. No peer can make us hold more than one option's data
(`MAX_OPTION_DATA`) or count more than `MAX_OPTION_REPLIES`; how long it may take is the driver's affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

from qedfs.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_SIZES,
    EXPORT,
    EXPORT_NAME_PADDING,
    GREETING,
    MAX_MINIMUM_BLOCK,
    MAX_OPTION_DATA,
    MAX_OPTION_REPLIES,
    MAX_PAYLOAD,
    MAX_SIZE,
    MAX_STRING,
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REPLY_ERROR,
    U16,
    U32,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from qedfs.nbd.errors import NbdDisconnected, NbdError, NbdOptionRefused, NbdProtocolError, NbdTlsFailed

T = TypeVar("T")
Story = Generator[int, bytes, T]
"""Yields how many bytes it needs, is sent exactly these, returns what came of it."""

_TLS = 0
"""What a story yields where TLS has to begin."""

SERVER = "NBD server"
CLIENT = "NBD client"


@dataclass(frozen=True)
class BlockSizes:
    """In bytes. Requests are multiples of `minimum`, aligned to it, and at most `maximum`, itself such a multiple."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD


@dataclass(frozen=True)
class Agreement:
    """What holds for the transmission phase of one connection."""

    size: int
    """Bytes."""
    flags: TransmissionFlag
    structured: bool = False
    """READ is answered by chunks."""
    allocation_context: int | None = None
    """The id of `base:allocation` in BLOCK_STATUS chunks; None: the server does not tell about holes."""
    blocks: BlockSizes = BlockSizes()


class Handshake(ABC, Generic[T]):
    """Moves a story on as bytes come in; `result` is set when it has ended."""

    def __init__(self) -> None:
        self.result: T | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._story = self._tell()
        self._needed = next(self._story)

    @property
    def wants(self) -> int:
        """Bytes that are missing for the next step, at least 1, or 0 when the handshake has ended or TLS is due."""
        return 0 if self.result is not None else self._needed - len(self._incoming)

    @property
    def tls_due(self) -> bool:
        """TLS has to begin now, before anything else is received."""
        return self.result is None and self._needed == _TLS

    def secured(self) -> bytes:
        """Take note that the connection is encrypted now; return what is to be sent next."""
        assert self.tls_due
        self._needed = self._story.send(b"")
        return self._taken()

    def receive(self, data: bytes) -> bytes:
        """Take what came, in pieces of any size, and return what is to be sent now.

        Raises:
            NbdProtocolError: the peer broke the protocol, or sent more than the handshake asked for.
            NbdOptionRefused: the server refuses what we cannot do without.
            NbdDisconnected: the peer said goodbye.
        """
        self._incoming += data
        while self.result is None and not self.tls_due and len(self._incoming) >= self._needed:
            step = bytes(self._incoming[: self._needed])
            del self._incoming[: self._needed]
            try:
                self._needed = self._story.send(step)
            except StopIteration as end:
                self.result = end.value
        if self._incoming and (self.result is not None or self.tls_due):
            raise NbdProtocolError(self._peer, "sent data before it was its turn")
        return self._taken()

    def end_of_stream(self) -> NbdError:
        """Return the error that the peer's hanging up means at this point."""
        return NbdDisconnected(self._peer, "hung up during the negotiation")

    _peer: str

    @abstractmethod
    def _tell(self) -> Story[T]: ...

    def _taken(self) -> bytes:
        outgoing = bytes(self._outgoing)
        self._outgoing.clear()
        return outgoing

    def _send(self, *parts: bytes) -> None:
        for part in parts:
            self._outgoing += part


class ClientHandshake(Handshake[Agreement]):
    """Asks for one export with everything that makes reading it cheap, and takes what the server can do of that."""

    _peer = SERVER

    def __init__(self, export: str, *, tls: bool = False) -> None:
        self._export = export.encode()
        self._tls = tls
        self._may_hang_up = False
        super().__init__()

    def end_of_stream(self) -> NbdError:
        if self._may_hang_up:
            return NbdOptionRefused(
                SERVER, "hung up when asked for the export, which probably does not exist", Reply.ERR_UNKNOWN
            )
        return super().end_of_stream()

    def _tell(self) -> Story[Agreement]:
        magic, style, flag_bits = GREETING.unpack((yield GREETING.size))
        if magic != NBD_MAGIC:
            raise NbdProtocolError(SERVER, "does not speak NBD")
        if style == OLDSTYLE_MAGIC:
            raise NbdProtocolError(SERVER, "speaks the oldstyle protocol only, which is not supported")
        if style != OPTION_MAGIC:
            raise NbdProtocolError(SERVER, "greets with an unknown style of negotiation")
        flags = HandshakeFlag(flag_bits & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
        self._send(U32.pack(flags))
        if self._tls:
            yield from self._start_tls(flags)

        structured, context = False, None
        if HandshakeFlag.FIXED_NEWSTYLE in flags:
            structured = (yield from self._ask_if_possible(Option.STRUCTURED_REPLY, b"")) is not None
            if structured:
                context = yield from self._set_meta_context()
            go = _string(self._export) + U16.pack(1) + U16.pack(Info.BLOCK_SIZE)
            try:
                return self._agreement((yield from self._ask(Option.GO, go)), structured, context)
            except NbdOptionRefused as refusal:
                if refusal.code != Reply.ERR_UNSUP:
                    raise

        self._send(OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(self._export)), self._export)
        self._may_hang_up = True
        size, transmission_flags = EXPORT.unpack((yield EXPORT.size))
        if HandshakeFlag.NO_ZEROES not in flags:
            yield EXPORT_NAME_PADDING
        return Agreement(_checked_size(size), TransmissionFlag(transmission_flags), structured, context)

    def _start_tls(self, flags: HandshakeFlag) -> Story[None]:
        if HandshakeFlag.FIXED_NEWSTYLE not in flags:
            raise NbdTlsFailed(SERVER, f"speaks a version of NBD without TLS; {_NEVER_PLAIN}")
        try:
            replies = yield from self._ask(Option.STARTTLS, b"")
        except NbdOptionRefused as refusal:
            if refusal.code == Reply.ERR_SHUTDOWN:
                raise
            raise NbdTlsFailed(SERVER, f"does not offer TLS; {_NEVER_PLAIN} ({refusal.why})") from refusal
        if replies:
            raise NbdProtocolError(SERVER, "answered STARTTLS with something else")
        yield _TLS

    def _set_meta_context(self) -> Story[int | None]:
        query = _string(self._export) + U32.pack(1) + _string(BASE_ALLOCATION.encode())
        for kind, data in (yield from self._ask_if_possible(Option.SET_META_CONTEXT, query)) or ():
            if kind != Reply.META_CONTEXT:
                continue
            if data[U32.size :] != BASE_ALLOCATION.encode():
                raise NbdProtocolError(SERVER, "selected a metadata context that was not asked for")
            return int.from_bytes(data[: U32.size])
        return None

    def _agreement(self, replies: list[tuple[int, bytes]], structured: bool, context: int | None) -> Agreement:
        export: tuple[int, int] | None = None
        blocks = BlockSizes()
        for kind, data in replies:
            if kind != Reply.INFO or len(data) < U16.size:
                raise NbdProtocolError(SERVER, "answered the request for an export with something else")
            info, facts = int.from_bytes(data[: U16.size]), data[U16.size :]
            if info == Info.EXPORT:
                _expect_length(facts, EXPORT.size)
                export = EXPORT.unpack(facts)
            elif info == Info.BLOCK_SIZE:
                _expect_length(facts, BLOCK_SIZES.size)
                blocks = _checked_blocks(*BLOCK_SIZES.unpack(facts))
        if export is None:
            raise NbdProtocolError(SERVER, "did not tell the size of the export")
        return Agreement(_checked_size(export[0]), TransmissionFlag(export[1]), structured, context, blocks)

    def _ask(self, option: Option, data: bytes) -> Story[list[tuple[int, bytes]]]:
        """Send `option`; return the replies before the ACK as pairs of type and data, or raise NbdOptionRefused."""
        self._send(OPTION.pack(OPTION_MAGIC, option, len(data)), data)
        replies: list[tuple[int, bytes]] = []
        while len(replies) < MAX_OPTION_REPLIES:
            magic, echo, kind, length = OPTION_REPLY.unpack((yield OPTION_REPLY.size))
            if magic != OPTION_REPLY_MAGIC or echo != option:
                raise NbdProtocolError(SERVER, f"answered {option.name} with something else")
            if length > MAX_OPTION_DATA:
                raise NbdProtocolError(SERVER, f"answered {option.name} with {length} bytes, which is too much")
            payload = (yield length) if length else b""
            if kind & REPLY_ERROR:
                raise NbdOptionRefused(SERVER, _refusal(option, kind, payload), kind)
            if kind == Reply.ACK:
                return replies
            replies.append((kind, payload))
        raise NbdProtocolError(SERVER, f"does not stop to answer {option.name}")

    def _ask_if_possible(self, option: Option, data: bytes) -> Story[list[tuple[int, bytes]] | None]:
        """Ask for what we can do without; None if the server will not. What concerns everything else is raised."""
        try:
            return (yield from self._ask(option, data))
        except NbdOptionRefused as refusal:
            if refusal.code in (Reply.ERR_TLS_REQD, Reply.ERR_SHUTDOWN):
                raise
            return None


class ServerHandshake(Handshake[Agreement]):
    """Offers one export, by its name and as the default export (the empty name).

    `offer` is what the export can do at most; the result says what this client made of it. With `tls` nobody gets to
    know anything of the export before the connection is encrypted ("FORCEDTLS" of the specification).
    """

    _peer = CLIENT

    def __init__(self, name: str, offer: Agreement, *, tls: bool = False) -> None:
        self._name = name.encode()
        self._tls_missing = tls
        self._secure = False
        self._offer = offer
        self._structured = False
        self._context_for: bytes | None = None
        super().__init__()

    def _tell(self) -> Story[Agreement]:
        supported = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._send(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, supported))
        flags = int.from_bytes((yield U32.size))
        if flags & ~int(supported):
            raise NbdProtocolError(CLIENT, "wants what was not offered")
        while True:
            magic, option, length = OPTION.unpack((yield OPTION.size))
            if magic != OPTION_MAGIC:
                raise NbdProtocolError(CLIENT, "sent something else than an option")
            if length > MAX_OPTION_DATA:
                raise NbdProtocolError(CLIENT, f"sent an option of {length} bytes, which is too much")
            data = (yield length) if length else b""
            if option == Option.STARTTLS and self._tls_missing and not data:
                self._reply(option, Reply.ACK)
                yield _TLS
                self._tls_missing, self._secure = False, True
                continue
            if self._tls_missing and option not in (Option.STARTTLS, Option.ABORT):
                if option == Option.EXPORT_NAME:
                    raise NbdDisconnected(CLIENT, "asked for the export without TLS")
                self._reply(option, Reply.ERR_TLS_REQD, b"this server serves nobody without TLS")
                continue
            if option == Option.EXPORT_NAME:
                if not self._is_ours(data):
                    raise NbdDisconnected(CLIENT, "asked for an export that does not exist")
                padding = b"" if flags & HandshakeFlag.NO_ZEROES else bytes(EXPORT_NAME_PADDING)
                self._send(EXPORT.pack(self._offer.size, self._offer.flags), padding)
                return self._agreed(data)
            if option == Option.ABORT:
                raise NbdDisconnected(CLIENT, "said goodbye")
            try:
                chosen = self._answer(option, data)
            except ValueError as error:
                self._reply(option, Reply.ERR_INVALID, str(error).encode())
            else:
                if chosen is not None:
                    return self._agreed(chosen)

    def _answer(self, option: int, data: bytes) -> bytes | None:
        """Answer an option; return the name of the export if that starts the transmission. ValueError: malformed."""
        if option == Option.STRUCTURED_REPLY:
            if data:
                raise ValueError("this option takes no data")
            self._structured = True
            self._reply(option, Reply.ACK)
        elif option == Option.LIST:
            if data:
                raise ValueError("this option takes no data")
            self._reply(option, Reply.SERVER, _string(self._name))
            self._reply(option, Reply.ACK)
        elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            self._answer_meta_context(option, data)
        elif option == Option.STARTTLS and (self._secure or self._tls_missing):
            raise ValueError("TLS has begun already" if self._secure else "this option takes no data")
        elif option in (Option.INFO, Option.GO):
            return self._answer_info(option, data)
        else:
            self._reply(option, Reply.ERR_UNSUP, b"not supported")
        return None

    def _answer_info(self, option: int, data: bytes) -> bytes | None:
        name, rest = _take_string(data)
        if len(rest) < U16.size or len(rest) != U16.size * (1 + int.from_bytes(rest[: U16.size])):
            raise ValueError("the list of wanted facts has the wrong length")
        if not self._is_ours(name):
            self._reply(option, Reply.ERR_UNKNOWN, b"no such export")
            return None
        wanted = {info for (info,) in U16.iter_unpack(rest[U16.size :])}
        self._reply(option, Reply.INFO, U16.pack(Info.EXPORT) + EXPORT.pack(self._offer.size, self._offer.flags))
        if Info.BLOCK_SIZE in wanted:
            blocks = self._offer.blocks
            sizes = BLOCK_SIZES.pack(blocks.minimum, blocks.preferred, blocks.maximum)
            self._reply(option, Reply.INFO, U16.pack(Info.BLOCK_SIZE) + sizes)
        self._reply(option, Reply.ACK)
        return name if option == Option.GO else None

    def _answer_meta_context(self, option: int, data: bytes) -> None:
        name, rest = _take_string(data)
        if len(rest) < U32.size:
            raise ValueError("the number of queries is missing")
        count, rest = int.from_bytes(rest[: U32.size]), rest[U32.size :]
        queries: set[bytes] = set()
        for _ in range(count):
            query, rest = _take_string(rest)
            queries.add(query)
        if rest:
            raise ValueError("bytes are left behind the last query")
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._context_for = None
            if not self._structured:
                raise ValueError("structured replies come first")
        if not self._is_ours(name):
            self._reply(option, Reply.ERR_UNKNOWN, b"no such export")
            return
        context = self._offer.allocation_context
        fits = queries & {BASE_ALLOCATION.encode()} if setting else not queries or queries & _LIST_QUERIES
        if context is not None and fits:
            # The id has a meaning only where the context is set.
            self._reply(option, Reply.META_CONTEXT, U32.pack(context if setting else 0), BASE_ALLOCATION.encode())
            if setting:
                self._context_for = name
        self._reply(option, Reply.ACK)

    def _is_ours(self, name: bytes) -> bool:
        return name in (b"", self._name)

    def _agreed(self, name: bytes) -> Agreement:
        # Contexts are bound to the name they were asked for; another one makes them void.
        context = self._offer.allocation_context if self._context_for == name else None
        offer = self._offer
        return Agreement(offer.size, offer.flags, self._structured, context, offer.blocks)

    def _reply(self, option: int, kind: Reply, *data: bytes) -> None:
        self._send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, sum(map(len, data))), *data)


_NEVER_PLAIN = "nbds: is never replaced by an open connection"
_LIST_QUERIES = {b"base:", BASE_ALLOCATION.encode()}


def _string(text: bytes) -> bytes:
    return U32.pack(len(text)) + text


def _take_string(data: bytes) -> tuple[bytes, bytes]:
    """Split a string with its length in front off `data`. ValueError: too long or cut off."""
    length = int.from_bytes(data[: U32.size])
    end = U32.size + length
    if length > MAX_STRING or end > len(data):
        raise ValueError("a string is too long or cut off")
    return data[U32.size : end], data[end:]


def _refusal(option: Option, kind: int, payload: bytes) -> str:
    if kind == Reply.ERR_TLS_REQD:
        why = "requires TLS: write nbds:// for nbd://"
    elif kind == Reply.ERR_UNKNOWN:
        why = "has no such export"
    else:
        name = Reply(kind).name if kind in set(Reply) else f"error {kind:#x}"
        why = f"refused {option.name} ({name})"
    text = payload[:MAX_STRING].decode(errors="replace").strip()
    return f"{why}: {text}" if text else why


def _expect_length(data: bytes, length: int) -> None:
    if len(data) != length:
        raise NbdProtocolError(SERVER, "described the export in a wrong length")


def _checked_size(size: int) -> int:
    if size > MAX_SIZE:
        raise NbdProtocolError(SERVER, f"claims an impossible size of {size} bytes")
    return size


def _checked_blocks(minimum: int, preferred: int, maximum: int) -> BlockSizes:
    if not 0 < minimum <= MAX_MINIMUM_BLOCK or minimum & (minimum - 1) or not minimum <= preferred <= maximum:
        raise NbdProtocolError(SERVER, f"claims impossible block sizes ({minimum}, {preferred}, {maximum})")
    return BlockSizes(minimum, preferred, maximum // minimum * minimum)
