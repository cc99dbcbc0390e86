"""Small datasets written as TFDS writes them, for what measures the reading and what tests it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2


def serialize(example: Mapping[str, bytes | int]) -> bytes:
    """An example, by feature, as a ``tf.train.Example`` message."""
    messages: Any = tf_example_pb2
    message = messages.Example()
    for name, value in example.items():
        feature = message.features.feature[name]
        (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
    return message.SerializeToString()


def write_dataset(folder: Path, features: dict[str, Any], splits: Mapping[str, Sequence[bytes]]) -> None:
    """Writes a TFDS dataset in array_record format, a file for each split.

    Args:
        folder: ``<data directory>/<name>/<version>``, which must not be there.
        features: TFDS's description of each feature.
        splits: their serialized examples.
    """
    folder.mkdir(parents=True)
    root, name = tfds.core.Path(folder), folder.parent.name
    files = tfds.core.ShardedFileTemplate(root, dataset_name=name, filetype_suffix="array_record")
    infos = []
    for split, examples in splits.items():
        template = files.replace(split=split)
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for example in examples:
            writer.write(example)
        writer.close()
        infos.append(tfds.core.SplitInfo(split, [len(examples)], num_bytes=0, filename_template=template))
    description = tfds.features.FeaturesDict(features)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=description, split_infos=infos, filename_template=files, check_data=False
    )
