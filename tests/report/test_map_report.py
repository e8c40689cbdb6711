from __future__ import annotations

from qedfs.image.create import create_image
from qedfs.image.geometry import Geometry
from qedfs.image.image import open_image
from qedfs.image.record import Record
from qedfs.image.tables import Run, State
from qedfs.report.map import Picture, joined_runs
from tests.image.memory_storage import MemoryStorage


def picture(size: int, cells: int, *runs: Run) -> str:
    drawn = Picture(size, cells)
    for run in runs:
        drawn.add(run)
    return "|".join(drawn.lines(cells))


def test_empty_and_full_places_are_told_from_almost_empty_and_almost_full_ones() -> None:
    runs = Run(State.DATA, 100, 100), Run(State.ZERO, 299, 1), Run(State.DATA, 300, 99), Run(State.BACKING, 0, 400)
    assert picture(400, 4, *runs) == " █░▓"


def test_a_run_darkens_every_place_it_touches_by_its_share() -> None:
    assert picture(400, 4, Run(State.DATA, 50, 200)) == "▒█▒ "


def test_places_may_be_smaller_than_a_cluster_and_the_disk_empty() -> None:
    assert picture(2, 8, Run(State.DATA, 0, 1)) == "████    "
    assert picture(0, 3) == "   "


def test_lines_have_the_width_asked_for() -> None:
    assert list(Picture(100, 10).lines(4)) == [" " * 4, " " * 4, " " * 2]


async def test_runs_are_joined_over_the_spans_of_tables() -> None:
    storage = MemoryStorage()
    geometry = Geometry(4096, 1)
    await create_image(storage, size=5 * geometry.span, geometry=geometry, backing=None, record=Record())
    image = await open_image(storage)
    assert [run async for run in joined_runs(image)] == [Run(State.BACKING, 0, 5 * geometry.span)]
