"""Growing a disk: everything that the new size exposes reads as zeros before the size is stored.

QEMU refuses to grow an image over a longer backing, because the new range would show the backing's bytes. Here it is
made zero clusters first. Steps (docs/durability.md): zero entries and the old tail; durable commit; `image_size`.
"""

from __future__ import annotations

from collections.abc import Callable

from qedfs.backing.resilient import Backing
from qedfs.disk.claims import Claims
from qedfs.disk.writes import Writes
from qedfs.image.image import Image
from qedfs.image.tables import Counts, State


async def grow(
    image: Image, claims: Claims, writes: Writes, backing_now: Callable[[], Backing | None], size: int
) -> None:
    """Grow the disk of `image` to `size` bytes unless it is that large already.

    Serialised by the claim of everything from the old last cluster on. Waits for the backing where its length decides;
    `backing_now` tells which it is, None of an image that stands alone.

    Raises:
        LeafError, LeafFull, LeafFailed, BackingRefused: the disk keeps its old size.
    """
    cluster_size = image.geometry.cluster_size
    # The old size is read again under the claim: another growth may have come first.
    claim_first = image.header.image_size // cluster_size
    async with claims.hold(claim_first, image.geometry.clusters(size)):
        old = image.header.image_size
        if old >= size:
            return
        # The backing as well: the claim may have been that of a completion.
        backing = backing_now()
        backing_end = await backing.size() if backing is not None and old < image.geometry.max_image_size else 0
        await _zero_tail(image, writes, old, backing_end)
        exposed = await _zero_new(image, old, size, backing_end)
        # Ordering: nothing of the new range may show anything else once the size is there.
        await image.commit(durable=True)
        await image.set_image_size(size, exposed)


async def _zero_tail(image: Image, writes: Writes, old: int, backing_end: int) -> None:
    """Make the bytes of the old last cluster past the old end zeros."""
    cluster_size = image.geometry.cluster_size
    inside = old % cluster_size
    if not inside:
        return
    run = await image.run(old - inside, cluster_size)
    if run.state is State.DATA:
        await image.storage.write(run.offset + inside, bytes(cluster_size - inside))
    elif run.state is State.BACKING and backing_end > old:
        await writes.localise(old // cluster_size)


async def _zero_new(image: Image, old: int, size: int, backing_end: int) -> Counts:
    """Make the whole clusters from the old end to the new one read as zeros, and count the zero clusters among them."""
    cluster_size = image.geometry.cluster_size
    pos = image.geometry.clusters(old) * cluster_size
    zeros = 0
    while pos < size:
        run = await image.run(pos, size - pos)
        first, count = pos // cluster_size, image.geometry.clusters(run.length)
        if run.state is State.BACKING:
            count = min(count, max(0, image.geometry.clusters(backing_end - pos)))
        if count:
            # Entries found there were left by a growth that did not end.
            async with image.pinned(first, first + count):
                image.link_zero(first, count)
            zeros += count
            if image.urgent:
                await image.commit(durable=False)
        pos += run.length
    return Counts(data=0, zero=zeros)
