"""Stories of a machine that is migrated, and what must be true at their end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from contrib.boot.guest import Guest, run
from contrib.migration import records
from contrib.migration.faults import AFTER, Fault, Scene
from contrib.migration.guest import Machine, MigrationError, until
from contrib.migration.rig import QEDFS, SLOTS, ByQedfs, Rig, being_read, memory_link, migrating, rig
from qedfs.migrate.plan import Phase

BEFORE, BETWEEN, BEHIND = 150, 60, 200
"""Records before the first migration, between two, and after the last."""


@dataclass
class Attempt:
    """One `qedfs migrate`: its exit status, the last line that it said, and the QEMU it led to, if it came so far."""

    status: int
    said: str
    destination: Machine | None


@dataclass(frozen=True)
class Told:
    """What a story tells of one attempt. Times are in seconds."""

    fault: str
    outcome: str
    downtime: float | None = None
    """From the last record that was written at the source to the first one at the destination."""
    streaming: float | None = None
    records: int = 0
    lost: int = 0


def told_phase(phase: Phase) -> str:
    return f"{phase.title[0].upper()}{phase.title[1:]}"


@contextmanager
def attempt(rig: Rig, fault: Fault | None) -> Iterator[Attempt]:
    """Migrate, with a fault in it, to the end of the command; the destination lives as long as the block."""
    with ExitStack() as stack, ExitStack() as before_the_end:
        memory = stack.enter_context(memory_link(rig))
        moving = stack.enter_context(migrating(rig, memory))
        destination: Machine | None = None
        for phase in Phase:
            if not moving.says(told_phase(phase)):
                break
            if fault is not None and phase is fault.phase:
                moving.stand_still()
                try:
                    fault.happens(Scene(rig, moving, memory, destination))
                finally:
                    moving.go_on()
            if phase is Phase.DESTINATION:
                destination = stack.enter_context(rig.destination())
                if fault is None:
                    # Nothing that is read this early may come to the guest's eyes. (With a fault such a reader would get
                    # stuck, and keep the mount busy.)
                    before_the_end.enter_context(being_read(rig.raw))
        status, said = moving.end()
        before_the_end.close()
        yield Attempt(status, said, destination)


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise MigrationError(otherwise)


def ended(machine: Machine) -> bool:
    return machine.process.poll() is not None


def judge_stay(rig: Rig, made: Attempt, fault: Fault) -> Told:
    """The machine must be at the source, as if nothing had been, and nothing be left of the leaf."""
    expect(made.status != 0, f"{fault}: the command succeeded")
    rig.source.wait_for(rig.source.records + BETWEEN)
    expect(not rig.leaf.exists(), f"{fault}: the leaf is still there ({made.said})")
    expect(not os.path.ismount(rig.mountpoint), f"{fault}: the mount is still there ({made.said})")
    if (destination := made.destination) is not None:
        until(partial(ended, destination), "the end of the destination")
        expect(destination.told == [], f"{fault}: the destination has run")
    expect("NOT DONE" not in made.said, f"{fault}: {made.said}")
    return Told(str(fault), f"stays: {made.said}")


def judge_move(rig: Rig, made: Attempt, fault: Fault | None) -> Told:
    """The machine must be at the destination, all of its records be there, its leaf stand alone, and its source be of no use."""
    expect(made.status == 0, f"{fault}: {made.said}")
    moved = made.destination
    assert moved is not None
    # The guest goes on without anything of the source.
    if isinstance(rig.by, ByQedfs):
        rig.stop_export()
    rig.source.kill()
    moved.wait_for(moved.records + BEHIND)
    downtime = moved.told[0][0] - rig.source.told[-1][0]
    expect(moved.told[0][1] > rig.source.records, f"{fault}: both have run")
    moved.finish()
    expect(moved.verified is not None, f"{fault}: the guest did not look at its disk ({moved.bad})")
    assert moved.verified is not None
    count, bad = moved.verified
    expect(not bad and not moved.bad and not rig.source.bad, f"{fault}: {bad} bad: {[*rig.source.bad, *moved.bad][:3]}")
    expect(count >= moved.records, f"{fault}: {moved.records} records were told, {count} are known")
    run(*QEDFS, "unmount", rig.mountpoint)
    judge_leaf(rig, count, in_doubt=False)
    streaming = float(made.said.partition("streaming took ")[2].split()[0])
    return Told("none" if fault is None else str(fault), "moved", downtime, streaming, count)


def judge_leaf(rig: Rig, count: int, *, in_doubt: bool) -> None:
    """The leaf must be sound, stand alone, and hold exactly what was written."""
    run("qemu-img", "check", "-q", "-f", "qed", rig.leaf)
    expect("backing-filename" not in json.loads(run("qemu-img", "info", "--output=json", rig.leaf)), "not complete")
    wrong = records.judge(rig.read_disk(rig.leaf), rig.seed, SLOTS, count, in_doubt=in_doubt)
    expect(not wrong, f"{len(wrong)} records lost or stale: {wrong[:3]}")


def tell_story(
    guest: Guest, folder: Path, seed: int, stays: Sequence[Fault], move: Fault | None, *, on_qedfs: bool = False
) -> list[Told]:
    """Let a machine stay through all of `stays`, one after the other, and then move it. `on_qedfs`: from a mount, as it will be to one.

    Raises:
        MigrationError: something is not as it must be.
    """
    told = []
    with rig(guest, folder, seed, on_qedfs=on_qedfs) as made:
        made.source.wait_for(BEFORE)
        for fault in stays:
            with attempt(made, fault) as stayed:
                told.append(judge_stay(made, stayed, fault))
            if not made.exporting:
                made.export()
        with attempt(made, move) as moved:
            told.append(judge_move(made, moved, move))
    return told


def lose_the_disk(guest: Guest, folder: Path, seed: int, *, on_qedfs: bool = False) -> Told:
    """The process that serves the disk is killed after the switch-over: what the machine had written is in the leaf.

    Raises:
        MigrationError: something is not as it must be.
    """
    with rig(guest, folder, seed, on_qedfs=on_qedfs) as made:
        made.source.wait_for(BEFORE)
        with attempt(made, AFTER) as lost:
            expect(lost.status != 0, "the command succeeded")
            expect("the machine runs here" in lost.said, lost.said)
            assert lost.destination is not None
            # Its disk is gone: the guest ends by itself, or not.
            lost.destination.kill()
            known = max(lost.destination.records, made.source.records)
            run(*QEDFS, "unmount", made.mountpoint)
            run(*QEDFS, "mount", "-o", "mode=stream,idle=always", made.leaf, made.mountpoint)
            run(*QEDFS, "wait", "--timeout", "60", made.raw)
            run(*QEDFS, "unmount", made.mountpoint)
        made.source.kill()
        judge_leaf(made, known, in_doubt=True)
        return Told(str(AFTER), f"restart from the leaf: {lost.said}", records=known)
