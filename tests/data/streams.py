"""What tests do with streams of batches."""

import itertools

import numpy as np

from experiments.data.dataset import Batch

KEYS = ("image", "label", "mask")


def take(stream, count: int) -> list[Batch]:
    """The next batches of a stream, which is closed then: its threads or worker processes would go on."""
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(x[key], y[key])
            assert x[key].dtype == y[key].dtype


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """Global batches from the streams of all processes."""
    return [
        Batch(
            image=np.concatenate([p["image"] for p in step]),
            label=np.concatenate([p["label"] for p in step]),
            mask=np.concatenate([p["mask"] for p in step]),
        )
        for step in zip(*parts, strict=True)
    ]
