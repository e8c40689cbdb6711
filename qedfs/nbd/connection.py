"""One connection to an NBD server: any number of tasks read over it at once, and none runs in the background.

Whoever waits for an answer drives the connection. The first task that waits becomes its *driver*: it waits for the
socket, hands what came to the state machine, and wakes the tasks whose answers are complete. When its own answer has
come (or it is cancelled), it hands the role to one of those still waiting. So

- a single reader is never switched to another task and back: send, wait for the socket, receive;
- there is no task to own, so opening a connection needs no nursery, nothing outlives its users, and an error is raised
  where somebody waits for it;
- a connection nobody waits on is not read: answers that were abandoned stay in the socket until the next reader comes.

INVARIANT: if any task is parked, there is a driver, or one parked task has been woken to become it.

A cancelled reader gives its buffer back at once: bytes are moved only between two awaits of the driver, so `abandon`
takes effect before the next one. The answer is then drained into the state machine's own buffer as it comes.

The socket is a plain non-blocking one: trio's own passes through the scheduler twice for every call. The driver waits
for readability before it receives, which is the checkpoint every reader passes. Under TLS it is a `TlsSocket`, which may
hold decrypted bytes that make no socket readable: these are received first.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Sequence

import trio

from qedfs.nbd.address import NbdAddress
from qedfs.nbd.constants import CommandFlag, TransmissionFlag
from qedfs.nbd.errors import NbdDisconnected, NbdError, NbdProtocolError, NbdTlsFailed
from qedfs.nbd.negotiation import SERVER, Agreement, ClientHandshake
from qedfs.nbd.tls import TlsSocket, client_context
from qedfs.nbd.transmission import ClientTransmission, Request
from qedfs.turns import take_turn

SILENCE = 30.0
"""Seconds without a byte while answers are due until a connection counts as lost. Longer than a disk that spins up or a
failover of a storage server takes; shorter than the default patience of a guest's disk driver."""
MAX_IN_FLIGHT = 64
"""Requests sent and not answered. More wait here. Unread requests of this number (1.8 KB) fit into every socket buffer,
so that sending never blocks."""
FAREWELL = 1.0
"""Seconds since the last byte for which a connection that ends waits for more answers."""
_BURST = 8
"""Receptions in a row before the driver lets other tasks run, should the server be faster than we are."""
_BURST_BYTES = 128 << 10
"""The same in bytes: some 40 µs, for which a guest's request may have to wait."""


async def connect(address: NbdAddress, *, credentials: bool = True) -> Connection:
    """Dial `address` and negotiate; the caller sets the time limit. `credentials` are as in `client_context`.

    Raises:
        OSError: nobody answers there.
        NbdError: see `ClientHandshake` and `client_context`; NbdDisconnected if the server hangs up.
    """
    context = None
    if address.tls:
        context = await trio.to_thread.run_sync(lambda: client_context(address, credentials=credentials))
    stream: trio.SocketStream
    if address.socket is not None:
        stream = await trio.open_unix_socket(address.socket)
    else:
        assert address.host is not None
        stream = await trio.open_tcp_stream(address.host, address.port)
    handshake = ClientHandshake(address.export, tls=address.tls)
    try:
        while handshake.result is None and not handshake.tls_due:
            data = await stream.receive_some(handshake.wants)
            if not data:
                raise handshake.end_of_stream()
            if answer := handshake.receive(bytes(data)):
                await stream.send_all(answer)
    except BaseException as error:
        stream.socket.close()
        if isinstance(error, trio.BrokenResourceError):
            raise handshake.end_of_stream() from error
        raise
    plain = socket.socket(fileno=stream.socket.detach())
    if context is None:
        assert handshake.result is not None
        return Connection(plain, handshake.result)
    return await _connect_by_tls(handshake, TlsSocket(plain, context, address.verified_name))


