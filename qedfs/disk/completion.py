"""Letting an image stand alone once nothing is missing (docs/concurrency.md, "Completion")."""

from __future__ import annotations

from qedfs.disk.claims import Claims
from qedfs.disk.populate import Populate
from qedfs.errors import CorruptEntry
from qedfs.image.image import Image


async def complete(image: Image, claims: Claims, populate: Populate) -> bool:
    """Take the backing out of the header, durably, if nothing is missing; False, and nothing changes, if something is.

    Raises:
        LeafError, LeafFull, LeafFailed: the leaf cannot be written.
        CorruptEntry: some entries are invalid, and the backing is all that is left of their clusters.
        BackingRefused: what is missing cannot be told.
    """
    await image.begin_allocating()
    if image.survey_problem:
        raise CorruptEntry(image.name, "keeps its backing, because it is damaged ('qedfs check' says more)")
    while True:
        # Before the claim below: what is claimed is left out.
        await populate.settle()
        size = image.header.image_size
        last = size // image.geometry.cluster_size
        # Growth claims everything from the old last cluster on, and so comes before or after.
        async with claims.hold(last, last + 1):
            if size != image.header.image_size:
                continue  # it has grown, and what we hold is not its end any more
            if not await populate.is_all_local():
                return False
            # Ordering: everything that the leaf needed of the backing is durable before it stops naming it.
            await image.commit(durable=True)
            await image.drop_backing()
            return True
