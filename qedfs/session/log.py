"""Where log records go: standard error in the foreground and until the mount is usable, then a file or syslog."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys

from qedfs.errors import UsageError, printable

SYSLOG = "/dev/log"


class _OneLine(logging.Formatter):
    """Escapes what an image or a server may have put into a message; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class Log:
    """The handlers of the package's logger; `leave_terminal` when nobody looks at standard error any more."""

    def __init__(self, *, foreground: bool, file: str | None, level: int = logging.INFO) -> None:
        """Begin to log.

        `file` is an absolute path; None is syslog, or nothing where no syslog listens. In the foreground without a file
        everything goes to standard error.

        Raises:
            UsageError: `file` cannot be written.
        """
        self._logger = logging.getLogger("qedfs")
        self._logger.setLevel(level)
        logging.raiseExceptions = False  # a full disk under the log file must not reach the guest
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(_OneLine("qedfs: %(message)s"))
        if not foreground:
            terminal.setLevel(logging.WARNING)
        self._terminal: logging.Handler | None = terminal
        self._logger.addHandler(terminal)
        lasting = _lasting_handler(foreground=foreground, file=file)
        if lasting:
            self._logger.addHandler(lasting)

    def leave_terminal(self) -> None:
        """Log nothing to standard error from now on."""
        if self._terminal:
            self._logger.removeHandler(self._terminal)
            self._terminal = None


def _lasting_handler(*, foreground: bool, file: str | None) -> logging.Handler | None:
    handler: logging.Handler | None = None
    if file is not None:
        try:
            handler = logging.handlers.WatchedFileHandler(file)  # logrotate may move it
        except OSError as error:
            raise UsageError(file, f"cannot be written ({os.strerror(error.errno or 0)})") from error
        handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    elif not foreground:
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
            handler.setFormatter(_OneLine(f"qedfs[{os.getpid()}]: %(message)s"))
    return handler
