"""The sequence of a migration without I/O: its phases, what is done in each, and what undoes it.

What `--dry-run` prints and what is run are the same lists.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from qedfs.backing.location import masked


class Side(Enum):
    SOURCE = "source"
    """The QEMU that the machine runs in."""
    DESTINATION = "destination"
    """The QEMU that it is to run in, on this host."""


class Phase(IntEnum):
    """Where a migration is, in order. A phase is entered before its first action."""

    LOOK = 0
    LEAF = 1
    MOUNT = 2
    DESTINATION = 3
    INCOMING = 4
    MEMORY = 5
    RELEASE = 6
    SWITCH = 7
    START = 8
    """INVARIANT: from here on the source never runs again. Before it the destination has never run."""
    STREAM = 9
    END = 10

    @property
    def title(self) -> str:
        return _TITLES[self]


_TITLES = {
    Phase.LOOK: "looking at the source",
    Phase.LEAF: "making the leaf",
    Phase.MOUNT: "mounting the leaf",
    Phase.DESTINATION: "waiting for the destination",
    Phase.INCOMING: "preparing the destination",
    Phase.MEMORY: "moving the memory",
    Phase.RELEASE: "releasing the hold",
    Phase.SWITCH: "switching over",
    Phase.START: "starting the destination",
    Phase.STREAM: "streaming",
    Phase.END: "ending the export",
}


@dataclass(frozen=True)
class Order:
    """What the user asks for. Paths are absolute."""

    leaf: str
    mountpoint: str
    raw: str
    """The disk that the mount shows."""
    backing: str
    uri: str
    """Where the source sends the memory, in QEMU's words (`tcp:HOST:PORT`)."""
    listen: str
    """Where the destination listens for it, in the same words."""
    format: str = "raw"
    mount_options: tuple[str, ...] = ()
    log_file: str | None = None
    stop_export: bool = False
    keep: bool = False


@dataclass(frozen=True)
class Run:
    """A command of qedfs on this host. It is not interrupted, and does nothing if it fails."""

    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Set:
    """Set an attribute of the disk, from the migrating process itself: a guest stands still meanwhile."""

    raw: str
    name: str
    value: str


@dataclass(frozen=True)
class Probe:
    """See whether the export answers: if it does not, the guest need not be stopped to learn it.

    By a connection of its own: a read from the mount that is not answered can be neither given up nor killed.
    """


@dataclass(frozen=True)
class Connect:
    """Connect to a QEMU, and wait for it if it is the destination. Then it must be as needed: `Expect`."""

    side: Side


class Expectation(Enum):
    """What must hold of a QEMU before it is touched."""

    FREE = "no migration is under way"
    INCOMING = "it waits for an incoming migration"
    OPENED = "it uses the disk"


@dataclass(frozen=True)
class Expect:
    side: Side
    what: Expectation


@dataclass(frozen=True)
class Capable:
    """Turn capabilities of a migration on. `undo` puts back what was before."""

    side: Side
    names: tuple[str, ...]


@dataclass(frozen=True)
class Tell:
    """A command of QMP."""

    side: Side
    command: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Await:
    """Wait until `query-migrate` of a QEMU says so."""

    side: Side
    status: str


@dataclass(frozen=True)
class StartUnlessPaused:
    """Let the destination run, if the source ran when the migration began."""


@dataclass(frozen=True)
class Complete:
    """Wait until the disk needs its backing no more."""

    raw: str


Action = Run | Set | Probe | Connect | Expect | Capable | Tell | Await | StartUnlessPaused | Complete


def plan(order: Order) -> dict[Phase, tuple[Action, ...]]:
    """Return what is to be done in each phase, all in order."""
    there, here = Side.SOURCE, Side.DESTINATION
    options = tuple(word for option in order.mount_options for word in ("-o", option))
    log = ("--log-file", order.log_file) if order.log_file else ()
    backing = ("-b", order.backing, "-F", order.format)
    return {
        Phase.LOOK: (Connect(there), Expect(there, Expectation.FREE)),
        Phase.LEAF: (Run(("create", "--hold", *backing, order.leaf)),),
        Phase.MOUNT: (Run(("mount", *options, *log, order.leaf, order.mountpoint)),),
        Phase.DESTINATION: (
            Connect(here),
            Expect(here, Expectation.INCOMING),
            Expect(here, Expectation.OPENED),
        ),
        Phase.INCOMING: (
            # Whatever it was started with, it does not run by itself when all has arrived: only START lets it.
            Tell(here, "stop"),
            Capable(here, ("events",)),
            Tell(here, "migrate-incoming", {"uri": order.listen}),
            Probe(),
        ),
        Phase.MEMORY: (
            Capable(there, ("events", "pause-before-switchover")),
            Tell(there, "migrate", {"uri": order.uri}),
            # The source has stopped, and all that it has written is in what it exports.
            Await(there, "pre-switchover"),
        ),
        Phase.RELEASE: (Set(order.raw, "hold", "0"),),
        Phase.SWITCH: (
            Tell(there, "migrate-continue", {"state": "pre-switchover"}),
            Await(there, "completed"),
            Await(here, "completed"),
        ),
        Phase.START: (StartUnlessPaused(),),
        Phase.STREAM: (Set(order.raw, "mode", "stream"), Complete(order.raw)),
        Phase.END: (Tell(there, "nbd-server-stop"),) if order.stop_export else (),
    }


