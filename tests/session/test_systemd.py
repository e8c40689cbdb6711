"""The unit of systemd: it parses, and what it starts works with no more rights than it leaves."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.failing.rig import PATIENCE, QEDFS, ROOT, run, until

UNIT = ROOT / "contrib/systemd/qedfs@.service"


def setting(name: str) -> str:
    """The value of a setting that the unit has once."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    return str(value)


def verify(unit: Path) -> str:
    """Return what systemd has to say against `unit`."""
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.stdout + done.stderr


def test_systemd_has_nothing_against_the_unit(tmp_path: Path) -> None:
    # It looks for the program where systemd does, which is not where the tests have it.
    text = UNIT.read_text(encoding="utf-8").replace("ExecStart=qedfs ", "ExecStart=/bin/true ")
    copy = tmp_path / UNIT.name
    copy.write_text(text, encoding="utf-8")
    assert verify(copy) == ""
    copy.write_text(text.replace("Type=notify", "Type=notifying").replace("KillMode", "KillModus"), encoding="utf-8")
    complaints = verify(copy)
    assert "notifying" in complaints
    assert "KillModus" in complaints


def test_the_service_works_with_the_rights_that_the_unit_leaves(tmp_path: Path) -> None:
    """With a backing of a foreign format, whose reader is confined: that needs the most of them."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "base.raw").write_bytes(b"base" * 16384)
    run("qemu-img", "convert", "-O", "qcow2", tmp_path / "base.raw", tmp_path / "base.qcow2")
    run(*QEDFS, "create", "-b", tmp_path / "base.qcow2", tmp_path / "vm.qed")
    # As in systemd, `${X}` is one word and `$X` is cut at blanks, which is how a shell reads them in these places.
    program, _, arguments = setting("ExecStart").partition(" ")
    assert program == "qedfs"
    arguments = re.sub(r"(\${\w+})", r'"\1"', arguments)
    script = f"exec {shlex.join(QEDFS)} {arguments}"
    capabilities = ",".join(
        f"+{name.removeprefix('CAP_').lower()}" for name in setting("CapabilityBoundingSet").split()
    )
    assert setting("NoNewPrivileges") == "yes"
    confined = ["setpriv", "--no-new-privs", f"--bounding-set=-all,{capabilities}", "sh", "-c", script]
    variables = {"SOURCES": str(tmp_path / "vm.qed"), "MOUNTPOINT": str(tmp_path / "mnt"), "OPTIONS": "defaults"}
    with subprocess.Popen(confined, env=os.environ | variables, cwd=ROOT) as server:
        try:
            until(lambda: os.path.ismount(tmp_path / "mnt") or server.poll() is not None)
            assert (tmp_path / "mnt/vm.raw").read_bytes() == b"base" * 16384
            run(*QEDFS, "unmount", tmp_path / "mnt")
            assert server.wait(PATIENCE) == 0
        finally:
            server.terminate()
            server.wait(PATIENCE)


def test_a_killed_server_leaves_no_dead_mount(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qed", tmp_path / "vm.qed", "1M")
    (tmp_path / "mnt").mkdir()
    run(*QEDFS, "mount", "-o", "mode=cow", tmp_path / "vm.qed", tmp_path / "mnt")
    pid = int(os.getxattr(tmp_path / "mnt", "user.qedfs.pid"))
    command = shlex.split(setting("ExecStopPost").removeprefix("-").replace("$$", "$"))
    assert shutil.which(command[0])
    variables = os.environ | {"MOUNTPOINT": str(tmp_path / "mnt")}
    subprocess.run(command, env=variables | {"EXIT_CODE": "exited"}, check=True, timeout=PATIENCE)
    assert os.path.ismount(tmp_path / "mnt")
    os.kill(pid, 9)
    subprocess.run(command, env=variables | {"EXIT_CODE": "killed"}, check=True, timeout=PATIENCE)
    assert not os.path.ismount(tmp_path / "mnt")


def test_variables_of_the_command_have_defaults() -> None:
    defaults = re.findall(r"^Environment=(\w+)=", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert {*defaults} == {*re.findall(r"\$\{?(\w+)", setting("ExecStart"))}
