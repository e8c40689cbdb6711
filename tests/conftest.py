"""What holds for every test: the tools are there, no unexpected warning is logged, no mount is left behind.

Time limits are in setup.cfg. Choose how hypothesis searches by the environment, `HYPOTHESIS_PROFILE=ci|dev|long`:
`ci` (the default) is the same in every run, `dev` draws new examples, `long` draws many.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings

# The programs that judge qedfs. Without them most tests could only be skipped, which would look like success.
TOOLS = (
    *("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "qemu-system-x86_64", "linux.uml"),
    *(
        "nbdkit",
        "nbdcopy",
        "nbdinfo",
        "openssl",
        "fio",
        "strace",
        "systemd-analyze",
        "fusermount3",
        "getfattr",
        "setfattr",
        "mke2fs",
        "mkfs.xfs",
    ),
)

# No deadline anywhere: examples do real I/O on machines that do other things too.
_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("dev", deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("long", deadline=None, max_examples=5000, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure() -> None:
    """Refuse to run without the tools, in one line; begin with the signals of a program in the foreground."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if not os.path.exists("/dev/fuse"):
        missing.append("/dev/fuse")
    if missing:
        raise pytest.UsageError(f"missing: {', '.join(missing)} (`sh contrib/test.sh` installs what the tests need)")
    # A shell ignores these two for what it starts in the background, and every program the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Give an async test a limit of its own, a little below pytest's.

    Trio then cancels it in good order: the error points at the `await` that hangs and the fixtures still end their
    servers and mounts. The signal behind pytest's limit would break trio's loop; it remains for tests that block the thread.
    Tests on a virtual clock are left out: their hours pass in no time.
    """
    if not isinstance(item, pytest.Function) or {"autojump_clock", "mock_clock"} & set(item.fixturenames):
        return (yield)
    holder, name = (item.obj.hypothesis, "inner_test") if hasattr(item.obj, "hypothesis") else (item, "obj")
    test = getattr(holder, name)
    setattr(holder, name, _limited(test, 0.9 * _limit_of(item)))
    try:
        return (yield)
    finally:
        setattr(holder, name, test)


def _limit_of(item: pytest.Item) -> float:
    """Seconds that pytest-timeout gives to `item`."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0] if marker and marker.args else item.config.getini("timeout"))


def _limited(test: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return `test`, cancelled when `seconds` have passed since its first call (hypothesis calls it many times)."""
    if not inspect.iscoroutinefunction(test):
        return test
    end: float | None = None

    @functools.wraps(test)
    async def limited(*args: Any, **kwargs: Any) -> None:
        nonlocal end
        end = end or time.monotonic() + seconds
        with trio.fail_after(max(0, end - time.monotonic())):
            await test(*args, **kwargs)

    return limited


class _WarningLog(logging.Handler):
    """Collects the records of one test at WARNING or above and strikes out those that the test expects."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[str] = []
        self._expected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._records.append(text)

    def expect(self, pattern: str) -> None:
        self._expected.append(pattern)

    def complaints(self) -> list[str]:
        """What was logged and not expected, and what was expected and not logged."""
        unexpected = [text for text in self._records if not any(re.search(p, text) for p in self._expected)]
        never_came = [p for p in self._expected if not any(re.search(p, text) for text in self._records)]
        return [f"unexpected: {text}" for text in unexpected] + [f"never came: {p}" for p in never_came]


@pytest.fixture(autouse=True)
def _warning_log() -> Iterator[_WarningLog]:
    """Fails a test in which something warned: a warning is news for an operator, so it is part of the behaviour."""
    handler = _WarningLog()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    if complaints := handler.complaints():
        pytest.fail("log: " + "\n     ".join(complaints), pytrace=False)


@pytest.fixture
def expected_warnings(_warning_log: _WarningLog) -> Callable[[str], None]:
    """Call it with a regular expression to announce a log record; the test fails if the record never comes.

    The pattern is searched in `LEVEL logger: message`, followed by the traceback if the record has one.
    """
    return _warning_log.expect


def _mounts_below(folder: Path) -> set[str]:
    """The mountpoints below `folder`: only ours, as others may mount things on this machine meanwhile."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape")
    # Octal escapes stand for the blanks of a path (fstab(5)).
    points = {line.split(" ")[1].replace("\\040", " ") for line in mounts.splitlines()}
    return {point for point in points if point.startswith(f"{folder}/")}


def _detach(points: set[str]) -> None:
    """Take mounts away, without asking who serves them.

    Root does it by force: FUSE then also answers what still waits for the mount with an error, for a process stuck in such
    a request cannot even be killed. No program is run for that, since it would inherit open files of the mount and be stuck
    as it closes them.
    """
    force_detach = 1 | 2  # MNT_FORCE | MNT_DETACH, umount(2)
    for point in sorted(points, reverse=True):
        if ctypes.CDLL(None).umount2(os.fsencode(point), force_detach) != 0:
            subprocess.run(["fusermount3", "-u", "-z", "--", point], check=False, timeout=30)


def _refuse_mounts_left(left: set[str]) -> None:
    _detach(left)
    if left:
        pytest.fail(f"left mounted: {', '.join(sorted(left))}", pytrace=False)


@pytest.fixture(scope="session")
def _temporary_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp().resolve()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(_temporary_root: Path) -> None:
    """What qedfs keeps of this run (boot profiles) is not left in the user's folders."""
    os.environ["CACHE_DIRECTORY"] = str(_temporary_root / "cache")


@pytest.fixture(scope="session", autouse=True)
def _no_mount_outlives_the_run(_temporary_root: Path) -> Iterator[None]:
    """For the mounts of fixtures that serve a whole module or session."""
    yield
    _refuse_mounts_left(_mounts_below(_temporary_root))


@pytest.fixture(autouse=True)
def _no_mount_outlives_its_test(
    request: pytest.FixtureRequest, _temporary_root: Path, _no_mount_outlives_the_run: None
) -> Iterator[None]:
    before = _mounts_below(_temporary_root)
    # A test stuck in a request to a mount does not see the signal of its limit before the request is answered.
    watchdog = threading.Timer(_limit_of(request.node) + 5, lambda: _detach(_mounts_below(_temporary_root)))
    watchdog.start()
    yield
    watchdog.cancel()
    _refuse_mounts_left(_mounts_below(_temporary_root) - before)
