"""Two QEMUs that speak QMP over memory, and a host without files: what a migration does to them, and what they suffer.

The states follow QEMU 7.2 (`migration/migration.c`, `softmmu/runstate.c`): a source that fails, or is cancelled, starts its guest
again by itself; one that has completed does so when told `cont`; a destination that loses its source ends.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import trio
import trio.testing

from qedfs.errors import MigrationFailed, MonitorLost
from qedfs.migrate.machine import Machine, Progress
from qedfs.migrate.monitor import Monitor, greeted
from qedfs.migrate.plan import Order, Side

RAW = "/mnt/vm.raw"
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}


class Suffers(Enum):
    """What happens when a command comes."""

    REFUSAL = "it is refused"
    LOST_BEFORE = "the connection ends before it is done"
    LOST_AFTER = "the connection ends after it is done"
    DEATH = "the process ends"
    SIGNAL = "the command is interrupted meanwhile"
    SILENCE = "it is done, and no answer comes"


@dataclass(frozen=True)
class Trouble:
    """What the `turn`th coming of a command, of a side or of the host, leads to."""

    where: str
    command: str
    what: Suffers
    turn: int = 1

    def __str__(self) -> str:
        return f"{self.where} {self.command} {self.turn}: {self.what.value}"


@dataclass
class World:
    """Both QEMUs and the host; `trouble` is what goes wrong, and `another` what goes wrong on the way back."""

    trouble: Trouble | None = None
    another: Trouble | None = None
    paused: bool = False
    """The machine is from the beginning."""
    seen: dict[tuple[str, str], int] = field(default_factory=dict)
    """How often each command has come to each side."""
    hits: int = 0
    """How often trouble has come."""
    source: FakeQemu = field(init=False)
    destination: FakeQemu = field(init=False)

    def __post_init__(self) -> None:
        self.source = FakeQemu(self, Side.SOURCE, "paused" if self.paused else "running")
        self.destination = FakeQemu(self, Side.DESTINATION, "inmigrate")

    def suffers(self, where: str, command: str) -> Suffers | None:
        turn = self.seen[where, command] = self.seen.get((where, command), 0) + 1
        for trouble in (self.trouble, self.another):
            if trouble and (where, command, turn) == (trouble.where, trouble.command, trouble.turn):
                self.hits += 1
                return trouble.what
        return None


class FakeQemu:
    """One of the two."""

    def __init__(self, world: World, side: Side, state: str) -> None:
        self.world = world
        self.side = side
        self.state = state
        """Of the machine; `gone` when the process has ended."""
        self.migration = ""
        self.capabilities = {"events": False, "pause-before-switchover": False, "xbzrle": True}
        self.ever_ran = state == "running"
        self.exports = True
        self.autostart = True
        self.looks = 0

    @property
    def peer(self) -> FakeQemu:
        return self.world.destination if self.side is Side.SOURCE else self.world.source

    def run(self) -> None:
        # The point of it all: a machine never runs at both places, nor ever again where it has left.
        assert self.peer.state != "running"
        if self.side is Side.SOURCE:
            assert not self.peer.ever_ran
        self.state, self.ever_ran = "running", True

    def end(self) -> None:
        self.state = "gone"
        if self.side is Side.DESTINATION and self.peer.migration in ("active", "pre-switchover", "device"):
            self.peer.fail("failed")

    def fail(self, status: str) -> None:
        """As a source: the migration is over, and the guest goes on."""
        stood = self.state == "finish-migrate"
        self.migration = status
        if stood and not self.world.paused:
            self.run()
        if self.peer.state == "inmigrate":
            self.peer.state = "gone"

    def do(self, command: str, arguments: Mapping[str, Any]) -> Any:
        method = getattr(self, f"do_{command.replace('-', '_')}", None)
        assert method is not None, f"QEMU knows no {command}"
        return method(**{name.replace("-", "_"): value for name, value in arguments.items()})

    def do_qmp_capabilities(self) -> dict[str, Any]:
        return {}

    def do_query_status(self) -> dict[str, Any]:
        return {"status": self.state, "running": self.state == "running"}

    def do_query_migrate(self) -> dict[str, Any]:
        if self.side is Side.SOURCE and self.migration == "active":
            self.looks += 1
            if self.looks > 2:
                self.migration = "pre-switchover"
                self.state = "finish-migrate"
        elif self.migration == "device":
            self.migration, self.state = "completed", "postmigrate"
            if self.peer.state == "inmigrate":
                self.peer.migration, self.peer.state = "completed", "paused"
                if self.peer.autostart:
                    self.peer.run()
        if not self.migration:
            return {}
        return {"status": self.migration, "ram": {"transferred": 1 << 20, "remaining": 1 << 10, "total": 1 << 21}}

    def do_query_migrate_capabilities(self) -> list[dict[str, Any]]:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def do_migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> dict[str, Any]:
        self.capabilities |= {one["capability"]: one["state"] for one in capabilities}
        return {}

    def do_query_named_block_nodes(self, flat: bool) -> list[dict[str, Any]]:
        return [{"node-name": "disk", "drv": "raw", "file": RAW}, {"node-name": "none", "drv": "null-co"}]

    def do_stop(self) -> dict[str, Any]:
        assert self.state == "inmigrate"
        self.autostart = False
        return {}

    def do_migrate_incoming(self, uri: str) -> dict[str, Any]:
        assert self.state == "inmigrate"
        self.migration = "active"
        return {}

    def do_migrate(self, uri: str) -> dict[str, Any]:
        assert self.capabilities["pause-before-switchover"]
        self.migration = "active"
        if self.peer.state == "gone":
            self.fail("failed")
        return {}

    def do_migrate_continue(self, state: str) -> dict[str, Any]:
        assert state == "pre-switchover"
        assert self.migration == state
        self.migration = "device"
        if self.peer.state == "gone":
            self.fail("failed")
        return {}

    def do_migrate_cancel(self) -> dict[str, Any]:
        if self.migration in ("active", "pre-switchover", "device"):
            self.fail("cancelled")
        return {}

    def do_cont(self) -> dict[str, Any]:
        if self.state == "inmigrate":
            self.autostart = True
        else:
            self.run()
        return {}

    def do_quit(self) -> dict[str, Any]:
        self.end()
        return {}

    def do_nbd_server_stop(self) -> dict[str, Any]:
        self.exports = False
        return {}

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Speak QMP until the connection, or the process, ends."""
        await stream.send_all(json.dumps(GREETING).encode() + b"\r\n")
        rest = b""
        while data := await stream.receive_some(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                await self.answer(stream, json.loads(line))
                if self.state == "gone":
                    await stream.aclose()
                    return

    async def answer(self, stream: trio.abc.Stream, message: dict[str, Any]) -> None:
        command, number = message["execute"], message["id"]
        suffers = self.world.suffers(self.side.value, command)
        if suffers is Suffers.REFUSAL:
            reply: dict[str, Any] = {"error": {"class": "GenericError", "desc": "no"}, "id": number}
        elif suffers is Suffers.DEATH:
            self.end()
            return
        elif suffers is Suffers.LOST_BEFORE:
            await stream.aclose()
            return
        else:
            reply = {"return": self.do(command, message.get("arguments", {})), "id": number}
        if suffers is Suffers.LOST_AFTER:
            await stream.aclose()
            return
        if suffers is Suffers.SIGNAL:
            signal.raise_signal(signal.SIGINT)
            await trio.testing.wait_all_tasks_blocked()
        if suffers is not Suffers.SILENCE:
            # News may come between a command and its answer.
            event = {"event": "MIGRATION", "data": {"status": self.migration}, "timestamp": {"seconds": 1}}
            await stream.send_all(json.dumps(event).encode() + b"\r\n" + json.dumps(reply).encode() + b"\r\n")


class FakeHost:
    """The host, with one leaf at most."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.leaf = self.mounted = self.held = False
        self.mode = ""
        self.complete_at_last = False

    def _come(self, what: str) -> None:
        match self.world.suffers("host", what):
            case Suffers.REFUSAL:
                raise MigrationFailed(what, "no")
            case Suffers.SIGNAL:
                signal.raise_signal(signal.SIGINT)

    async def run(self, arguments: tuple[str, ...]) -> None:
        await trio.lowlevel.checkpoint()
        self._come(arguments[0])
        if arguments[0] == "create":
            assert "--hold" in arguments
            self.leaf = self.held = True
        elif arguments[0] == "mount":
            assert self.leaf
            self.mounted = True

    async def set(self, raw: str, name: str, value: str) -> None:
        if name == "hold":
            # Done or not done: whoever is told that it failed cannot know.
            self.held = False
            assert self.world.source.state == "finish-migrate"
            assert not self.world.destination.ever_ran
        self._come(name)
        await trio.lowlevel.checkpoint()
        if name == "mode":
            self.mode = value

    async def probe(self, order: Order) -> None:
        await trio.lowlevel.checkpoint()
        assert self.mounted
        assert self.held
        self._come("probe")

    async def complete(self, raw: str) -> None:
        self._come("complete")
        await trio.lowlevel.checkpoint()
        assert self.world.source.exports
        self.complete_at_last = True

    async def unmount(self, mountpoint: str) -> str:
        await trio.lowlevel.checkpoint()
        self._come("unmount")
        self.mounted = False
        return ""

    async def remove(self, leaf: str) -> None:
        await trio.lowlevel.checkpoint()
        self._come("remove")
        assert self.leaf
        self.leaf = False


class Quiet:
    """Watches, and remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def memory(self, progress: Progress) -> None:
        assert progress.transferred >= 0


def machines(world: World, nursery: trio.Nursery) -> dict[Side, Machine]:
    """Return the two QEMUs as a migration knows them."""

    def machine(qemu: FakeQemu) -> Machine:
        async def connect(patience: float) -> Monitor:
            if qemu.state == "gone":
                raise MonitorLost(qemu.side.value, "cannot be reached")
            ours, theirs = trio.testing.memory_stream_pair()

            async def serve() -> None:
                try:
                    await qemu.serve(theirs)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    await theirs.aclose()  # the other end has gone

            nursery.start_soon(serve)
            return await greeted(qemu.side.value, ours)

        return Machine(qemu.side.value, connect)

    return {Side.SOURCE: machine(world.source), Side.DESTINATION: machine(world.destination)}
