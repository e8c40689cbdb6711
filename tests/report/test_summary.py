from __future__ import annotations

from qedfs.report.summary import Image, summary

GIB = 1 << 30


def image(
    state: str = "passive",
    *,
    name: str = "vm.raw",
    missing: int | None = GIB,
    rate: float = 0,
    eta: float | None = None,
) -> Image:
    streams = state not in ("passive", "complete", "held")
    return Image(name, state, streams, 2 * GIB, missing, rate, eta)


def test_images_that_do_nothing_are_counted() -> None:
    assert summary([]) == "0 images"
    assert summary([image()]) == "1 image"
    assert summary([image(), image("held")]) == "2 images"
    assert summary([image("complete", missing=0), image("complete", missing=0)]) == "2 images, 2 complete"


def test_progress_rate_and_time_are_those_of_all_streams_together() -> None:
    images = [
        image("streaming", missing=GIB, rate=30 << 20, eta=34),
        image("idle-wait", missing=2 * GIB, rate=10 << 20, eta=205),
        image("complete", missing=0),
    ]
    assert summary(images) == "3 images, 1 complete; streaming 2: 25.0 % local, 40 MiB/s, 3 min 25 s left"


def test_what_nobody_knows_is_left_out() -> None:
    assert summary([image("streaming", missing=None)]) == "1 image; streaming 1"
    half = image("streaming", rate=1 << 20, eta=None)
    assert summary([half]) == "1 image; streaming 1: 50.0 % local, 1 MiB/s"


def test_not_all_is_never_100_percent() -> None:
    assert "99.9 %" in summary([image("streaming", missing=1)])


def test_troubles_are_told_by_name() -> None:
    images = [image("backing-error", name="a.raw"), image("no-space", name="b.raw"), image("failed", name="c.raw")]
    assert summary(images) == (
        "3 images; streaming 3: 50.0 % local; a.raw: without its backing; b.raw: without room for copies; c.raw: failed"
    )
