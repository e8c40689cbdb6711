"""Guests are made whole or not at all, and only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrib.boot import guest as recipe


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "apt-cache": "echo '  Depends: linux-image-6.1.0-1-cloud-amd64'",
        "apt-get": "echo 'E: Failed to fetch: no route to host' >&2; exit 100",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    with pytest.raises(recipe.BootError) as caught:
        recipe.made(tmp_path / "guests")
    assert str(caught.value) == (
        "cannot download linux-image-6.1.0-1-cloud-amd64: apt-get: E: Failed to fetch: no route to host"
    )
    assert list((tmp_path / "guests").iterdir()) == []


def test_guest_is_found_again_without_any_tool(guest: recipe.Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tool(*command: object, **how: object) -> str:
        pytest.fail(f"ran {command}")

    monkeypatch.setattr(recipe, "run", no_tool)
    assert recipe.made(guest.folder.parent) == guest
