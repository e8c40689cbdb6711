"""The live view of streaming images: a bar for each, on a terminal; a line for each change, elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qedfs.errors import printable
from qedfs.report.sizes import duration_text, rate_text
from qedfs.report.status import RefusedImage, ServedImage, Status

_STYLES = {
    "complete": "green",
    "streaming": "cyan",
    "idle-wait": "blue",
    "paused": "yellow",
    "no-space": "yellow",
    "backing-error": "red",
    "failed": "bold red",
    "refused": "red",
}
"""How states look; the others are plain."""
REFRESHES = 4
"""A second: as often as there may be news, twice."""


class Screen:
    """What people watch. Made by `opened`; `show` takes what was seen at one look."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._said: dict[str, str] = {}

    def show(self, images: Iterable[Status]) -> None:
        """Show `images` as they are now."""
        images = list(images)
        if self._live is not None:
            self._live.update(_table(images))
            return
        for image in images:
            line = line_of(image)
            if self._said.get(image.path) != line:
                self._said[image.path] = line
                self._console.out(line, highlight=False)

    @property
    def live(self) -> bool:
        """Whether it is a terminal, on which one view replaces another."""
        return self._live is not None

    def note(self, text: str) -> None:
        """Show a passing `text` until there is more to show; where there is no terminal, nothing."""
        if self._live is not None:
            self._live.update(Text(printable(text)))

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.out(printable(line), highlight=False)


@contextmanager
def opened(console: Console, *, whole_screen: bool = False) -> Iterator[Screen]:
    """Show on `console` while inside; the last view stays there, unless it had the `whole_screen`."""
    if not console.is_terminal:
        yield Screen(console, None)
        return
    with Live(console=console, refresh_per_second=REFRESHES, screen=whole_screen) as live:
        yield Screen(console, live)


def line_of(image: Status) -> str:
    """Return one line about `image`, of plain text."""
    if isinstance(image, RefusedImage):
        return printable(f"{image.path}: refused: {image.reason}")
    percent, words = _facts(image)
    return printable(f"{image.path}: {percent:.2f} % {words}")


def _table(images: list[Status]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="ellipsis", no_wrap=True, ratio=2)
    table.add_column(ratio=3, min_width=10)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    errors: list[RenderableType] = []
    for image in images:
        if isinstance(image, RefusedImage):
            table.add_row(escape(printable(image.path)), "", "", Text("refused", _STYLES["refused"]))
            errors.append(Text(f"  {printable(image.reason)}", "red"))
            continue
        percent, words = _facts(image)
        state = image.attributes.get("state", "")
        bar = ProgressBar(total=100.0, completed=percent, complete_style=_STYLES.get(state, "cyan"))
        table.add_row(
            escape(printable(image.path)), bar, f"{percent:.2f} %", Text(printable(words), _STYLES.get(state, ""))
        )
        if state in ("backing-error", "no-space", "failed"):
            errors.append(Text(f"  {printable(image.attributes.get('last_error', ''))}", "red"))
    table.expand = True
    return Group(table, *errors)


def _facts(image: ServedImage) -> tuple[float, str]:
    """Return how many percent are local, and what else there is to say in words."""
    values = image.attributes
    try:
        percent = float(values.get("progress", "0"))
    except ValueError:
        percent = 0.0
    words = [values.get("state", "")]
    if values.get("state") == "passive":
        words.append(values.get("mode", ""))
    rate, eta = values.get("rate", ""), values.get("eta", "")
    if rate.isdecimal() and int(rate):
        words.append(rate_text(int(rate)))
    if eta.isdecimal() and values.get("state") != "complete":
        words.append(f"{duration_text(int(eta))} left")
    return percent, "  ".join(word for word in words if word)
