"""Image-classification splits prepared by TensorFlow Datasets, read at random without TensorFlow."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core.constants import DATA_DIR
from tensorflow_datasets.proto import tf_example_pb2

from experiments.data.dataset import DataError

DataDir = str | os.PathLike[str] | None
"""The directory of TFDS's datasets; None is TFDS's own default."""

# TFDS's own parser fits any nesting of features and takes longer for it than a small image takes to decode.
_EXAMPLE: Any = tf_example_pb2.__dict__["Example"]


class Example(NamedTuple):
    """An encoded image (JPEG or PNG bytes) and its label."""

    image: bytes
    label: int


@dataclass(frozen=True)
class TfdsSplit:
    """One split of a dataset, by random access.

    Attributes:
        name: of the dataset.
        split: of the dataset.
        num_classes: labels are ``0 … num_classes − 1``.
        image_shape: ``(height, width, channels)``; height and width are None where images differ in size.
        source: TFDS's random-access reader of serialized ``tf.train.Example`` messages.
        image_key: the feature that holds the image.
        label_key: the feature that holds the label.
    """

    name: str
    split: str
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    source: Any
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """The examples at these indices.

        Raises:
            DataError: the files are damaged, or an example has no label.
        """
        try:
            records = self.source.__getitems__(list(indices))
        except RuntimeError as error:  # what array_record raises for any damage
            raise DataError(
                f"A file of {self.name}/{self.split} is damaged: {error}\n"
                f"Delete the folder {self.source.dataset_info.data_dir} and prepare the dataset again."
            ) from error
        features = [_EXAMPLE.FromString(record).features.feature for record in records]
        examples = [
            Example(feature[self.image_key].bytes_list.value[0], feature[self.label_key].int64_list.value[0])
            for feature in features
        ]
        for index, example in zip(indices, examples, strict=True):
            if not 0 <= example.label < self.num_classes:
                raise DataError(
                    f"{self.file_name(index)} in {self.name}/{self.split} has the label {example.label}, "
                    f"which is none of the {self.num_classes} classes.\n"
                    f"Splits whose labels are not public cannot be used."
                )
        return examples

    def file_name(self, index: int) -> str:
        """What the dataset calls an example, for messages; its place in the split where it has no name."""
        feature = _EXAMPLE.FromString(self.source[index]).features.feature
        for key in ("file_name", "image/filename"):
            if key in feature:
                return feature[key].bytes_list.value[0].decode()
        return f"{self.split}[{index}]"


def open_split(name: str, data_dir: DataDir, split: str) -> TfdsSplit:
    """Opens a split of a TFDS dataset in array_record format.

    Args:
        name: of the dataset in TFDS, or of its folder in ``data_dir``; a configuration and a version may follow, in
            TFDS's notation.
        data_dir: the TFDS data directory; None is TFDS's own default.
        split: in TFDS's notation, such as ``train`` or ``train[:90%]``.

    Raises:
        DataError: the dataset or the split is not there, not complete, or not for image classification. The message
            has the command that prepares or converts the dataset.
    """
    builder = _find(name, data_dir)
    info = builder.info
    if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
        raise DataError(_not_array_record(name, builder))
    image_key, label_key = _image_and_label(name, info)
    try:
        source: Any = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        files = source.dataset_info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        known = ", ".join(info.splits)
        raise DataError(f"{name} has no split '{split}', or it holds no example. Its splits are: {known}.") from error
    _check_complete(name, data_dir, builder, files)
    features = info.features
    return TfdsSplit(
        name, split, features[label_key].num_classes, features[image_key].shape, source, image_key, label_key
    )


def _find(name: str, data_dir: DataDir) -> Any:
    """The builder of a dataset that is prepared; whether wholly so is not looked at."""
    folder = _folder(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(f"There is no dataset '{name}' in {folder}, and TFDS knows none of that name.") from error
    # Whatever a builder's own code or a half-written description makes TFDS raise means the same to the user.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"The dataset '{name}' in {folder} cannot be opened: {reason}\n"
            "If it is its folder that is damaged, remove it and prepare the dataset again."
        ) from error
    if not builder.is_prepared():
        raise DataError(f"There is no dataset '{name}' in {folder}.\n{_how_to_prepare(name, data_dir)}")
    return builder


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """The features that hold the image and its class: the supervised pair, or else the only ones of their kind."""
    features: dict[str, Any] = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    pair = info.supervised_keys if info.supervised_keys and len(info.supervised_keys) == 2 else tuple(features)
    images = [key for key in pair if isinstance(features.get(key), tfds.features.Image)]
    labels = [key for key in pair if isinstance(features.get(key), tfds.features.ClassLabel)]
    if len(images) != 1 or len(labels) != 1 or not features[labels[0]].num_classes:
        found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items()))
        raise DataError(
            f"{name} is not a dataset for image classification: that takes one Image and one ClassLabel.\n"
            f"Its features are: {found or info.features}."
        )
    return images[0], labels[0]


def _check_complete(name: str, data_dir: DataDir, builder: Any, files: Sequence[Any]) -> None:
    """Compares the files on disk with what the dataset's description says of them."""

    def examples(path: str) -> int:
        # A truncated file opens all the same, and holds nothing; depending on where it ends, closing it fails.
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        try:
            reader.close()
        except RuntimeError:
            return 0
        return count

    paths = [os.fspath(file.filename) for file in files]
    missing = [path for path in paths if not os.path.exists(path)]
    if not missing:
        # In threads, for the many files of a large dataset on a network drive.
        with ThreadPoolExecutor(32) as pool:
            found = pool.map(examples, paths)
        missing = [path for path, file, n in zip(paths, files, found, strict=True) if n != file.examples_in_shard]
    if missing:
        raise DataError(
            f"The dataset '{name}' in {_folder(data_dir)} is not complete:\n"
            f"{len(missing)} of {len(paths)} files are missing or truncated, the first is {missing[0]}.\n"
            f"Delete the folder {builder.data_path}.\n{_how_to_prepare(name, data_dir)}"
        )


def _folder(data_dir: DataDir) -> str:
    return os.fspath(data_dir or DATA_DIR)


def _how_to_prepare(name: str, data_dir: DataDir) -> str:
    try:
        manual = tfds.builder_cls(re.split("[/:]", name)[0]).MANUAL_DOWNLOAD_INSTRUCTIONS
    except tfds.core.DatasetNotFoundError:
        return "TFDS does not know this dataset, so it cannot prepare it: get it again from where it came from."
    lines = []
    if manual:
        lines.append(f"TFDS cannot download all of it. Put the rest into {_folder(data_dir)}/downloads/manual:")
        lines.append(f"  {' '.join(manual.split())}")
    where = f", data_dir={os.fspath(data_dir)!r}" if data_dir else ""
    lines.append("Prepare it once with these commands. Preparing takes TensorFlow, using it afterwards does not:")
    lines.append("  pip install tensorflow")
    lines.append(
        f'  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()\""
    )
    return "\n".join(lines)


def _not_array_record(name: str, builder: Any) -> str:
    return (
        f"The dataset '{name}' in {builder.data_path} is in {builder.info.file_format.value} format; "
        f"random access takes array_record.\n"
        f"Convert it in place with these commands. Converting takes TensorFlow, using it afterwards does not:\n"
        f"  pip install tensorflow apache-beam mlcroissant\n"
        f"  tfds convert_format --dataset_version_dir={builder.data_path} --out_file_format=array_record"
    )
