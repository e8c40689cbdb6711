"""Telling the service manager that started this process how it is (sd_notify(3) of systemd, which others speak as well).

A manager that wants to be told names a socket in NOTIFY_SOCKET. Whoever inherited the variable could speak for the
service, so it is taken out of the environment before any other program is started. A manager that has gone, or does not
read, changes nothing for the mount.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterable, MutableMapping

import trio

from qedfs.config import Mode
from qedfs.errors import printable
from qedfs.report.summary import Image, summary
from qedfs.tree.leaf import Leaf

VARIABLE = "NOTIFY_SOCKET"
PATIENCE = 5.0
"""Seconds for a busy manager to take that we are usable; without it the service would count as not started."""
PERIOD = 2.0
"""Seconds between two looks for news. The first follows the first period: by then the manager knows who serves."""


class Manager:
    """The manager at `address`, a path or, with `@` first, an abstract name; empty for nobody."""

    def __init__(self, address: str = "") -> None:
        # Other kinds of address (vsock:…) are for whole virtual machines.
        self._address = "\0" + address[1:] if address[:1] == "@" else address if address[:1] == "/" else ""

    @staticmethod
    def named_by(environment: MutableMapping[str, str]) -> Manager:
        """Return whoever `environment` names, and take the name out of it."""
        return Manager(environment.pop(VARIABLE, ""))

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._address)

    def usable(self) -> None:
        """Tell that this process, which the manager has started, can be used now."""
        self._send("READY=1", patience=PATIENCE)

    def served_by(self, pid: int) -> None:
        """Tell that from now on `pid` is the service, and can be used; return when the manager has understood it.

        It believes this of its own child only, so a parent says it before it ends.
        """
        self._send(f"MAINPID={pid}\nREADY=1", patience=PATIENCE)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        with open(reading, "rb"), open(writing, "wb") as ours:
            # sd_notify_barrier(3): the descriptor is closed over there when everything before it has been read.
            self._send("BARRIER=1", patience=PATIENCE, descriptor=writing)
            ours.close()
            closed = select.poll()
            closed.register(reading, 0)
            closed.poll(PATIENCE * 1000)

    def status(self, text: str) -> None:
        """Show `text`, one line, to whoever asks the manager."""
        self._send(f"STATUS={printable(text)}")

    def stopping(self) -> None:
        """Tell that the service is ending by itself."""
        self._send("STOPPING=1")

    def _send(self, message: str, *, patience: float = 0.0, descriptor: int | None = None) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending, contextlib.suppress(OSError):
            sending.settimeout(patience)
            sending.connect(self._address)
            socket.send_fds(sending, [message.encode()], [] if descriptor is None else [descriptor])


async def tell_status(manager: Manager, leaves: Callable[[], Iterable[Leaf]]) -> None:
    """Show what `leaves` are doing whenever that has changed, until cancelled; with nobody to tell, return at once."""
    told = ""
    while manager.listens:
        await trio.sleep(PERIOD)
        if (text := summary(map(_image, leaves()))) != told:
            manager.status(text)
            told = text


def _image(leaf: Leaf) -> Image:
    statistics = leaf.disk.statistics()
    return Image(
        leaf.name,
        leaf.stream.state(statistics.state),
        streams=statistics.mode is Mode.STREAM,
        size=leaf.disk.size,
        missing=leaf.disk.remaining(),
        rate=leaf.stream.rate,
        eta=leaf.stream.eta,
    )
