"""What goes wrong during a migration, and when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from contrib.bench.link import Carrying
from contrib.migration.guest import Machine
from contrib.migration.rig import Moving, Rig
from qedfs.migrate.plan import Phase

DROP = 10.0
"""Seconds for which the link is gone."""
OUTAGE = 3.0
"""Seconds until the source's server is back."""


@dataclass(frozen=True)
class Scene:
    """Who is there when it happens."""

    rig: Rig
    moving: Moving
    memory: Carrying
    destination: Machine | None


@dataclass(frozen=True)
class Fault:
    """`happens` when the command tells that it enters `phase`, while it stands still. `moves`: the machine is moved all the same."""

    name: str
    phase: Phase
    happens: Callable[[Scene], None]
    moves: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.phase.title})"


def export_dies(scene: Scene) -> None:
    scene.rig.stop_export()


def export_dies_for_a_while(scene: Scene) -> None:
    scene.rig.stop_export()
    time.sleep(OUTAGE)
    scene.rig.export()


def qedfs_is_killed(scene: Scene) -> None:
    os.kill(scene.rig.server_pid(), signal.SIGKILL)


def destination_is_killed(scene: Scene) -> None:
    assert scene.destination
    scene.destination.kill()


def interrupted(scene: Scene) -> None:
    scene.moving.interrupt()


def link_drops(scene: Scene) -> None:
    with ExitStack() as stack:
        stack.enter_context(scene.rig.disk_link.cut())
        stack.enter_context(scene.memory.cut())
        scene.moving.go_on()
        time.sleep(DROP)


BEFORE = (
    *(
        Fault("export dies", phase, export_dies)
        for phase in (Phase.LEAF, Phase.DESTINATION, Phase.MEMORY, Phase.RELEASE)
    ),
    *(Fault("qedfs is killed", phase, qedfs_is_killed) for phase in (Phase.INCOMING, Phase.MEMORY, Phase.RELEASE)),
    *(
        Fault("destination is killed", phase, destination_is_killed)
        for phase in (Phase.INCOMING, Phase.MEMORY, Phase.SWITCH)
    ),
    *(Fault("interrupted", phase, interrupted) for phase in (Phase.MEMORY, Phase.RELEASE)),
)
"""After each of them the machine is still at the source."""

DURING = (
    *(Fault("link drops", phase, link_drops, moves=True) for phase in (Phase.MEMORY, Phase.RELEASE, Phase.STREAM)),
    Fault("export dies for a while", Phase.STREAM, export_dies_for_a_while, moves=True),
)
"""After each of them the machine is at the destination."""

AFTER = Fault("qedfs is killed", Phase.STREAM, qedfs_is_killed)
"""The machine loses its disk for good, as in a power cut: its leaf is what is left."""
