"""The edge between qedfs and the kernel: every error of a handler becomes an errno here, and nowhere else.

pyfuse3 knows only `FUSEError`; any other exception would leave the request unanswered and end the main loop, and all
disks with it.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from qedfs.errors import QedfsError

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


def answered(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let `handler` fail only as the kernel understands it.

    `QedfsError` becomes its errno. Everything else is a defect of ours: logged with its traceback, and EIO for this
    request alone. A cancellation passes; it means that the main loop ends.

    Costs one coroutine, about 0.1 µs.
    """

    @functools.wraps(handler)
    async def answering(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            # INVARIANT: nothing is awaited after this, so that a buffer that a handler returns is still untouched when
            # pyfuse3 hands it to the kernel (see `Operations.read`).
            return await handler(*args, **kwargs)
        except QedfsError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            _log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return answering
