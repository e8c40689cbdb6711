"""The guest that the boot tests share; made once for a user, found in the user's cache from then on."""

from __future__ import annotations

import pytest

from contrib.boot import guest as recipe


@pytest.fixture(scope="session")
def guest() -> recipe.Guest:
    return recipe.made(recipe.default_folder())
