"""Small datasets of photographs, as TFDS writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
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
    infos = []
    for split, images in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
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
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(path.stat().st_size),
                "shardLengths": [str(len(images))],
            }
        )
    module = "tensorflow_datasets.core.features"
    label = {
        "label": {"pythonClassName": f"{module}.class_label_feature.ClassLabel", "classLabel": {"numClasses": "3"}},
        "number": {
            "pythonClassName": f"{module}.scalar.Scalar",
            "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
        },
    }[label_kind]
    features = {
        "pythonClassName": f"{module}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{module}.image_feature.Image",
                    "image": {
                        "shape": {"dimensions": ["-1", "-1", "3"]},
                        "dtype": "uint8",
                        "encodingFormat": "jpeg",
                    },
                },
                "label": label,
                "file_name": {"pythonClassName": f"{module}.text_feature.Text", "text": {}},
            }
        },
    }
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "moduleName": "", "splits": infos}
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
