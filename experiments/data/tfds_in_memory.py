"""Small datasets of TFDS, decoded once into memory: Fashion-MNIST and CIFAR-10."""

import cv2
import numpy as np

from experiments.data.dataset import DataError
from experiments.data.in_memory import InMemoryDataset
from experiments.data.tfds_source import DataDir, open_split


def fashion_mnist(data_dir: DataDir = None) -> InMemoryDataset:
    """Fashion-MNIST by TFDS: 28×28 grey, 60,000 to train on and 10,000 of the test split to evaluate on.

    Training images are not augmented.

    Args:
        data_dir: the TFDS data directory; None is TFDS's own default.

    Raises:
        DataError: the dataset is not there, or not readable.
    """
    return _load("fashion_mnist", data_dir, mean=(72.94,), std=(90.02,), padding=0, flip=False)


def cifar10(data_dir: DataDir = None) -> InMemoryDataset:
    """CIFAR-10 by TFDS: 32×32 RGB, 50,000 to train on and 10,000 of the test split to evaluate on.

    Training images are padded by 4 pixels, cropped at random and mirrored, as is usual for this dataset.

    Args:
        data_dir: the TFDS data directory; None is TFDS's own default.

    Raises:
        DataError: the dataset is not there, or not readable.
    """
    return _load("cifar10", data_dir, mean=(125.31, 122.95, 113.87), std=(62.99, 62.09, 66.70), padding=4, flip=True)


def _load(
    name: str, data_dir: DataDir, *, mean: tuple[float, ...], std: tuple[float, ...], padding: int, flip: bool
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


def _decode_split(name: str, data_dir: DataDir, split: str) -> tuple[np.ndarray, np.ndarray, int]:
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
            # OpenCV raises for no bytes at all, and for others that are no image has None.
            image = cv2.imdecode(np.frombuffer(example.image, np.uint8), flag) if example.image else None
            if image is None or image.shape[:2] != (height, width):
                raise DataError(f"Example {i} of {name}/{split} is not a readable {width}×{height} image.")
            images[i] = image.reshape(height, width, channels)
            labels[i] = example.label
    return images, labels, source.num_classes
