"""Domains of a real libvirtd run on leaves: the hook mounts and unmounts, a pool shows the disks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from contrib.boot.guest import default_folder, made
from contrib.libvirt.story import HERE, story

HOOK = HERE / "qemu"


# Below the limit at which a stuck run as a whole is ended; usually it takes half a minute.
@pytest.mark.timeout(280)
def test_domains_run_on_leaves(tmp_path: Path) -> None:
    lines: list[str] = []
    folder, copies = tmp_path / "host", tmp_path / "copies"
    for made_here in (folder, copies, copies / "vm1", copies / "vm2"):
        made_here.mkdir()
    with story(made(default_folder()), folder, lines.append) as told:
        told.tell_all()
        told.judge("vm1", "first", copies / "vm1")
        told.tell_of_a_mount_that_stays()
        told.judge("vm2", "second", copies / "vm2")
        told.tell_of_a_failure()
    assert any("vm1.raw   /srv/disks/vm1/vm1.raw   file   256.00 MiB" in line for line in lines)
    assert "qedfs hook: vm3: failed at prepare/begin: /srv/disks/vm3" in lines


def hook(folder: Path, table: str, *words: str) -> tuple[int, str, list[str]]:
    """Run the hook with another table and a program that only notes what it is asked; return status, errors and notes."""
    notes, config, copy = folder / "notes", folder / "qedfs.conf", folder / "hook"
    program = folder / "qedfs"
    program.write_text(f'#!/bin/sh\necho "$@" >>{notes}\n[ "$1" != "${{FAILS:-}}" ]\n')
    program.chmod(0o755)
    config.write_text(f"program {program}\n{table}")
    copy.write_text(HOOK.read_text().replace("/etc/libvirt/qedfs.conf", str(config)))
    fails = {"FAILS": "mount"} if "fails" in folder.name else {}
    done = subprocess.run(["sh", copy, *words], env=os.environ | fails, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, notes.read_text().splitlines() if notes.exists() else []


TABLE = "# all of them\n\nvm1 /images/vm1.qed /srv/vm1 allow_other,ro unmount\nvm1 /images/data.qed /srv/data - leave\nvm10 /x /y - leave\n"


def test_the_hook_mounts_every_disk_of_its_domain_and_no_other(tmp_path: Path) -> None:
    assert hook(tmp_path, TABLE, "vm1", "prepare", "begin", "-") == (
        0,
        "",
        ["mount -o allow_other,ro /images/vm1.qed /srv/vm1", "mount /images/data.qed /srv/data"],
    )


@pytest.mark.parametrize("moment", [("start", "begin"), ("started", "begin"), ("stopped", "end"), ("migrate", "begin")])
def test_the_hook_does_nothing_at_other_moments(tmp_path: Path, moment: tuple[str, str]) -> None:
    assert hook(tmp_path, TABLE, "vm1", *moment, "-") == (0, "", [])


def test_the_hook_leaves_domains_alone_that_it_does_not_know(tmp_path: Path) -> None:
    assert hook(tmp_path, TABLE, "vm2", "prepare", "begin", "-") == (0, "", [])
    assert hook(tmp_path, TABLE, "vm1", "release", "end", "-") == (0, "", []), "nothing is mounted"


def test_a_line_that_is_not_understood_keeps_its_domain_from_starting(tmp_path: Path) -> None:
    status, errors, notes = hook(tmp_path, "vm1 /images/vm1.qed /srv/vm1 unmount\n", "vm1", "prepare", "begin", "-")
    assert (status, notes) == (1, [])
    assert "the line needs five words" in errors


def test_a_mount_that_fails_keeps_its_domain_from_starting(tmp_path: Path) -> None:
    folder = tmp_path / "fails"
    folder.mkdir()
    status, errors, notes = hook(folder, TABLE, "vm1", "prepare", "begin", "-")
    assert (status, len(notes)) == (1, 1)
    assert "qedfs hook: vm1: failed at prepare/begin: /srv/vm1" in errors
