"""The map of the package, enforced: who may import whom, and what every module looks like.

A layer is a folder or a module directly below `qedfs`. Imports point down the order; inside a layer they are free.
What a module imports is read from its source, so an import inside a function or under TYPE_CHECKING counts too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qedfs"

ORDER = [
    "errors",
    "config",
    "turns",
    "nbd",
    "image",
    "backing",
    "disk",
    "stream",
    "report",
    "tree",
    "fuse",
    "session",
    "migrate",
    "cli",
    "__main__",
]

# What of a lower layer another one may know, where that is not everything.
ONLY: dict[tuple[str, str], frozenset[str]] = {
    # Image and byte source meet in disk/; a QED backing reads the format through the modules without I/O.
    # Local files are locked in one way, whatever is in them.
    ("backing", "image"): frozenset(
        {"qedfs.image.header", "qedfs.image.geometry", "qedfs.image.tables", "qedfs.image.locks"}
    ),
    ("image", "nbd"): frozenset(),
    # Streaming asks the disk for copies; how they are made and where the bytes come from is not its concern.
    ("stream", "nbd"): frozenset(),
    ("stream", "image"): frozenset(),
    ("stream", "backing"): frozenset({"qedfs.backing.window"}),
    # A migration drives this host through commands and attributes, as a person would; names it only masks.
    ("migrate", "image"): frozenset(),
    ("migrate", "disk"): frozenset(),
    ("migrate", "tree"): frozenset(),
    ("migrate", "session"): frozenset({"qedfs.session.leaf"}),
    ("migrate", "backing"): frozenset({"qedfs.backing.location"}),
    ("migrate", "fuse"): frozenset({"qedfs.fuse.mounts"}),
}

# A library with global state or a large surface has one place.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "pyfuse3": ("qedfs.fuse",),
    "psutil": ("qedfs.stream.sampler",),
    "obstore": ("qedfs.backing.objects",),
    "urllib3": ("qedfs.backing.http", "qedfs.backing.http_client"),
    "click": ("qedfs.cli",),
    "rich": ("qedfs.cli", "qedfs.report"),
}

# Decisions without I/O, which carry most of the tests. A module whose first line claims it is held to it, listed or not.
SANS_IO = (
    *("qedfs.nbd.constants", "qedfs.nbd.errors", "qedfs.nbd.negotiation", "qedfs.nbd.transmission"),
    *("qedfs.image.header", "qedfs.image.geometry", "qedfs.image.tables", "qedfs.image.record"),
    *("qedfs.image.allocator", "qedfs.image.survey", "qedfs.disk.plan", "qedfs.disk.readahead", "qedfs.disk.reserve"),
    *("qedfs.backing.mirror_name", "qedfs.backing.stragglers"),
    *("qedfs.backing.window", "qedfs.stream.idle", "qedfs.stream.pace", "qedfs.stream.cursor", "qedfs.stream.profile"),
    *("qedfs.migrate.protocol", "qedfs.migrate.plan"),
)
IO = frozenset({"trio", "os", "psutil", "socket", "subprocess", "threading", "asyncio"})
# Of `os`, what touches no file: conversions, arithmetic on paths, types, who we are.
PURE = frozenset(
    f"os.{name}"
    for name in "fsdecode fsencode fspath getuid path path.basename path.dirname path.isabs path.join path.normpath stat_result".split()
)

MOST_LINES = 500


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", MODULES)


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_in(module: str, *parents: str) -> bool:
    """Whether `module` is one of `parents` or inside one."""
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def imports(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """The absolute names of the modules that `module` imports; of `from package import name` both readings are tried."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner
            if len(inner) < len(node.names):
                found.add(source)
    return found


def attributes_of(name: str, tree: ast.Module) -> set[str]:
    """What is used as `name.attribute` or `name.attribute.attribute`."""
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {attribute for attribute in attributes if attribute.startswith(f"{name}.")}


def imported(module: str) -> set[str]:
    return imports(parsed(module), module, MODULES[module].name == "__init__.py")


def layer(module: str) -> str:
    """The layer of a module of ours; the package itself, which holds only the version, is below all ("")."""
    return module.partition(".")[2].partition(".")[0]


@every_module
def test_imports_point_down(module: str) -> None:
    here = layer(module)
    order = ["", *ORDER]
    for name in sorted(n for n in imported(module) if is_in(n, "qedfs")):
        there = layer(name)
        assert order.index(there) <= order.index(here), f"{module} imports {name}, which is above it"
        allowed = ONLY.get((here, there))
        assert allowed is None or name in allowed, f"{module} imports {name}, which {here} may not know"


def test_every_layer_has_its_place_in_the_order() -> None:
    assert {layer(module) for module in MODULES} - {""} <= set(ORDER)


@every_module
def test_a_library_is_imported_only_where_it_belongs(module: str) -> None:
    for name in sorted(imported(module)):
        places = ONLY_IN.get(name.partition(".")[0])
        assert places is None or is_in(module, *places), f"{module} imports {name}"


@every_module
def test_modules_that_decide_do_no_io(module: str) -> None:
    title = (ast.get_docstring(parsed(module)) or "").partition("\n")[0].lower()
    if is_in(module, *SANS_IO) or "sans-io" in title or "without i/o" in title:
        of_os = attributes_of("os", parsed(module))
        forbidden = IO - {"os"} if of_os and of_os <= PURE else IO
        assert not {name.partition(".")[0] for name in imported(module)} & forbidden


def test_every_module_held_to_a_rule_exists() -> None:
    assert {*SANS_IO, *frozenset().union(*ONLY.values())} <= MODULES.keys()


@every_module
def test_every_module_says_what_it_is_and_stays_readable(module: str) -> None:
    assert ast.get_docstring(parsed(module)), "no docstring"
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: split it"


@every_module
def test_only_commands_and_reports_print(module: str) -> None:
    if not is_in(module, "qedfs.cli", "qedfs.report"):
        calls = [node for node in ast.walk(parsed(module)) if isinstance(node, ast.Call)]
        assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize(
    ("source", "module", "is_package", "expected"),
    [
        ("import trio.lowlevel", "qedfs.disk.disk", False, {"trio.lowlevel"}),
        ("def f():\n    from os import path", "qedfs.disk.disk", False, {"os"}),
        ("from ..errors import QedfsError", "qedfs.disk.disk", False, {"qedfs.errors"}),
        ("from . import base", "qedfs.backing.file", False, {"qedfs.backing.base"}),
        ("from . import base", "qedfs.backing", True, {"qedfs.backing.base"}),
        ("from qedfs import errors, __version__", "qedfs.session", False, {"qedfs", "qedfs.errors"}),
    ],
)
def test_every_spelling_of_an_import_is_seen(source: str, module: str, is_package: bool, expected: set[str]) -> None:
    assert imports(ast.parse(source), module, is_package) == expected