async def _connect_by_tls(handshake: ClientHandshake, sock: TlsSocket) -> Connection:
    """Go on where TLS is due."""
    try:
        await sock.handshake()
        answer, welcome = handshake.secured(), False
        while handshake.result is None:
            try:
                if answer and sock.send(answer) != len(answer):
                    raise NbdDisconnected(SERVER, "does not take what was sent")
            except NbdDisconnected:
                if welcome:
                    raise
                # Since TLS 1.3 a server judges our certificate when we think that all is agreed: what it says is to be read.
            data = bytearray(handshake.wants)
            try:
                count = await _receive_by_tls(sock, memoryview(data))
            except NbdDisconnected:
                count = 0
            if not count:
                raise handshake.end_of_stream() if welcome else sock.dismissal()
            answer, welcome = handshake.receive(bytes(data[:count])), True
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise NbdDisconnected(SERVER, f"the connection was lost ({error.strerror})") from error
        raise
    return Connection(sock, handshake.result)


async def _receive_by_tls(sock: TlsSocket, place: memoryview) -> int:
    while True:
        try:
            return sock.recv_into(place)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


class Connection:
    """The transmission phase over a connected `sock`, which it owns."""

    def __init__(self, sock: socket.socket | TlsSocket, agreement: Agreement) -> None:
        self.agreement = agreement
        self._socket = sock
        self._pending = sock.pending if isinstance(sock, TlsSocket) else None
        sock.setblocking(False)
        self._machine = ClientTransmission(agreement)
        self._unsent: deque[tuple[Request, bytes]] = deque()
        self._parked: dict[Request, trio.lowlevel.Task] = {}
        self._driven = False
        self._heard = 0.0
        self._failure: NbdError | None = None

    @property
    def load(self) -> int:
        """Requests not yet answered."""
        return self._machine.pending

    @property
    def lost(self) -> bool:
        """No request will ever be answered again."""
        return self._failure is not None

    @property
    def can_multi_conn(self) -> bool:
        """The server allows several connections and keeps them coherent."""
        return TransmissionFlag.CAN_MULTI_CONN in self.agreement.flags

    def want_whole_answers(self) -> None:
        """Have each READ answered by one chunk from now on, if the server knows how.

        QEMU's server hangs up on everybody when it cannot read what it wanted to send in several chunks.
        """
        if TransmissionFlag.SEND_DF in self.agreement.flags and self.agreement.structured:
            self._machine.read_flags = CommandFlag.DF

    async def read(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each buffer from its position; the pieces obey the server's block sizes and travel together.

        Raises:
            NbdRequestFailed: the server answered one with an error.
            NbdDisconnected, NbdProtocolError: the connection is lost.
        """
        self._check()
        requests = [self._submit(*self._machine.read(pos, buffer)) for pos, buffer in pieces]
        await self._answers(requests)

    async def block_status(self, pos: int, length: int) -> list[tuple[int, bool]]:
        """Return what the server tells of the range, as lengths and "reads as zeros": some of it from its start on.

        Only for a connection with an allocation context. Raises as `read`.
        """
        self._check()
        request = self._submit(*self._machine.block_status(pos, length))
        await self._answers([request])
        return request.extents

    def look(self) -> None:
        """Take note if the server has hung up, though nobody has waited for it since."""
        if self._failure is not None:
            return
        hung_up = select.poll()
        hung_up.register(self._socket.fileno(), select.POLLRDHUP)
        if hung_up.poll(0):
            self.close(NbdDisconnected(SERVER, "closed the connection"))

    async def leave(self) -> None:
        """End the connection, with patience for what a server that answers has been asked already.

        Some servers end for all their clients when one goes while they answer it (nbdkit 1.32, by an assertion).
        """
        rest = Request(-1, 0, 0, None)  # of nobody: to be woken by
        try:
            with trio.move_on_at(self._heard + FAREWELL):
                while self._failure is None and (last := self._machine.newest) is not None:
                    if self._driven:
                        await self._park(rest)
                    else:
                        await self._drive(last)
        finally:
            self.close()

    def close(self, failure: NbdError | None = None) -> None:
        """End the connection, politely if it is alive; everyone waiting gets `failure`."""
        if self._failure is not None:
            return
        if failure is None:
            try:
                self._socket.send(self._machine.goodbye())
            except (OSError, NbdError):
                pass
        self._failure = failure or NbdDisconnected(SERVER, "the connection was closed")
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        for task in self._parked.values():
            trio.lowlevel.reschedule(task)
        self._parked.clear()

    def _check(self) -> None:
        if self._failure is not None:
            raise _again(self._failure)

    def _submit(self, request: Request, message: bytes) -> Request:
        self._unsent.append((request, message))
        if self._machine.pending == 1:
            self._heard = trio.current_time()
        self._send()
        return request

    def _send(self) -> None:
        """Send what may be sent now."""
        while self._unsent and self._machine.pending - len(self._unsent) < MAX_IN_FLIGHT:
            _, message = self._unsent.popleft()
            try:
                sent = self._socket.send(message)
            except OSError as error:
                self.close(NbdDisconnected(SERVER, f"the connection was lost ({error.strerror})"))
                return
            except NbdError as error:
                self.close(error)
                return
            if sent != len(message):
                self.close(NbdDisconnected(SERVER, "does not take requests any more"))
                return

    async def _answers(self, requests: Sequence[Request]) -> None:
        """Wait until all are answered; forget those that are not if that fails or is cancelled."""
        try:
            for request in requests:
                while not request.done:
                    self._check()
                    if self._driven:
                        await self._park(request)
                    else:
                        await self._drive(request)
                if request.error is not None:
                    raise request.error
        except BaseException:
            for request in requests:
                if not request.done:
                    self._forget(request)
            raise

    def _forget(self, request: Request) -> None:
        for entry in self._unsent:
            if entry[0] is request:
                self._unsent.remove(entry)
                self._machine.withdraw(request)
                return
        self._machine.abandon(request)

    async def _park(self, request: Request) -> None:
        def leave(_: object) -> trio.lowlevel.Abort:
            del self._parked[request]
            return trio.lowlevel.Abort.SUCCEEDED

        self._parked[request] = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(leave)

    def _wake(self, request: Request) -> None:
        task = self._parked.pop(request, None)
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def _drive(self, request: Request) -> None:
        """Move bytes for everyone until `request` is answered or the connection is lost."""
        self._driven = True
        try:
            while not request.done and self._failure is None:
                # One scope for many receptions: making one costs as much as a small answer. So it ends too early when
                # something was heard under it, and the next one is longer.
                with trio.CancelScope(deadline=self._heard + SILENCE) as patience:
                    await self._move_until(request)
                if patience.cancelled_caught:
                    self._receive(request)  # nobody may have listened for a while
                    if trio.current_time() >= self._heard + SILENCE:
                        raise NbdDisconnected(SERVER, f"was silent for {SILENCE:.0f} seconds")
        except NbdError as failure:
            self.close(failure)
        finally:
            self._driven = False
            if self._parked:
                self._wake(next(iter(self._parked)))

    async def _move_until(self, request: Request) -> None:
        while not request.done and self._failure is None:
            await self._readable()
            await take_turn()
            self._receive(request)

    async def _readable(self) -> None:
        """Wait until there is something to receive."""
        if self._pending is not None and self._pending():
            await trio.lowlevel.checkpoint()
            return
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except trio.ClosedResourceError:
            pass

    def _receive(self, mine: Request) -> None:
        """Take what has arrived, until it is all or `mine` is complete."""
        left = _BURST_BYTES
        for _ in range(_BURST):
            if self._failure is not None or not left:
                return
            place = self._machine.place()[:left]
            try:
                count = self._socket.recv_into(place)
            except BlockingIOError:
                return
            except OSError as error:
                raise NbdDisconnected(SERVER, f"the connection was lost ({error.strerror})") from error
            if not count:
                raise NbdDisconnected(SERVER, "closed the connection")
            left -= count
            self._heard = trio.current_time()
            for request in self._machine.received(count):
                self._wake(request)
            if self._unsent:
                self._send()
            # A short reception has emptied the socket: asking again would only cost a system call. A record of TLS is
            # always short.
            if mine.done or (count < len(place) and self._pending is None):
                return


def _again(failure: NbdError) -> NbdError:
    """Return a fresh copy of `failure`: one exception object must not be raised in several tasks."""
    if isinstance(failure, NbdTlsFailed):
        return NbdTlsFailed(failure.what, failure.why, may_pass=failure.may_pass)
    kind = NbdProtocolError if isinstance(failure, NbdProtocolError) else NbdDisconnected
    return kind(failure.what, failure.why)
