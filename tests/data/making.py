"""Small datasets of photographs, as TFDS writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

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


def write_dataset(root: Path, name: str, splits: dict[str, list[bytes]], label_kind: str = "label") -> Path:
    """Writes a TFDS dataset of three classes in array_record format.

    Example i of a split is called ``<i>.jpg`` and labelled i mod 3.

    Returns:
        The folder with its files.
    """
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    messages: Any = tf_example_pb2
    files = tfds.core.ShardedFileTemplate(folder, dataset_name=name, filetype_suffix="array_record")
    infos = []
    for split, images in splits.items():
        template = files.replace(split=split)
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for i, image in enumerate(images):
            example = messages.Example()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(image)
            feature["label"].int64_list.value.append(i % 3)
            feature["file_name"].bytes_list.value.append(f"{i}.jpg".encode())
            writer.write(example.SerializeToString())
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[len(images)], num_bytes=path.stat().length, filename_template=template
            )
        )
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": {"label": tfds.features.ClassLabel(num_classes=3), "number": tfds.features.Scalar(np.int64)}[
            label_kind
        ],
        "file_name": tfds.features.Text(),
    }
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        split_infos=infos,
        filename_template=files,
        check_data=False,
    )
    return folder
