"""What every dataset offers to a training loop: two streams of batches whose position is a step number."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np


class DataError(Exception):
    """Data that cannot be used. The message is meant for the user: what is wrong, and the command that mends it."""


class Batch(TypedDict):
    """The rows of one global batch that belong to one process.

    Attributes:
        image: uint8 ``[rows, height, width, channels]``.
        label: int32 ``[rows]``.
        mask: bool ``[rows]``; False marks a row that must not count. Training batches are all True.
    """

    image: np.ndarray
    label: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Dataset(abc.ABC):
    """Labelled images, split into examples to train on and examples to evaluate on.

    A stream is a function of its arguments alone. Global batch ``k`` holds the same examples, augmented the same way
    and in the same order, whatever the number of processes: process ``i`` of ``n`` gets the ``i``-th of ``n``
    contiguous blocks of its rows. The step number is therefore the whole position of the data.

    Attributes:
        name: as TFDS or scikit-learn calls it.
        num_classes: labels are ``0 … num_classes − 1``.
        train_size: examples in an epoch of training.
        eval_size: examples in the evaluation split.
        image_shape: ``(height, width, channels)`` of the images in both streams.
        mean: per channel, on the 0…255 scale of the images. The caller normalises, on the device.
        std: per channel, on the same scale.
    """

    name: str
    num_classes: int
    train_size: int
    eval_size: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abc.abstractmethod
    def train(
        self, batch_size: int, *, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Endless stream of shuffled, augmented batches.

        Args:
            batch_size: rows of the global batch, over all processes.
            seed: ``0 … 2³² − 1``; decides order and augmentation.
            start_step: the first batch to yield. ``start_step=k`` costs the same for every ``k``.
            process_index: which block of rows to yield.
            process_count: number of blocks; must divide ``batch_size``.

        Raises:
            DataError: ``process_count`` does not divide ``batch_size``, or data turn out to be unreadable.
        """

    @abc.abstractmethod
    def evaluate(self, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """One pass over the evaluation split, in its order.

        Every example appears in exactly one process. The last batch is padded with masked rows, so that all batches
        have the same shape and all processes yield the same number of them.

        Args:
            batch_size: rows of the global batch, over all processes.
            process_index: which block of rows to yield.
            process_count: number of blocks; must divide ``batch_size``.

        Raises:
            DataError: ``process_count`` does not divide ``batch_size``, or data turn out to be unreadable.
        """
