"""Going to the background: what the caller is told, and what the child lets go of. Each in a process of its own."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import qedfs

_PROGRAM = """
import os, sys, signal, time
from qedfs.session.daemon import in_background
def serve(ready):
    {body}
sys.exit(in_background(serve))
"""

_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(qedfs.__file__).parents[1])}


def _run(body: str, *, cwd: Path | None = None, before: str = "") -> subprocess.CompletedProcess[str]:
    code = before + _PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip())
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=cwd, check=False, env=_ENVIRONMENT
    )


def test_parent_ends_with_0_when_the_child_is_ready_and_pipes_are_let_go(tmp_path: Path) -> None:
    # subprocess.run returns only when nobody holds the pipes; the child lives until it is told to end.
    fifo = tmp_path / "end"
    os.mkfifo(fifo)
    body = f"""
    ready()
    held = sorted(set(os.readlink(f"/proc/self/fd/{{n}}") for n in (0, 1, 2)))
    open({str(tmp_path / "seen")!r}, "w").write(f"{{held}} {{os.getcwd()}} {{os.getsid(0) == os.getpid()}}")
    open({str(fifo)!r}).read()
    return 0
    """
    done = _run(body, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with fifo.open("w"):
        pass  # blocks until the child has come this far
    assert (tmp_path / "seen").read_text() == "['/dev/null'] / True"


def test_failure_before_ready_is_the_parents_failure() -> None:
    done = _run("sys.stderr.write('why\\n'); return 3")
    assert (done.returncode, done.stderr) == (3, "why\n")


def test_exception_before_ready_reaches_the_caller() -> None:
    done = _run("raise SystemExit('why')")
    assert (done.returncode, done.stderr) == (1, "why\n")


def test_child_that_is_killed_before_ready_is_a_failure() -> None:
    assert _run("os.kill(os.getpid(), signal.SIGKILL)").returncode == 128 + signal.SIGKILL


def test_descriptors_of_whoever_started_us_are_closed(tmp_path: Path) -> None:
    before = f"kept = open({str(tmp_path / 'lock')!r}, 'w')"
    body = """
    links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    sys.stderr.write(str([os.readlink(link) for link in links if os.path.lexists(link)]))
    return 1
    """
    seen = _run(body, before=before).stderr
    assert "pipe:" in seen
    assert "lock" not in seen


def test_ready_fails_when_nobody_waits(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    answer = tmp_path / "answer"
    os.mkfifo(answer)
    body = f"""
    open({str(fifo)!r}).read()
    try:
        ready()
    except OSError as error:
        open({str(answer)!r}, "w").write(type(error).__name__)
    return 0
    """
    code = _PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip())
    with subprocess.Popen([sys.executable, "-c", code], env=_ENVIRONMENT) as parent:
        with fifo.open("w"):
            parent.kill()
            parent.wait(30)
        assert answer.read_text() == "BrokenPipeError"


def interrupted(tmp_path: Path, *, early: bool) -> int:
    """Interrupt a parent that waits, or (`early`) that has just forked; return its exit status once the child is gone."""
    started, ended, working = tmp_path / "started", tmp_path / "ended", tmp_path / "working"
    os.mkfifo(started)
    os.mkfifo(ended)
    body = f"""
    hold = open({str(ended)!r}, "w")
    open({str(started)!r}, "w").close()
    open({str(working)!r}, "w").close()
    signal.pause()
    """
    code = _PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip())
    if early:
        code = _INTERRUPTED_FORK.format(working=str(working)) + code
    # Whoever runs the tests may ignore the signal, and what they start inherits that.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=_ENVIRONMENT, preexec_fn=listening
    ) as parent:
        with ended.open() as end:
            started.read_text()
            if not early:
                parent.send_signal(signal.SIGINT)
            assert end.read() == ""  # the child is gone
        return parent.wait(30)


def test_interrupted_parent_stops_the_child(tmp_path: Path) -> None:
    assert interrupted(tmp_path, early=False) != 0


def test_parent_interrupted_before_it_waits_stops_the_child_too(tmp_path: Path) -> None:
    assert interrupted(tmp_path, early=True) != 0


_INTERRUPTED_FORK = """
import os, signal
real = os.fork
def fork():
    child = real()
    if child:
        while not os.path.exists({working!r}):  # this parent is late
            pass
        os.kill(os.getpid(), signal.SIGINT)
    return child
os.fork = fork
"""
