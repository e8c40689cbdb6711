"""A client of QMP, the control protocol of QEMU, on a unix or TCP socket."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio

from qedfs.errors import MonitorLost, MonitorRefused, UsageError
from qedfs.migrate.protocol import Answer, Decoder, Event, Greeting, Message, ProtocolError, Refusal, encode

CONNECT_PATIENCE: Final = 5.0
"""Seconds for a connection to be made."""
GREETING_PATIENCE: Final = 5.0
"""Seconds for the greeting of a socket that takes connections. QEMU serves one client at a time and lets others wait."""
ANSWER_PATIENCE: Final = 30.0
"""Seconds for the answer to a command. QEMU answers at once unless its main loop waits for a disk; a link that was gone for ten
seconds fits into it."""
_PIECE = 64 << 10
_TCP = re.compile(r"(?:tcp:)?(?:\[(?P<literal>[0-9A-Fa-f:.]+)\]|(?P<host>[\w.-]+)):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class MonitorAddress:
    """Where a QMP server listens: a unix socket, or else a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def parse_monitor(text: str, what: str) -> MonitorAddress:
    """Return the address that `text` says, in QEMU's words: `unix:PATH` or `tcp:HOST:PORT`, both also without the first word.

    Raises:
        UsageError: it is neither; `what` names the option.
    """
    if text.startswith("unix:") or "/" in text:
        path = text.removeprefix("unix:").partition(",")[0]
        if path:
            return MonitorAddress(path=os.path.abspath(path))
    elif (found := _TCP.fullmatch(text.partition(",")[0])) and 0 < int(found["port"]) < 1 << 16:
        return MonitorAddress(host=found["literal"] or found["host"], port=int(found["port"]))
    raise UsageError(what, f"'{text}' is no QMP socket (unix:PATH or tcp:HOST:PORT)")


class Monitor:
    """A connection to one QEMU. One task at a time; made by `open_monitor`."""

    def __init__(self, name: str, stream: trio.abc.Stream) -> None:
        self._name = name
        self._stream = stream
        self._decoder = Decoder()
        self._number = 0
        self._unread: list[Message] = []
        self._news = False

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Have `command` done, and return what QEMU returns.

        A command whose answer was not waited for to its end may have been done or not.

        Raises:
            MonitorRefused: QEMU says why not.
            MonitorLost: the connection has ended, or there is no answer within `ANSWER_PATIENCE`.
        """
        self._number += 1
        number = self._number
        with trio.move_on_after(ANSWER_PATIENCE):
            try:
                await self._stream.send_all(encode(number, command, arguments or {}))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise MonitorLost(self._name, f"the connection has ended ({command})") from error
            while True:
                match await self._next():
                    case Answer(found, value) if found == number:
                        return value
                    case Refusal(found, description) if found in (number, None):
                        raise MonitorRefused(self._name, f"{command}: {description}")
                    case Event():
                        self._news = True
        raise MonitorLost(self._name, f"no answer to {command} within {ANSWER_PATIENCE:g} s")

    async def news(self, patience: float) -> None:
        """Return when an event has come since the last call, or after `patience` seconds.

        Raises:
            MonitorLost: the connection has ended.
        """
        with trio.move_on_after(patience):
            while not self._news:
                self._news = isinstance(await self._next(), Event)
        self._news = False

    async def greet(self) -> str:
        """Go through the beginning of the protocol, and return QEMU's version. Raises as `execute`."""
        with trio.move_on_after(GREETING_PATIENCE):
            first = await self._next()
            if not isinstance(first, Greeting):
                raise MonitorLost(self._name, "does not speak QMP")
            await self.execute("qmp_capabilities")
            return first.version
        raise MonitorLost(self._name, "no greeting: QMP serves one client at a time, and another may be connected")

    async def aclose(self) -> None:
        """End the connection."""
        await self._stream.aclose()

    async def _next(self) -> Message:
        while not self._unread:
            try:
                data = await self._stream.receive_some(_PIECE)
                self._unread += self._decoder.feed(bytes(data))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise MonitorLost(self._name, "the connection has ended") from error
            except ProtocolError as error:
                raise MonitorLost(self._name, f"does not speak QMP ({error})") from error
            if not data:
                raise MonitorLost(self._name, "the connection has ended")
        return self._unread.pop(0)


async def open_monitor(name: str, address: MonitorAddress) -> Monitor:
    """Connect to the QEMU at `address`, called `name` in errors.

    Raises:
        MonitorLost: nobody is there, or nobody who speaks QMP with us.
    """
    try:
        with trio.fail_after(CONNECT_PATIENCE):
            if address.path:
                stream = await trio.open_unix_socket(address.path)
            else:
                stream = await trio.open_tcp_stream(address.host, address.port)
    except (OSError, trio.TooSlowError) as error:
        number = getattr(error, "errno", None)
        why = os.strerror(number) if number else str(error) or f"no answer within {CONNECT_PATIENCE:g} s"
        raise MonitorLost(name, f"cannot be reached at {address} ({why})") from error
    return await greeted(name, stream)


async def greeted(name: str, stream: trio.abc.Stream) -> Monitor:
    """Return a client on `stream`, which is closed if it does not become one. Raises as `open_monitor`."""
    monitor = Monitor(name, stream)
    try:
        await monitor.greet()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return monitor


async def wait_for_monitor(name: str, address: MonitorAddress, patience: float) -> Monitor:
    """As `open_monitor`, but for `patience` seconds wait for somebody to be there.

    Raises:
        MonitorLost: nobody came.
    """
    deadline = trio.current_time() + patience
    while True:
        try:
            return await open_monitor(name, address)
        except MonitorLost:
            if trio.current_time() >= deadline:
                raise
        await trio.sleep(_RETRY)


_RETRY = 0.2
"""Seconds between two attempts: a QEMU takes about as long to start."""
