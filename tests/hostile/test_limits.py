"""No header and no table makes a command cost more than 256 MiB and 2 s, say more than one line, or write anything."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.hostile.judge import Answer, Judge
from tests.hostile.samples import NAMES, SAMPLES, SPECIAL, extreme_fields, image, overlay

COMMANDS = ("info", "check", "map")
"""What only looks at an image."""
EXTREMES = dict(extreme_fields())


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge() as judge:
        yield judge


@pytest.fixture(scope="module")
def large_files() -> Iterator[Path]:
    """A folder on a file system without a limit on the length of a file, as ext4 has one."""
    folder = Path(tempfile.mkdtemp(prefix="qedfs-hostile-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def state(path: Path) -> tuple[object, ...]:
    """What changes when somebody writes to a file: its content as far as it is data, its length and its times."""
    status = path.lstat()
    content = hash(b"".join(data(path))) if path.is_file() and not path.is_symlink() else None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, content


def data(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file, contextlib.suppress(OSError):
        end = 0
        while True:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield os.pread(file.fileno(), end - start, start)


def judged(judge: Judge, command: str, *paths: Path) -> Answer:
    """Run a command, which must keep the limits and leave the first of `paths` as it was."""
    before = state(paths[0])
    answer = judge.run(*command.split(), *paths, folder=paths[0].parent)
    answer.judge()
    assert state(paths[0]) == before
    return answer


def every_command(judge: Judge, path: Path, commands: Iterable[str]) -> None:
    """Hold all that reads an image to the limits: alone, as a backing, as the leaf of a rebase, under repair."""
    for command in commands:
        judged(judge, command, path)
    new = path.parent / "new.qed"
    before = state(path)
    for backing in (["-F", "qed"], ["-F", "raw"]):
        answer = judge.run("create", "-s", "1M", "-b", path, *backing, new, folder=path.parent)
        answer.judge()
        assert new.exists() == (answer.status == 0)
        new.unlink(missing_ok=True)
    assert state(path) == before
    repair(judge, path)
    before = state(path)
    answer = judge.run("rebase", "-b", "", path, folder=path.parent)
    answer.judge()
    assert answer.status == 0 or state(path) == before


def repair(judge: Judge, path: Path) -> None:
    """What is refused stays as it was; a repair is whole: the next check says the same."""
    before = state(path)
    answer = judge.run("check", "--repair", path, folder=path.parent)
    answer.judge()
    assert answer.status != 1 or state(path) == before
    again = judged(judge, "check", path)
    assert again.status == answer.status


@pytest.mark.parametrize("name", SAMPLES)
def test_tables_cost_no_more_than_the_file_holds(judge: Judge, large_files: Path, name: str) -> None:
    path = large_files / "hostile.qed"
    SAMPLES[name]()(path)
    # A map is as long as the image is fragmented: two million lines are an answer that takes longer.
    commands = [command for command in COMMANDS if (command, name) != ("map", "every other cluster free")]
    try:
        every_command(judge, path, commands)
    finally:
        path.unlink()


@pytest.mark.parametrize("name", EXTREMES)
def test_every_field_of_the_header_may_hold_anything(judge: Judge, tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.qed"
    EXTREMES[name](path)
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    for command in ("info", "map"):
        judged(judge, command, path)
    judge.run("create", "-b", path, "-F", "qed", tmp_path / "new.qed", folder=tmp_path).judge()


@pytest.mark.parametrize("name", NAMES)
def test_a_backing_name_may_hold_anything(judge: Judge, tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.qed"
    overlay(path, NAMES[name])
    for command in ("info", "info --json", "map"):
        assert judged(judge, command, path).status == 0
    answer = judge.run("create", "-b", path, "-F", "qed", tmp_path / "new.qed", folder=tmp_path)
    answer.judge()
    # A name that is nothing but NUL is empty, which is no backing.
    assert answer.status == (0 if name == "only NUL" else 1)
    assert (tmp_path / "new.qed").exists() == (answer.status == 0)


@pytest.mark.parametrize("name", [name for name in NAMES if "NUL" not in name])
def test_a_backing_given_on_the_command_line_may_hold_anything(judge: Judge, tmp_path: Path, name: str) -> None:
    backing = os.fsdecode(NAMES[name])
    leaf = tmp_path / "leaf.qed"
    overlay(leaf, "base.raw", raw=True)
    new = tmp_path / "new.qed"
    for command, path in (("create", new), ("rebase", leaf)):
        before = state(leaf)
        answer = judge.run(command, "-b", backing, path, folder=tmp_path)
        answer.judge()
        assert answer.status == 1
        assert state(leaf) == before
        assert not new.exists()


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_without_being_opened(judge: Judge, tmp_path: Path, kind: str) -> None:
    special = tmp_path / "special"
    SPECIAL[kind](special)
    leaf = tmp_path / "leaf.qed"
    overlay(leaf, "special", raw=True)
    new = tmp_path / "new.qed"
    commands: list[list[str | Path]] = [
        *([command, special] for command in ("info", "check", "map", "serve")),
        ["check", "--repair", special],
        ["create", "-b", special, new],
        ["create", "-s", "1M", special],
        ["create", "-s", "1M", "--force", special],
        ["rebase", "-b", special, leaf],
        ["rebase", "-b", "", special],
        ["create", "-b", leaf, "-F", "qed", new],
    ]
    for arguments in commands:
        answer = judge.run(*arguments, folder=tmp_path)
        answer.judge()
        assert answer.status == 1, arguments
        assert not new.exists()
    assert judge.run("info", leaf, folder=tmp_path).status == 0


def chain(folder: Path, length: int) -> Path:
    """Return the top of a chain with `length` backings below it."""
    (folder / "0.qed").write_bytes(bytes(1 << 20))
    for number in range(1, length + 1):
        overlay(folder / f"{number}.qed", f"{number - 1}.qed", raw=number == 1)
    return folder / f"{length}.qed"


def test_a_chain_of_64_backings_opens_and_one_more_is_refused(judge: Judge, tmp_path: Path) -> None:
    chain(tmp_path, 64)
    answer = judge.run("create", "-b", "63.qed", "-F", "qed", tmp_path / "new.qed", folder=tmp_path)
    answer.judge()
    assert answer.status == 0, answer
    answer = judge.run("create", "-b", "64.qed", "-F", "qed", tmp_path / "new2.qed", folder=tmp_path)
    answer.judge()
    assert answer.status == 1
    assert "64 deep" in answer.said
    judged(judge, "info", tmp_path / "64.qed")


@pytest.mark.parametrize("loop", ["itself", "symbolic link", "hard link", "parents", "longer way", "nested"])
def test_a_chain_that_leads_back_to_itself_is_refused(judge: Judge, tmp_path: Path, loop: str) -> None:
    top = tmp_path / "top.qed"
    names = {
        "itself": "top.qed",
        "symbolic link": "link",
        "hard link": "hard",
        "parents": f"../{tmp_path.name}/./top.qed",
        "longer way": "middle.qed",
        "nested": "folder/inner.qed",
    }
    overlay(top, names[loop])
    overlay(tmp_path / "middle.qed", "top.qed")
    (tmp_path / "folder").mkdir()
    overlay(tmp_path / "folder/inner.qed", "../top.qed")
    (tmp_path / "link").symlink_to("top.qed")
    os.link(top, tmp_path / "hard")
    answer = judge.run("create", "-b", "top.qed", "-F", "qed", tmp_path / "new.qed", folder=tmp_path)
    answer.judge()
    assert answer.status == 1
    assert "leads back" in answer.said
    judged(judge, "info", top)
    judged(judge, "map", top)


def test_a_leaf_cannot_become_its_own_backing(judge: Judge, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qed"
    overlay(leaf, "base.raw", raw=True)
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "link").symlink_to("leaf.qed")
    overlay(tmp_path / "over.qed", "leaf.qed")
    for backing in ("leaf.qed", "link", f"../{tmp_path.name}/leaf.qed", "over.qed"):
        before = state(leaf)
        answer = judge.run("rebase", "-b", backing, "-F", "qed", leaf, folder=tmp_path)
        answer.judge()
        assert answer.status == 1, backing
        assert state(leaf) == before


def test_a_backing_name_of_four_gibibytes_is_refused_by_its_length(judge: Judge, large_files: Path) -> None:
    path = large_files / "name.qed"
    room = (1 << 32) - 1
    image((60, b"\xff\xff\xff\xff"), name=b"x", header_size=room)(path)
    answer = judged(judge, "info", path)
    assert answer.status == 1
    assert "bytes; 4095 is the most" in answer.said
    path.unlink()
