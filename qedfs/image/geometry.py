"""Sizes of clusters and tables, and where a position on the disk is found. Sans-IO.

An image is cut into clusters. An L1 table names L2 tables, an L2 table names clusters; both have the same number of
entries (QED specification, "Tables").
"""

from __future__ import annotations

from typing import NamedTuple

from qedfs.errors import InvalidImage

SECTOR = 512
MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE = 1 << 12, 1 << 26
MIN_TABLE_CLUSTERS, MAX_TABLE_CLUSTERS = 1, 16
DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_CLUSTERS = 1 << 16, 4
MAX_TABLE_BYTES = 64 << 20
"""Of one table. The format allows 1 GiB, which nobody uses and which would have to be in memory at once."""
MAX_TABLES = 1 << 17
"""Of L2 tables that one L1 table may name. As many as one of 1 MiB has entries; with larger tables that is 4 PiB of disk
at least, while a hostile L1 could name millions."""
MAX_IMAGE_SIZE = (1 << 63) - SECTOR
"""Bytes: what a signed file offset can address, in whole sectors."""


class Geometry(NamedTuple):
    """`cluster_size` in bytes (a power of two), `table_clusters` clusters a table (a power of two)."""

    cluster_size: int = DEFAULT_CLUSTER_SIZE
    table_clusters: int = DEFAULT_TABLE_CLUSTERS

    @classmethod
    def checked(cls, cluster_size: int, table_clusters: int, name: str) -> Geometry:
        """Return the geometry, or raise `InvalidImage` about the image `name` when the format or we do not allow it."""
        if not _is_power_of_two_within(cluster_size, MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE):
            raise InvalidImage(name, f"cluster size {cluster_size} is not a power of two from 4 KiB to 64 MiB")
        if not _is_power_of_two_within(table_clusters, MIN_TABLE_CLUSTERS, MAX_TABLE_CLUSTERS):
            raise InvalidImage(name, f"table size {table_clusters} is not a power of two from 1 to 16 clusters")
        geometry = cls(cluster_size, table_clusters)
        if geometry.table_bytes > MAX_TABLE_BYTES:
            raise InvalidImage(
                name, f"one table takes {geometry.table_bytes >> 20} MiB; more than {MAX_TABLE_BYTES >> 20} is refused"
            )
        return geometry

    def check_image_size(self, size: int, name: str) -> None:
        """Raise `InvalidImage` unless `size` bytes is a size an image of this geometry can have."""
        if size < 0 or size % SECTOR:
            raise InvalidImage(name, f"image size {size} is not a multiple of {SECTOR}")
        if size > self.max_image_size:
            raise InvalidImage(name, f"image size {size} is more than the {self.max_image_size} its tables can address")

    @property
    def table_bytes(self) -> int:
        return self.cluster_size * self.table_clusters

    @property
    def table_entries(self) -> int:
        return self.table_bytes // 8

    @property
    def span(self) -> int:
        """Bytes of the disk that one L2 table covers."""
        return self.table_entries * self.cluster_size

    @property
    def max_image_size(self) -> int:
        """Bytes. QEMU computes the product in 64 bits, where the largest geometries wrap to nothing; this does not."""
        return min(self.table_entries * self.span, MAX_IMAGE_SIZE)

    def clusters(self, length: int) -> int:
        """Number of clusters that `length` bytes touch when they begin at a cluster's start."""
        return -(-length // self.cluster_size)

    def usable_length(self, file_length: int) -> int:
        """Length of a file as its clusters count: rounded up to whole sectors, then down to whole clusters.

        A file cut by less than a sector inside its last cluster keeps that cluster; the missing bytes read as zeros.
        """
        sectors = -(-file_length // SECTOR)
        return sectors * SECTOR // self.cluster_size * self.cluster_size

    def is_cluster_offset(self, offset: int, room: int, usable: int) -> bool:
        """Whether `offset` may be a data cluster in a file of `usable` bytes whose header takes `room` bytes."""
        return room <= offset < usable and not offset % self.cluster_size

    def is_table_offset(self, offset: int, room: int, usable: int) -> bool:
        """Whether a whole table may lie at `offset`."""
        return self.is_cluster_offset(offset, room, usable) and offset + self.table_bytes <= usable


def _is_power_of_two_within(value: int, low: int, high: int) -> bool:
    return low <= value <= high and not value & (value - 1)
