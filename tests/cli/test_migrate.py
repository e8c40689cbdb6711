"""`qedfs migrate` as a person meets it; the sequence itself is in tests/migrate/ and tests/migration/."""

from __future__ import annotations

from pathlib import Path

from tests.cli.commands import qedfs, refused

SIDES = ("--source", "tcp:10.0.0.1:4444", "--destination", "/run/vm.qmp", "--uri", "tcp:10.0.0.2:4445")


def test_a_dry_run_prints_every_command_and_does_nothing(tmp_path: Path) -> None:
    leaf, mnt = tmp_path / "vm.qed", tmp_path / "mnt"
    out, err = qedfs(
        "migrate", *SIDES, "-b", "nbd://10.0.0.1/disk", "-o", "idle=always", "--stop-export", "--dry-run", leaf, mnt
    )
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    assert lines[0] == f"qedfs create --hold -b nbd://10.0.0.1/disk -F raw {leaf}"
    assert lines[1] == f"qedfs mount -o idle=always {leaf} {mnt}"
    release = lines.index(f"qedfs set {mnt}/vm.raw hold=0")
    order = ["migrate-continue" in line for line in lines].index(True)
    cont = [line.startswith('destination> {"execute": "cont"}') for line in lines].index(True)
    assert release < order < cont
    assert lines[-2:] == [f"qedfs wait {mnt}/vm.raw", 'source> {"execute": "nbd-server-stop"}']
    assert f"file={mnt}/vm.raw,format=raw" in out
    assert not err
    assert not leaf.exists()


def test_a_source_that_is_not_there_is_one_line_and_nothing_is_done(tmp_path: Path) -> None:
    sides = ("--source", tmp_path / "none.qmp", *SIDES[2:])
    leaf = tmp_path / "vm.qed"
    out, err = qedfs("migrate", *sides, "-b", "nbd://10.0.0.1/disk", leaf, tmp_path / "mnt", status=1)
    assert "Looking at the source" in out
    assert err.startswith("qedfs: migrate: looking at the source: source: cannot be reached at unix:")
    assert err.endswith("; nothing was changed\n")
    assert not leaf.exists()


def test_what_is_no_address_or_option_is_refused_before_anything(tmp_path: Path) -> None:
    rest = ("--uri", "tcp:h:1", "-b", "nbd://h/d", tmp_path / "vm.qed", tmp_path / "mnt")
    assert "no QMP socket" in refused("migrate", "--source", "nowhere", "--destination", "/run/x", *rest)
    assert "mod" in refused("migrate", *SIDES[:4], "-o", "mod=cow", *rest)
