"""How failures become one line and an exit status, whatever they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from qedfs import __version__
from qedfs.cli.main import COMMANDS, program, run
from qedfs.errors import InvalidImage, UsageError

QEDFS = (sys.executable, "-m", "qedfs")


def _command(function: Callable[[], object]) -> click.Command:
    return click.Command("example", callback=function, params=[])


def _raise(error: BaseException) -> Callable[[], object]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("mode", "no"), 1, "qedfs: mode: no"),
        (InvalidImage("a\nb.qed", "no\x1b[m"), 1, "qedfs: a\\nb.qed: no\\x1b[m"),
        (ExceptionGroup("nursery", [UsageError("mode", "no")]), 1, "qedfs: mode: no"),
        (ExceptionGroup("outer", [ExceptionGroup("inner", [UsageError("a", "b")])]), 1, "qedfs: a: b"),
        (FileNotFoundError(2, "No such file or directory", "x.qed"), 1, "qedfs: x.qed: No such file or directory"),
        (ValueError("x\ny"), 70, "qedfs: internal error: ValueError: x\\ny (--debug shows where)"),
        (ExceptionGroup("nursery", [UsageError("a", "b"), AssertionError()]), 70, None),
        (click.BadParameter("odd"), 1, "qedfs: example: invalid value: odd (see 'example --help')"),
    ],
)
def test_failure_is_one_line(
    error: BaseException, status: int, line: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(_command(_raise(error)), []) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert line is None or err == line + "\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("n", [KeyboardInterrupt()]), click.Abort()])
def test_interruption_is_silent(error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(_command(_raise(error)), []) == 130
    assert capfd.readouterr() == ("", "")


def test_status_of_a_command_is_the_status_of_the_program() -> None:
    assert run(_command(lambda: click.get_current_context().exit(3)), []) == 3
    assert run(_command(lambda: None), []) == 0


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["--frobnicate"], ["mount"], ["mount", "--bogus", "a", "b"]])
def test_wrong_usage_is_one_line_and_status_1(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(program(), arguments) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("qedfs: ")
    assert err.endswith("--help')\n")
    assert err.count("\n") == 1


def test_debug_adds_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(program(), ["mount", "--debug", "-o", "bogus", "a", "b"]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert err.endswith("qedfs: bogus: is not a mount option\n")


def test_version_and_help() -> None:
    version = subprocess.run([*QEDFS, "--version"], capture_output=True, text=True, timeout=30, check=True)
    assert version.stdout == f"qedfs {__version__}\n"
    listing = subprocess.run([*QEDFS, "--help"], capture_output=True, text=True, timeout=30, check=True)
    for name in COMMANDS:
        assert f"  {name} " in listing.stdout


def test_help_imports_none_of_what_commands_need() -> None:
    code = (
        "import sys; from qedfs.cli.main import main; main(['--help']); "
        "sys.exit(str([m for m in ('numpy', 'pyfuse3', 'trio', 'rich', 'psutil') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == "[]\n"


def test_reader_that_goes_away_gets_no_traceback() -> None:
    code = "import sys, click; from qedfs.cli.main import run; sys.exit(run(click.Command('x', callback=lambda: [print('y' * 65536) for _ in range(99)]), []))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141
