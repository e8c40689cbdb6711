"""The text of a scrape, read back by Prometheus's own parser."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from qedfs.report.metrics import ImageMetrics, metrics_text

IMAGE = ImageMetrics(
    name="vm.raw",
    size=1 << 40,
    missing=None,
    allocated=65536,
    mode="cor",
    state="passive",
    backing_state="",
    handles=2,
    backing_bytes=10,
    asked_twice=2,
    copied=9,
    misses=3,
    missed_seconds=0.25,
    waiting=1,
    errors=0,
    rate=0.0,
    eta=None,
)


def samples(*images: ImageMetrics, refused: int = 0) -> dict[tuple[str, ...], float]:
    """All samples by name and values of labels."""
    families = text_string_to_metric_families("".join(metrics_text("1.2", images, refused)))
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_every_number_is_a_sample_of_its_image() -> None:
    found = samples(IMAGE, replace(IMAGE, name="other.raw", missing=4096, eta=1.5), refused=4)
    assert found["qedfs_disk_size_bytes", "vm.raw"] == 1 << 40
    assert found["qedfs_disk_backing_wait_seconds_total", "vm.raw"] == 0.25
    assert found["qedfs_disk_backing_stragglers_total", "vm.raw"] == 2
    assert found["qedfs_disk_missing_bytes", "other.raw"] == 4096
    assert found["qedfs_disk_eta_seconds", "other.raw"] == 1.5
    assert (found["qedfs_disks",], found["qedfs_refused_images",]) == (2, 4)
    assert found["qedfs_build_info", "1.2"] == 1


def test_what_is_not_known_is_left_out() -> None:
    found = samples(IMAGE)
    assert ("qedfs_disk_missing_bytes", "vm.raw") not in found
    assert ("qedfs_disk_eta_seconds", "vm.raw") not in found


def test_a_word_is_one_series_for_each() -> None:
    found = samples(replace(IMAGE, mode="stream", state="no-space", backing_state="healthy"))
    assert [k[2] for k, v in found.items() if k[0] == "qedfs_disk_mode" and v] == ["stream"]
    assert [k[2] for k, v in found.items() if k[0] == "qedfs_disk_state" and v] == ["no-space"]
    assert [k[2] for k, v in found.items() if k[0] == "qedfs_disk_backing_state" and v] == ["healthy"]
    assert found["qedfs_disk_mode", "vm.raw", "cow"] == 0
    assert not any(v for k, v in samples(IMAGE).items() if k[0] == "qedfs_disk_backing_state")


def test_any_name_is_a_label() -> None:
    name = 'a"b\\c\nd\udce4é.raw'
    found = samples(replace(IMAGE, name=name))
    assert found["qedfs_disk_open_handles", 'a"b\\c\nd?é.raw'] == 2


def test_numbers_of_no_images() -> None:
    assert samples()["qedfs_disks",] == 0
