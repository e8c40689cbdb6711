"""The program `qedfs`: finds the command, turns what goes wrong into one line and an exit status.

A command module holds a `click.Command` called `command`. It raises `QedfsError`, or ends by `context.exit(status)`;
what it returns is ignored. Modules are imported when their command runs, so that `qedfs info` does not load what
only `qedfs mount` needs.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from qedfs import __version__
from qedfs.errors import QedfsError, printable

COMMANDS = {
    "create": "Make a QED image over a backing.",
    "mount": "Present QED images as raw disks.",
    "unmount": "Flush and unmount; return when everything is closed.",
    "status": "Show progress, state and errors of mounted images.",
    "stream": "Copy all that is missing; the image then stands alone.",
    "wait": "Return when streaming is complete.",
    "set": "Change an attribute of a mounted image.",
    "info": "Show header, sizes and backing chain.",
    "map": "Show which parts of an image are local.",
    "check": "Look for inconsistencies, and repair them.",
    "export": "Write the disk of a leaf as a raw file.",
    "rebase": "Change the reference to the backing.",
    "serve": "Serve an image read-only by NBD.",
    "migrate": "Move a running machine to this host, its disk afterwards.",
    "demo": "Show the main job end to end.",
}
"""Name and summary of each command, in the order in which a new user meets them."""

FAILED = 1
"""Also for wrong usage: `check` gives 2 and 3 meanings of their own."""
INTERNAL_ERROR = 70
"""EX_SOFTWARE of sysexits.h."""
_SIGNALLED = 128
"""A shell shows 128 + N for a program that signal N ended."""


class Debug:
    """Whether a failure shows its traceback; set while the arguments are read."""

    wanted = False


class Commands(click.Group):
    """The commands of `COMMANDS`, each imported when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qedfs.cli.{name}").command
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug_option())
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _debug_option() -> click.Option:
    def remember(context: click.Context, option: click.Parameter, wanted: bool) -> None:
        if wanted:
            context.ensure_object(Debug).wanted = True

    return click.Option(["--debug"], is_flag=True, expose_value=False, callback=remember, help="Show tracebacks.")


def program() -> click.Group:
    """Return the command line of `qedfs`."""
    group = Commands(
        "qedfs",
        help="Start a machine at once from a disk image that is still somewhere else.",
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=False,
        params=[_debug_option()],
    )
    return click.version_option(__version__, prog_name="qedfs", message="%(prog)s %(version)s")(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    return run(program(), sys.argv[1:] if arguments is None else arguments)


def run(command: click.Command, arguments: Sequence[str]) -> int:
    """Run `command` with `arguments`; a failure becomes one line on standard error. Return the exit status."""
    instruction = os.environ.get("_QEDFS_COMPLETE")
    if instruction and isinstance(command, Commands):
        from click.shell_completion import shell_complete

        return shell_complete(command, {}, "qedfs", "_QEDFS_COMPLETE", instruction)
    debug = Debug()
    try:
        # Not `command.main`: that ends quietly on EPIPE from any file or socket.
        with command.make_context(command.name, list(arguments), obj=debug) as context:
            command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except BaseException as error:
        return _report(error, debug)
    return 0


def _report(error: BaseException, debug: Debug) -> int:
    """Say on standard error what `error` is, if that needs saying; return the exit status for it."""
    if debug.wanted:
        traceback.print_exception(error)
    match _culprit(error):
        case SystemExit(code=int(status)):
            return status
        case KeyboardInterrupt() | click.Abort():
            return _SIGNALLED + signal.SIGINT
        case BrokenPipeError():
            # Whoever read our output has gone. Point it elsewhere, or the interpreter complains at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _SIGNALLED + signal.SIGPIPE
        case QedfsError() as failure:
            return _say(str(failure), failure.exit_code)
        case click.ClickException() as failure:
            return _say(_usage_line(failure), FAILED)
        case OSError() as failure if failure.strerror:
            return _say(f"{failure.filename or 'internal error'}: {failure.strerror}", FAILED)
        case unexpected:
            why = f"{type(unexpected).__name__}: {unexpected}".rstrip(": ")
            return _say(f"internal error: {why} (--debug shows where)", INTERNAL_ERROR)


def _culprit(error: BaseException) -> BaseException:
    """Return the error inside the groups that nurseries make: one that nobody expected before one that has a name."""
    while isinstance(error, BaseExceptionGroup):
        error = next((e for e in error.exceptions if not isinstance(e, QedfsError)), error.exceptions[0])
    return error


def _usage_line(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "qedfs"
    what = path.removeprefix("qedfs ") if path != "qedfs" else "command line"
    why = " ".join(error.format_message().split()).rstrip(".")
    return f"{what}: {why[:1].lower()}{why[1:]} (see '{path} --help')"


def _say(line: str, status: int) -> int:
    try:
        click.echo(f"qedfs: {printable(line)}", err=True)
    except OSError:
        pass  # nobody can be told; the exit status still says it
    return status
