"""How much a randomised test does, by the hypothesis profile that is chosen."""

from __future__ import annotations

import os

from hypothesis import settings

_LONG = 50
"""Times more."""


def examples(count: int) -> settings:
    """Return settings for `count` examples in CI, and proportionally more with the profile `long`."""
    return settings(max_examples=count * _LONG if os.environ.get("HYPOTHESIS_PROFILE") == "long" else count)
