"""A link with a bandwidth and a round trip, as a proxy in front of a server: `python -m contrib.bench.link --help`.

Each direction is one wire with one queue, shared by all connections, first come first served: a chunk that has arrived
leaves the wire when all before it have left and its own bytes have taken their time, and is delivered half a round trip
later. All is computed from times, so that a proxy which is late for a moment loses nothing while its queue is not empty.
A connection is there at once, and ends with the first of its two sides.

It is a process of its own, for the sake of whoever is measured. On standard output it tells its port, then it answers each
line on standard input: an empty one by the bytes that were carried so far, as JSON, `RATE ROUND_TRIP` by changing to these
first. It ends with its input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 64 << 10
"""Most bytes that are moved at once: half a millisecond of 1 Gbit/s, so that connections share the wire finely."""
LEAST_CHUNK, CHUNK_TIME = 4 << 10, 0.001
"""And of a slow wire at most what takes so many seconds, but so many bytes."""
MOST_QUEUED = 64 << 20
"""Bytes in the queue of one direction from which on its senders are made to wait."""
HASTE = -10
"""Niceness: wires do not wait for a processor."""


@dataclass(eq=False)
class End:
    """The socket at one end of a connection. `wire` carries what is read from it to the `other` end."""

    sock: socket.socket
    wire: Wire
    other: End = field(init=False)
    unsent: deque[memoryview] = field(default_factory=deque)
    """What has been delivered and not yet taken."""
    events: int = 0
    ended: bool = False
    """There is no more to read from it."""
    last: bool = False
    """There will be no more to send to it."""
    closed: bool = False


@dataclass
class Wire:
    """One direction of the link."""

    rate: float
    """Bytes per second; 0: no limit."""
    delay: float
    """Seconds."""
    free_at: float = 0.0
    queued: int = 0
    carried: int = 0
    queue: deque[tuple[float, End, bytes]] = field(default_factory=deque)
    """When, to whom, what (nothing: the end); in order of time."""
    sources: set[End] = field(default_factory=set)

    @property
    def chunk(self) -> int:
        return max(LEAST_CHUNK, min(CHUNK, int(self.rate * CHUNK_TIME))) if self.rate else CHUNK

    def take(self, data: bytes, to: End, now: float) -> None:
        """Put what has arrived now into the queue."""
        self.free_at = max(self.free_at, now) + (len(data) / self.rate if self.rate else 0.0)
        self.queued += len(data)
        self.carried += len(data)
        # After a change of the delay nothing overtakes what is on its way.
        before = self.queue[-1][0] if self.queue else 0.0
        self.queue.append((max(before, self.free_at + self.delay), to, data))


class Link:
    """All connections through one link to the server at `target`."""

    def __init__(self, listening: socket.socket, target: str, rate: float, round_trip: float) -> None:
        self._listening = listening
        self._target = target
        self._wires = Wire(rate, round_trip / 2), Wire(rate, round_trip / 2)
        self._ends: dict[int, End] = {}
        self._epoll = select.epoll()
        self._epoll.register(listening, select.EPOLLIN)
        self._epoll.register(sys.stdin, select.EPOLLIN)

    def run(self) -> None:
        """Carry until standard input ends."""
        while True:
            due = min((wire.queue[0][0] for wire in self._wires if wire.queue), default=float("inf"))
            # The timeout of epoll is in whole milliseconds, that of select in microseconds.
            select.select([self._epoll], [], [], min(60.0, max(0.0, due - time.monotonic())))
            for number, events in self._epoll.poll(0):
                if number == self._listening.fileno():
                    self._accept()
                elif number == sys.stdin.fileno():
                    if not self._obey(sys.stdin.readline()):
                        return
                elif end := self._ends.get(number):
                    self._serve(end, events)
            self._deliver()

    def _obey(self, line: str) -> bool:
        if words := line.split():
            rate, round_trip = map(float, words)
            for wire in self._wires:
                wire.rate, wire.delay = rate, round_trip / 2
        up, down = self._wires
        print(json.dumps({"up": up.carried, "down": down.carried}), flush=True)
        return bool(line)

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        try:
            server = dial(self._target)
        except OSError:
            client.close()
            return
        near, far = (End(sock, wire) for sock, wire in zip((client, server), self._wires, strict=True))
        near.other, far.other = far, near
        for end in (near, far):
            if end.sock.family != socket.AF_UNIX:
                end.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.sock.setblocking(False)
            end.wire.sources.add(end)
            self._ends[end.sock.fileno()] = end
            self._watch(end)

    def _watch(self, end: End) -> None:
        """Ask for the events that matter now."""
        if end.closed:
            return
        reads = not end.ended and end.wire.queued < MOST_QUEUED
        events = (select.EPOLLIN if reads else 0) | (select.EPOLLOUT if end.unsent else 0)
        if events and not end.events:
            self._epoll.register(end.sock, events)
        elif end.events and not events:
            self._epoll.unregister(end.sock)  # or a hang-up would be told for ever
        elif events != end.events:
            self._epoll.modify(end.sock, events)
        end.events = events

    def _serve(self, end: End, events: int) -> None:
        if events & select.EPOLLOUT:
            self._send(end)
        if events & ~select.EPOLLOUT and end.events & select.EPOLLIN and not end.closed:
            try:
                data = end.sock.recv(end.wire.chunk)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            end.ended = not data
            end.wire.take(data, end.other, time.monotonic())
            if end.wire.queued >= MOST_QUEUED:
                self._watch_all(end.wire)
        self._watch(end)

    def _deliver(self) -> None:
        now = time.monotonic()
        for wire in self._wires:
            while wire.queue and wire.queue[0][0] <= now:
                _, to, data = wire.queue.popleft()
                to.last = to.last or not data
                to.unsent.append(memoryview(data))
                self._send(to)

    def _send(self, end: End) -> None:
        """Send what the receiver takes; close the connection after its last byte, or when nobody takes anything."""
        while end.unsent:
            try:
                sent = len(end.unsent[0]) if end.closed else end.sock.send(end.unsent[0])
            except BlockingIOError:
                break
            except OSError:
                self._close(end)
                continue
            self._left(end.other.wire, sent)
            rest = end.unsent.popleft()[sent:]
            if rest:
                end.unsent.appendleft(rest)
        if end.last and not end.unsent:
            self._close(end)
        self._watch(end)

    def _left(self, wire: Wire, count: int) -> None:
        was_full = wire.queued >= MOST_QUEUED
        wire.queued -= count
        if was_full and wire.queued < MOST_QUEUED:
            self._watch_all(wire)

    def _watch_all(self, wire: Wire) -> None:
        for source in wire.sources:
            self._watch(source)

    def _close(self, end: End) -> None:
        for each in (end, end.other):
            if not each.closed:
                del self._ends[each.sock.fileno()]
                each.wire.sources.discard(each)
                each.sock.close()  # which takes it out of the epoll
                each.closed = True
                self._send(each)


class Carrying:
    """A link that runs. Rates are in bytes per second, times in seconds; `port` is on 127.0.0.1."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout
        self.port = int(process.stdout.readline())

    def carried(self) -> int:
        """Bytes that the server has sent through it."""
        return self._say("")

    def change(self, rate: float, round_trip: float) -> None:
        """Be another link from now on."""
        self._say(f"{rate} {round_trip}")

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Carry nothing while inside. Nobody is told: what was sent arrives later."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _say(self, line: str) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline())["down"])


@contextlib.contextmanager
def link(target: str, rate: float, round_trip: float) -> Iterator[Carrying]:
    """Have a link to the server at `target` (`PORT` on this host, or the path of a unix socket) while inside."""
    command = [sys.executable, "-m", "contrib.bench.link", target, str(rate), str(round_trip)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Carrying(process)
            assert process.stdin
            process.stdin.close()
            process.wait(10)
        finally:
            process.kill()


def dial(target: str) -> socket.socket:
    """Connect to `PORT` on this host, or to a unix socket."""
    if target.isdigit():
        return socket.create_connection(("127.0.0.1", int(target)))
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(target)
    except OSError:
        sock.close()
        raise
    return sock


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m contrib.bench.link", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="the server: a port of this host, or the path of a unix socket")
    parser.add_argument("rate", type=float, help="bytes per second in each direction; 0: no limit")
    parser.add_argument("round_trip", type=float, help="seconds")
    arguments = parser.parse_args()
    with contextlib.suppress(PermissionError):
        os.nice(HASTE)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        print(listening.getsockname()[1], flush=True)
        Link(listening, arguments.target, arguments.rate, arguments.round_trip).run()


if __name__ == "__main__":
    main()
