"""A migration from beginning to end: goes through the plan, and back where it fails."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from qedfs.errors import Interrupted, MigrationFailed, MonitorLost, MonitorRefused, QedfsError
from qedfs.migrate.machine import Machine, Progress
from qedfs.migrate.plan import (
    Action,
    Await,
    Capable,
    Complete,
    Connect,
    Expect,
    Expectation,
    Order,
    Phase,
    Probe,
    Run,
    Set,
    Side,
    StartUnlessPaused,
    Tell,
    Undo,
    plan,
    undoing,
)

DESTINATION_PATIENCE: Final = 300.0
"""Seconds for the destination QEMU to come: a person may be starting it."""
SWITCHOVER_PATIENCE: Final = 30.0
"""Seconds for all between the source's stop and the destination's start. A guest that stood still for longer has clients that
gave it up, and guests suspect a disk after 30 s; what is left of the memory takes far less than one."""


class Host(Protocol):
    """What is done on this host, beside QEMU."""

    async def run(self, arguments: tuple[str, ...]) -> None:
        """Run a command of qedfs. Raises QedfsError with what it says."""

    async def set(self, raw: str, name: str, value: str) -> None:
        """Set an attribute. Raises QedfsError."""

    async def probe(self, order: Order) -> None:
        """Raise QedfsError unless the export answers soon."""

    async def complete(self, raw: str) -> None:
        """Return when the disk needs its backing no more. Raises QedfsError when that will not be."""

    async def unmount(self, mountpoint: str) -> str:
        """End the mount; return what a person should know, such as who still uses it. Raises QedfsError."""

    async def remove(self, leaf: str) -> None:
        """Remove the leaf. Raises QedfsError."""


class View(Protocol):
    """Whoever watches."""

    def say(self, line: str) -> None:
        """Tell a line."""

    def memory(self, progress: Progress) -> None:
        """Tell how the memory moves."""


@dataclass(frozen=True)
class Patience:
    """Seconds."""

    destination: float = DESTINATION_PATIENCE
    switchover: float = SWITCHOVER_PATIENCE


@dataclass(frozen=True)
class Summary:
    """What a migration that has succeeded has taken, in seconds."""

    downtime: float
    """From the moment at which the source was seen to have stopped until the destination had been told to run."""
    streaming: float
    """From then on until the disk stood alone."""


async def migrate(
    order: Order, machines: Mapping[Side, Machine], host: Host, view: View, patience: Patience = Patience()
) -> Summary:
    """Move the machine; SIGINT and SIGTERM interrupt.

    Raises:
        MigrationFailed: it has failed. The error tells in which phase, why, and what has become of both sides.
        Interrupted: the same, by a signal.
    """
    sequence = _Sequence(order, machines, host, view, patience)
    outcome: Summary | QedfsError
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for _ in signals:
                    sequence.work.cancel()

            nursery.start_soon(watch)
            try:
                outcome = await sequence.run()
            except QedfsError as error:
                outcome = error
            finally:
                with trio.CancelScope(shield=True):
                    for machine in machines.values():
                        await machine.disconnect()
            nursery.cancel_scope.cancel()
    if isinstance(outcome, QedfsError):
        raise outcome
    return outcome


class _Sequence:
    def __init__(
        self, order: Order, machines: Mapping[Side, Machine], host: Host, view: View, patience: Patience
    ) -> None:
        self.work = trio.CancelScope()
        """Cancel it to interrupt the migration in good order."""
        self._order = order
        self._machines = machines
        self._host = host
        self._view = view
        self._patience = patience
        self._phase = Phase.LOOK
        self._ran = False
        """Whether the source ran at the beginning."""
        self._stopped_at = 0.0
        self._started_at = 0.0

    async def run(self) -> Summary:
        with self.work:
            try:
                await self._go()
            except QedfsError as error:
                raise MigrationFailed("migrate", f"{self._phase.title}: {error}; {await self._undo()}") from error
            return Summary(self._started_at - self._stopped_at, trio.current_time() - self._started_at)
        raise Interrupted("migrate", f"interrupted while {self._phase.title}; {await self._undo()}")

    async def _go(self) -> None:
        deadline = float("inf")
        for phase, actions in plan(self._order).items():
            self._phase = phase
            if phase is Phase.RELEASE:
                self._stopped_at = trio.current_time()
                deadline = self._stopped_at + self._patience.switchover
            elif phase is Phase.START:
                deadline = float("inf")
            if actions:
                self._view.say(f"{phase.title[0].upper()}{phase.title[1:]}")
            with trio.CancelScope(deadline=deadline) as scope:
                for action in actions:
                    await self._do(action)
            if scope.cancelled_caught:
                raise MigrationFailed("switch-over", f"not done within {self._patience.switchover:g} s")

    async def _do(self, action: Action) -> None:
        match action:
            case Run(arguments):
                # INVARIANT: no await between its end and the next phase, so that the phase tells whether it was done.
                with trio.CancelScope(shield=True):
                    await self._host.run(arguments)
            case Set(raw, name, value):
                await self._host.set(raw, name, value)
            case Probe():
                await self._host.probe(self._order)
            case Connect(side):
                await self._machines[side].connect(self._patience.destination if side is Side.DESTINATION else 0.0)
            case Expect(side, what):
                await self._expect(self._machines[side], what)
            case Capable(side, names):
                await self._machines[side].turn_on(names)
            case Tell(side, command, arguments):
                await self._machines[side].tell(command, arguments)
            case Await(side, status):
                await self._machines[side].reaches(status, self._view.memory)
            case StartUnlessPaused():
                await self._start()
            case Complete(raw):
                await self._host.complete(raw)

    async def _expect(self, machine: Machine, what: Expectation) -> None:
        match what:
            case Expectation.FREE:
                self._ran = await machine.expect_free()
            case Expectation.INCOMING:
                await machine.expect_incoming()
            case Expectation.OPENED:
                await machine.expect_opened(self._order.raw)

    async def _start(self) -> None:
        if self._ran:
            try:
                # Not interrupted: whether it was told must be known.
                with trio.CancelScope(shield=True):
                    await self._machines[Side.DESTINATION].tell("cont")
            except MonitorRefused:
                self._phase = Phase.SWITCH  # it does not run, by its own word, so all may still be undone
                raise
        else:
            self._view.say("The machine was paused, and is: 'cont' on the destination lets it run")
        self._started_at = trio.current_time()

    async def _undo(self) -> str:
        """Be back where it began, as far as that may be; return what has become of both sides."""
        steps = undoing(self._phase, self._order)
        if steps is None:
            return self._what_now()
        told = []
        with trio.CancelScope(shield=True):
            for step in steps:
                try:
                    told.append(await self._undo_one(step))
                except QedfsError as error:
                    told.append(f"NOT DONE: {step.value} ({error})")
        return ", ".join(told) or "nothing was changed"

    async def _undo_one(self, step: Undo) -> str:
        more = ""
        match step:
            case Undo.QUIT_DESTINATION:
                try:
                    await self._machines[Side.DESTINATION].tell("quit")
                except MonitorLost:
                    return "the destination QEMU is not to be reached and has never run"
            case Undo.RESUME_SOURCE:
                await self._machines[Side.SOURCE].resume(self._ran)
                if not self._ran:
                    return "the source is paused as before"
            case Undo.UNMOUNT:
                more = await self._host.unmount(self._order.mountpoint)
            case Undo.REMOVE_LEAF:
                await self._host.remove(self._order.leaf)
            case Undo.KEEP_LEAF:
                pass
        return f"{step.value}{f' ({more})' if more else ''}"

    def _what_now(self) -> str:
        source = "never let the source run again, and keep its export until 'qedfs wait' says that the disk is complete"
        if self._phase is Phase.START:
            return f"the destination may run or not (ask it: query-status); {source}"
        if self._phase is Phase.END:
            return "the machine runs here and needs the source no more"
        return f"the machine runs here; {source}"
