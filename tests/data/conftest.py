"""Small datasets that the tests make of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.making import make_photos, write_dataset


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    return make_photos()


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """``make_dataset(name, splits)`` writes a dataset into the test's own ``tmp_path``; see ``write_dataset``."""
    return lambda name, splits, **options: write_dataset(tmp_path, name, splits, **options)
