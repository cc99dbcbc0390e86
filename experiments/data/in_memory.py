"""Small datasets, decoded once into memory: handwritten digits, Fashion-MNIST and CIFAR-10."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import grain
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.data import order
from experiments.data.dataset import Batch, DataError, Dataset
from experiments.data.tfds_source import open_split


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
    count, height, width, channels = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    row = offsets[:, :1] + np.arange(height)
    column = np.where(flips[:, np.newaxis], np.arange(width)[::-1], np.arange(width)) + offsets[:, 1:]
    # One gather of whole pixels: an opaque type of ``channels`` bytes makes each of them a single element.
    pixels = padded.view(np.dtype((np.void, channels))).reshape(-1)
    line = np.arange(count)[:, np.newaxis] * padded.shape[1] + row
    index = line[:, :, np.newaxis] * padded.shape[2] + column[:, np.newaxis, :]
    return pixels.take(index)[..., np.newaxis].view(np.uint8)


def digits() -> InMemoryDataset:
    """The handwritten digits that come with scikit-learn: 8×8 grey, 1,257 to train on and 540 held out.

    The split is stratified by class and always the same. The original grey levels 0…16 are stretched to 0…255.
    """
    pixels, classes = load_digits(return_X_y=True)
    images = np.rint(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(classes, np.int32)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    return InMemoryDataset(
        name="digits",
        num_classes=10,
        train_size=len(train),
        eval_size=len(held_out),
        image_shape=(8, 8, 1),
        mean=(float(images[train].mean()),),
        std=(float(images[train].std()),),
        padding=1,
        flip=False,
        train_images=images[train],
        train_labels=labels[train],
        eval_images=images[held_out],
        eval_labels=labels[held_out],
    )


def fashion_mnist(data_dir: str | None = None) -> InMemoryDataset:
    """Fashion-MNIST by TFDS: 28×28 grey, 60,000 to train on and 10,000 of the test split to evaluate on.

    Training images are not augmented.

    Args:
        data_dir: the TFDS data directory; None is TFDS's own default.

    Raises:
        DataError: the dataset is not there, or not readable.
    """
    return _load("fashion_mnist", data_dir, mean=(72.94,), std=(90.02,), padding=0, flip=False)


def cifar10(data_dir: str | None = None) -> InMemoryDataset:
    """CIFAR-10 by TFDS: 32×32 RGB, 50,000 to train on and 10,000 of the test split to evaluate on.

    Training images are padded by 4 pixels, cropped at random and mirrored, as is usual for this dataset.

    Args:
        data_dir: the TFDS data directory; None is TFDS's own default.

    Raises:
        DataError: the dataset is not there, or not readable.
    """
    return _load("cifar10", data_dir, mean=(125.31, 122.95, 113.87), std=(62.99, 62.09, 66.70), padding=4, flip=True)


def _load(
    name: str, data_dir: str | None, *, mean: tuple[float, ...], std: tuple[float, ...], padding: int, flip: bool
) -> InMemoryDataset:
    train_images, train_labels, num_classes = _decode_split(name, data_dir, "train")
    eval_images, eval_labels, _ = _decode_split(name, data_dir, "test")
    height, width, channels = train_images.shape[1:]
    return InMemoryDataset(
        name=name,
        num_classes=num_classes,
        train_size=len(train_labels),
        eval_size=len(eval_labels),
        image_shape=(height, width, channels),
        mean=mean,
        std=std,
        padding=padding,
        flip=flip,
        train_images=train_images,
        train_labels=train_labels,
        eval_images=eval_images,
        eval_labels=eval_labels,
    )


def _decode_split(name: str, data_dir: str | None, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """All images and labels of a split, and the number of classes."""
    source = open_split(name, data_dir, split)
    height, width, channels = source.image_shape
    if height is None or width is None:
        raise DataError(
            f"The images of {name} differ in size; only datasets of equal images fit into memory as one array."
        )
    images = np.empty((len(source), height, width, channels), np.uint8)
    labels = np.empty(len(source), np.int32)
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    # In blocks, so that the encoded examples never lie in memory all at once.
    for start in range(0, len(source), 4096):
        block = range(start, min(start + 4096, len(source)))
        for i, example in zip(block, source.read(block), strict=True):
            image = cv2.imdecode(np.frombuffer(example.image, np.uint8), flag)
            if image is None or image.shape[:2] != (height, width):
                raise DataError(f"Example {i} of {name}/{split} is not a readable {width}×{height} image.")
            images[i] = image.reshape(height, width, channels)
            labels[i] = example.label
    return images, labels, source.num_classes
