from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qedfs.errors import OutputError
from qedfs.session.new_file import new_file


@pytest.fixture(params=["nameless", "hidden"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where to make a file, on a file system with nameless files and on one that has neither them nor links."""
    if request.param == "hidden":
        really = os.open

        def open_(path: str, flags: int, *arguments: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return really(path, flags, *arguments)

        def link(*arguments: object, **more: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "link", link)
    return tmp_path / "out"


def test_a_file_appears_when_it_is_published(path: Path) -> None:
    with new_file(str(path), 0o600, overwrite=False) as new:
        os.write(new.fd, b"whole")
        assert not path.exists()
        new.publish()
        assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["out"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_not_published_leaves_nothing(path: Path) -> None:
    with new_file(str(path), 0o600, overwrite=False) as new:
        os.write(new.fd, b"half")
    assert os.listdir(path.parent) == []


def test_what_has_come_meanwhile_is_not_overwritten(path: Path) -> None:
    with new_file(str(path), 0o600, overwrite=False) as new:
        path.write_text("another's")
        with pytest.raises(OutputError, match="exists already"):
            new.publish()
    assert path.read_text() == "another's"
    assert os.listdir(path.parent) == ["out"]


def test_overwriting_replaces_the_file_that_links_lead_to(path: Path) -> None:
    path.write_text("old")
    link = path.with_name("link")
    link.symlink_to("out")
    with new_file(str(link), 0o600, overwrite=True) as new:
        os.write(new.fd, b"new")
        assert path.read_text() == "old"
        new.publish()
    assert path.read_text() == "new"
    assert {*os.listdir(path.parent)} == {"out", "link"}


def test_only_regular_files_are_overwritten(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OutputError, match="is no regular file"), new_file(str(path), 0o600, overwrite=True):
        pass
