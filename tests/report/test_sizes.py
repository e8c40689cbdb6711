from __future__ import annotations

import pytest

from qedfs.report.sizes import exact_size_text, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1000448, "977 KiB")),
        *((1 << 30, "1 GiB"), (1000 << 20, "1000 MiB"), (64 << 40, "64 TiB"), ((1 << 63) - 512, "8 EiB")),
    ],
)
def test_a_size_is_told_in_its_largest_unit(size: int, text: str) -> None:
    assert size_text(size) == text


def test_an_exact_size_is_told_to_the_byte() -> None:
    assert exact_size_text(1000448) == "977 KiB (1000448 bytes)"
