"""One QEMU as a migration sees it: what is asked of it, and how long it is waited for."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio

from qedfs.errors import MigrationFailed, MonitorLost, MonitorRefused
from qedfs.migrate.monitor import Monitor
from qedfs.migrate.plan import switched

UNDO_PATIENCE: Final = 30.0
"""Seconds in which a QEMU that is not to be reached may come back before the others are told what became of it."""
_PERIOD = 0.1
"""Seconds between two looks while no event tells that there is something to see."""
_RETRY = 0.2

UNDER_WAY = frozenset({"setup", "active", "pre-switchover", "device", "postcopy-active", "wait-unplug", "cancelling"})
"""States of `query-migrate` in which a migration is not over (QEMU's QAPI schema, `MigrationStatus`)."""

Open = Callable[[float], Awaitable[Monitor]]
"""Connects; waits so many seconds for somebody to be there. Raises MonitorLost."""


@dataclass(frozen=True)
class Progress:
    """What `query-migrate` tells. Sizes are in bytes."""

    status: str = ""
    transferred: int = 0
    remaining: int = 0
    downtime: float | None = None
    """Seconds for which the source stood still by its own account, once it is over."""
    error: str = ""


class Machine:
    """A QEMU behind a QMP socket. `name` is its side."""

    def __init__(self, name: str, open_: Open) -> None:
        self.name = name
        self._open = open_
        self._monitor: Monitor | None = None
        self._capabilities: dict[str, bool] = {}
        """Those that we have changed, as they were."""

    async def connect(self, patience: float = 0.0) -> None:
        """Be connected. Raises MonitorLost."""
        await self.disconnect()
        self._monitor = await self._open(patience)

    async def disconnect(self) -> None:
        """End the connection if there is one."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.aclose()

    async def tell(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Have a command done. Raises as `Monitor.execute`."""
        if self._monitor is None:
            raise MonitorLost(self.name, "not connected")
        return await self._monitor.execute(command, arguments)

    async def insist(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """As `tell`, with new connections for `UNDO_PATIENCE` seconds from the first loss on: for what may be done twice."""
        deadline = float("inf")
        while True:
            try:
                if self._monitor is None:
                    await self.connect()
                return await self.tell(command, arguments)
            except MonitorLost:
                await self.disconnect()
                deadline = min(deadline, trio.current_time() + UNDO_PATIENCE)
                if trio.current_time() >= deadline:
                    raise
            await trio.sleep(_RETRY)

    async def progress(self) -> Progress:
        """Look at the migration."""
        return _progress(await self.tell("query-migrate"))

    async def reaches(self, status: str, show: Callable[[Progress], None]) -> Progress:
        """Return when the migration is in `status`; `show` is told each look.

        Raises:
            MigrationFailed: it ends in another state.
            MonitorLost, MonitorRefused: as `tell`.
        """
        while True:
            progress = await self.progress()
            show(progress)
            if progress.status == status:
                return progress
            # A destination that has nothing yet has no state.
            if progress.status and progress.status not in UNDER_WAY:
                why = progress.error or "QEMU says no more"
                raise MigrationFailed(self.name, f"the migration is {progress.status} instead of {status} ({why})")
            if self._monitor is not None:
                await self._monitor.news(_PERIOD)

    async def runs(self) -> bool:
        """Whether the guest runs."""
        return bool((await self.tell("query-status"))["running"])

    async def expect_free(self) -> bool:
        """Raise MigrationFailed if a migration is under way, or was completed; return whether the guest runs."""
        state = str((await self.tell("query-status"))["status"])
        migration = (await self.progress()).status
        if migration in UNDER_WAY:
            raise MigrationFailed(self.name, f"a migration is under way ({migration})")
        if state not in ("running", "paused", "suspended"):
            raise MigrationFailed(self.name, f"has no machine that could be moved (its state is {state})")
        return state == "running"

    async def expect_incoming(self) -> None:
        """Raise MigrationFailed unless it was started with `-incoming`."""
        state = str((await self.tell("query-status"))["status"])
        if state != "inmigrate":
            raise MigrationFailed(
                self.name, f"is not waiting for a machine, it is {state}: start it with -incoming defer"
            )

    async def expect_opened(self, path: str) -> None:
        """Raise MigrationFailed unless one of its disks is the file `path`."""
        nodes = await self.tell("query-named-block-nodes", {"flat": True})
        files = [str(node.get("file", "")) for node in nodes]
        # In a thread, which may be left behind: the mount is asked.
        if not await trio.to_thread.run_sync(_is_among, path, files, abandon_on_cancel=True):
            raise MigrationFailed(self.name, f"has no disk {path}: start it with -drive file={path},format=raw,…")

    async def turn_on(self, names: tuple[str, ...]) -> None:
        """Turn capabilities of a migration on, and remember how they were."""
        states = {one["capability"]: bool(one["state"]) for one in await self.tell("query-migrate-capabilities")}
        changed = {name: states.get(name, False) for name in names if not states.get(name, False)}
        # Ordering: remembered first. Whether a command was done whose answer did not come cannot be told.
        self._capabilities |= changed
        await self.tell("migrate-set-capabilities", {"capabilities": switched(dict.fromkeys(changed, True))})

    async def resume(self, ran: bool) -> None:
        """Be as before the migration: not migrating, the capabilities as they were, and running if it `ran`.

        Raises:
            MonitorLost: it is not to be reached.
            MigrationFailed: it is, but does not run.
        """
        await self.insist("migrate_cancel")
        deadline = trio.current_time() + UNDO_PATIENCE
        while _progress(await self.insist("query-migrate")).status in UNDER_WAY:
            if trio.current_time() >= deadline:
                raise MigrationFailed(self.name, "the migration does not end, though cancelled")
            await trio.sleep(_RETRY)
        if self._capabilities:
            await self.insist("migrate-set-capabilities", {"capabilities": switched(self._capabilities)})
        refusal = "it is told to"
        while ran and not (await self.insist("query-status"))["running"]:
            if trio.current_time() >= deadline:
                raise MigrationFailed(self.name, f"does not go on ({refusal})")
            try:
                # QEMU starts it again by itself after most failures; after some a moment later than it tells of them.
                await self.insist("cont")
            except MonitorRefused as error:
                refusal = error.why
                await trio.sleep(_RETRY)


def _is_among(path: str, files: list[str]) -> bool:
    wanted = os.path.realpath(path)
    return any(os.path.realpath(file) == wanted for file in files if file.startswith("/"))


def _progress(value: Mapping[str, Any]) -> Progress:
    memory = value.get("ram") or {}
    downtime = value.get("downtime")
    return Progress(
        status=str(value.get("status", "")),
        transferred=int(memory.get("transferred", 0)),
        remaining=int(memory.get("remaining", 0)),
        downtime=None if downtime is None else downtime / 1000,
        error=str(value.get("error-desc", "")),
    )
