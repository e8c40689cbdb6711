"""The pages point at each other: no dead link, no page that nobody can find."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def linked(page: Path) -> list[Path]:
    """The files of the checkout that `page` links to."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [(page.parent / target).resolve() for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    assert [str(target) for target in linked(page) if not target.exists()] == []


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs/README.md"
    assert {page.name for page in PAGES} - {page.name for page in linked(index)} <= {index.name}