class Undo(Enum):
    """What may be needed to be back where it began, in the order in which it is done."""

    QUIT_DESTINATION = "the destination QEMU is ended"
    RESUME_SOURCE = "the source goes on"
    UNMOUNT = "the leaf is unmounted"
    KEEP_LEAF = "the leaf is kept"
    REMOVE_LEAF = "the leaf is removed"


def undoing(reached: Phase, order: Order) -> list[Undo] | None:
    """Return what undoes a migration that failed in phase `reached`; None: it must not be undone.

    A leaf whose hold may have been released is removed even if the user wants to keep it: it knows a state of the source that
    the source leaves behind as soon as it goes on.
    """
    if reached >= Phase.START:
        return None
    undo = []
    if reached >= Phase.INCOMING:
        # Ordering: it cannot run without START, but what has ended cannot be started by anybody else either.
        undo.append(Undo.QUIT_DESTINATION)
    if reached >= Phase.MEMORY:
        undo.append(Undo.RESUME_SOURCE)
    # The commands have done nothing where they failed: there may be another's file, or another's mount.
    if reached > Phase.MOUNT:
        undo.append(Undo.UNMOUNT)
    if reached > Phase.LEAF:
        undo.append(Undo.KEEP_LEAF if order.keep and reached < Phase.RELEASE else Undo.REMOVE_LEAF)
    return undo


def script(order: Order, monitors: Mapping[Side, str]) -> list[str]:
    """Return what a migration would do, as lines for a person: commands for a shell, and what QMP is told (`side> command`)."""
    lines = []
    for phase, actions in plan(order).items():
        if actions:
            lines.append(f"# {phase.title}")
            lines += [line_of(action, order, monitors) for action in actions]
    return lines


def line_of(action: Action, order: Order, monitors: Mapping[Side, str]) -> str:
    """Return one action in the words of a shell, or of QMP."""
    match action:
        case Run(arguments):
            return shlex.join(["qedfs", *(masked(word) if word == order.backing else word for word in arguments)])
        case Set(raw, name, value):
            return shlex.join(["qedfs", "set", raw, f"{name}={value}"])
        case Probe():
            return "# the export answers"
        case Connect(side):
            waits = f"; waits for: {start_hint(order, monitors[side])}" if side is Side.DESTINATION else ""
            return f"# {side.value}: QMP at {monitors[side]}{waits}"
        case Expect(side, what):
            return f"# {side.value}: {what.value}"
        case Capable(side, names):
            return _told(side, "migrate-set-capabilities", {"capabilities": switched(dict.fromkeys(names, True))})
        case Tell(side, command, arguments):
            return _told(side, command, arguments)
        case Await(side, status):
            return f'# wait until {side.value}> query-migrate returns "status": "{status}"'
        case StartUnlessPaused():
            return f"{_told(Side.DESTINATION, 'cont', {})}   # unless the source was paused from the beginning"
        case Complete(raw):
            return shlex.join(["qedfs", "wait", raw])


def switched(capabilities: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Return `capabilities` as `migrate-set-capabilities` takes them."""
    return [{"capability": name, "state": state} for name, state in capabilities.items()]


def start_hint(order: Order, monitor: str) -> str:
    """Return what the user adds to QEMU's command line on the destination: all else is as on the source."""
    drive = f"file={_doubled(order.raw)},format=raw,cache=none,…"
    return f"qemu-system-… -incoming defer -drive {drive} -qmp {monitor},server=on,wait=off"


def _doubled(path: str) -> str:
    """Commas are doubled in options of QEMU."""
    return path.replace(",", ",,")


def _told(side: Side, command: str, arguments: Mapping[str, Any]) -> str:
    message = {"execute": command} | ({"arguments": dict(arguments)} if arguments else {})
    return f"{side.value}> {json.dumps(message)}"
