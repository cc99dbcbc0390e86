"""Datasets whose images all lie in memory."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np

from experiments.data import order
from experiments.data.dataset import Batch, Dataset


@dataclass(frozen=True, kw_only=True)
class InMemoryDataset(Dataset):
    """A dataset whose images lie in memory as arrays.

    Augmentation pads an image with black, cuts the original size out at a random offset, and mirrors every other one.

    Attributes:
        padding: pixels added to each side before the random crop; 0 leaves images where they are.
        flip: whether to mirror images left to right with probability 1/2.
        train_images: uint8 ``[train_size, height, width, channels]``.
        train_labels: int32 ``[train_size]``.
        eval_images: uint8 ``[eval_size, height, width, channels]``.
        eval_labels: int32 ``[eval_size]``.
    """

    padding: int
    flip: bool
    train_images: np.ndarray
    train_labels: np.ndarray
    eval_images: np.ndarray
    eval_labels: np.ndarray

    def train(
        self, batch_size: int, *, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        rows = order.process_rows(batch_size, process_index, process_count)

        def batch(step: int, rng: np.random.Generator) -> Batch:
            # Numbers are drawn for the global batch, so that they do not depend on how many processes share it.
            offsets = rng.integers(0, 2 * self.padding, (batch_size, 2), endpoint=True)[rows]
            flips = (rng.random(batch_size) < 0.5)[rows] & self.flip
            index = order.train_indices(self.train_size, step, batch_size, rows, seed)
            images = self.train_images[index]
            if self.padding or self.flip:
                images = shift_and_flip(images, offsets, flips, self.padding)
            return Batch(image=images, label=self.train_labels[index], mask=np.ones(len(index), bool))

        steps = grain.MapDataset.range(sys.maxsize // batch_size).seed(seed).random_map(batch)
        return _iterate(steps[start_step:])

    def evaluate(self, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        rows = order.process_rows(batch_size, process_index, process_count)

        def batch(step: int) -> Batch:
            index, mask = order.eval_indices(self.eval_size, step, batch_size, rows)
            return Batch(image=self.eval_images[index], label=self.eval_labels[index], mask=mask)

        return _iterate(grain.MapDataset.range(order.eval_steps(self.eval_size, batch_size)).map(batch))


def _iterate(batches: grain.MapDataset) -> Iterator[Batch]:
    # A batch of 128 takes half a millisecond to make, and two with shifts and flips: a thread that prefetches would
    # cost more than it hides.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def shift_and_flip(images: np.ndarray, offsets: np.ndarray, flips: np.ndarray, padding: int) -> np.ndarray:
    """Pads images with black, crops them to their size again, and mirrors some of the crops left to right.

    Args:
        images: uint8 ``[n, height, width, channels]``.
        offsets: int ``[n, 2]``, top and left edge of the crop in the padded image, each ``0 … 2·padding``.
        flips: bool ``[n]``, which crops to mirror.
        padding: black pixels added on each side.

    Returns:
        uint8 ``[n, height, width, channels]``.
    """
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    crops = np.empty_like(images)
    for crop, image, (top, left), flip in zip(crops, padded, offsets, flips, strict=True):
        part = image[top : top + height, left : left + width]
        crop[:] = part[:, ::-1] if flip else part
    return crops
