"""The pages point at each other, and at tests: no dead link, no page that nobody can find, no test that is not there."""

from __future__ import annotations

import ast
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


def named_in(file: Path) -> set[str]:
    """The names of the tests in `file`, by reading it; none if there is no such file."""
    tree = ast.parse(file.read_text(encoding="utf-8") if file.exists() else "")
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_every_test_that_a_page_names_is_there() -> None:
    named = [
        (page.name, file, test)
        for page in PAGES
        for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8"))
    ]
    assert named
    assert [name for name in named if name[2] not in named_in(ROOT / name[1])] == []


def test_every_cell_about_sources_says_by_which_tests_it_is_held() -> None:
    page = (ROOT / "docs/backings.md").read_text(encoding="utf-8")
    section = page.partition("## What holds on which source")[2].partition("\n## ")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    listed = re.findall(r"^(\d+)\. `tests/[^`]*`", section, re.MULTILINE)
    assert listed == [str(number + 1) for number in range(len(listed))]
    assert len(rows) == 7
    used: set[str] = set()
    for source, *cells in rows:
        assert len(cells) == len(head) - 1, source
        for column, cell in zip(head[1:], cells, strict=True):
            numbers = {number for group in re.findall(r"\[([\d, ]+)\]", cell) for number in group.split(", ")}
            assert numbers or cell.startswith("– "), (source, column)
            used |= numbers
    assert used == set(listed)
