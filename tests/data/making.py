"""Small datasets of photographs, as TFDS writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import tfds_writing
from tests.data.images import encode


def make_photos() -> list[bytes]:
    """Twenty-three JPEGs of different sizes, each of a colour of its own."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(23):
        height, width = rng.integers(30, 60, 2)
        slope = np.linspace(0, 40, width)[np.newaxis, :, np.newaxis]
        pixels = np.broadcast_to(np.array([10 * i, 128, 200 - 5 * i]) + slope, (height, width, 3))
        images.append(encode(pixels.clip(0, 255).astype(np.uint8), "JPEG", quality=95))
    return images


def write_dataset(root: Path, name: str, splits: dict[str, list[bytes]], label: Any = None) -> Path:
    """Writes a TFDS dataset of three classes in array_record format.

    Example i of a split is called ``<i>.jpg`` and labelled i mod 3; ``label`` describes that feature otherwise.

    Returns:
        The folder with its files.
    """
    folder = root / name / "1.0.0"
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": label or tfds.features.ClassLabel(num_classes=3),
        "file_name": tfds.features.Text(),
    }

    def serialize(i: int, image: bytes) -> bytes:
        return tfds_writing.serialize({"image": image, "label": i % 3, "file_name": f"{i}.jpg".encode()})

    serialized = {split: [serialize(i, image) for i, image in enumerate(images)] for split, images in splits.items()}
    tfds_writing.write_dataset(folder, features, serialized)
    return folder
