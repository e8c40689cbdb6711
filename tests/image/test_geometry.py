from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import InvalidImage
from qedfs.image.geometry import MAX_IMAGE_SIZE, MAX_TABLE_BYTES, Geometry
from tests.image.qemu import qemu_img

CLUSTERS = [1 << n for n in range(12, 27)]
TABLES = [1, 2, 4, 8, 16]


@pytest.mark.parametrize("cluster_size", CLUSTERS)
@pytest.mark.parametrize("table_clusters", TABLES)
def test_every_geometry_of_the_format_is_taken_unless_a_table_is_too_large(
    cluster_size: int, table_clusters: int
) -> None:
    if cluster_size * table_clusters > MAX_TABLE_BYTES:
        with pytest.raises(InvalidImage, match="one table takes"):
            Geometry.checked(cluster_size, table_clusters, "x")
        return
    geometry = Geometry.checked(cluster_size, table_clusters, "x")
    assert geometry.table_bytes == cluster_size * table_clusters
    assert geometry.table_entries * 8 == geometry.table_bytes
    assert geometry.span == geometry.table_entries * cluster_size
    assert geometry.max_image_size == min(geometry.table_entries**2 * cluster_size, MAX_IMAGE_SIZE)


@given(st.integers(-5, 1 << 28), st.integers(-5, 40))
def test_nothing_else_is_taken(cluster_size: int, table_clusters: int) -> None:
    if cluster_size in CLUSTERS and table_clusters in TABLES:
        return
    with pytest.raises(InvalidImage):
        Geometry.checked(cluster_size, table_clusters, "x")


def test_the_default_is_that_of_qemu() -> None:
    geometry = Geometry()
    assert (geometry.span, geometry.max_image_size) == (2 << 30, 64 << 40)


def test_the_largest_size_is_that_of_qemu(tmp_path: Path) -> None:
    geometry = Geometry(4096, 2)
    assert geometry.max_image_size == 4 << 30
    options = ("create", "-f", "qed", "-o", "cluster_size=4096,table_size=2", tmp_path / "x.qed")
    geometry.check_image_size(4 << 30, "x")
    qemu_img(*options, str(4 << 30))
    with pytest.raises(InvalidImage, match="more than the"):
        geometry.check_image_size((4 << 30) + 512, "x")
    qemu_img(*options, str((4 << 30) + 512), status=1)


@pytest.mark.parametrize("size", [-512, -1, 1, 511, 513])
def test_a_size_is_whole_sectors(size: int) -> None:
    with pytest.raises(InvalidImage, match="multiple of 512"):
        Geometry().check_image_size(size, "x")


@pytest.mark.parametrize(
    ("length", "usable"),
    [(0, 0), (1, 0), (4096, 4096), (4095, 4096), (3585, 4096), (3584, 0), (8191, 8192), (7680, 4096)],
)
def test_the_usable_length_is_rounded_up_to_sectors_and_down_to_clusters(length: int, usable: int) -> None:
    assert Geometry(4096, 2).usable_length(length) == usable


def test_a_cluster_offset_lies_on_a_cluster_between_header_and_end() -> None:
    geometry = Geometry(4096, 2)
    valid = [offset for offset in range(0, 65536, 512) if geometry.is_cluster_offset(offset, 8192, 20480)]
    assert valid == [8192, 12288, 16384]


def test_a_table_lies_whole_in_the_file() -> None:
    geometry = Geometry(4096, 2)
    valid = [offset for offset in range(0, 65536, 512) if geometry.is_table_offset(offset, 8192, 20480)]
    assert valid == [8192, 12288]


@given(st.integers(0, 1 << 50))
def test_clusters_are_counted_upwards(length: int) -> None:
    geometry = Geometry()
    assert (geometry.clusters(length) - 1) * 65536 < length <= geometry.clusters(length) * 65536 or not length
