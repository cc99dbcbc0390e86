"""What a user is told about a dataset that cannot be used."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.dataset import DataError
from experiments.data.tfds_source import open_split


def message(name: str, data_dir, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        open_split(name, str(data_dir), split)
    return str(caught.value)


@pytest.fixture
def tiny(make_dataset, photos):
    return make_dataset("tiny", {"train": photos, "test": photos[:5]})


def test_examples_come_encoded_with_label_and_name(tiny, photos, tmp_path):
    split = open_split("tiny", str(tmp_path), "train")
    assert (len(split), split.num_classes, split.image_shape) == (23, 3, (None, None, 3))
    assert split.read([5, 1]) == [(photos[5], 2), (photos[1], 1)]
    assert split.file_name(7) == "7.jpg"


def test_a_missing_dataset_comes_with_the_command_that_prepares_it(tmp_path):
    text = message("fashion_mnist", tmp_path)
    assert text.startswith(f"There is no dataset 'fashion_mnist' in {tmp_path}.")
    assert "pip install tensorflow" in text
    assert f"tfds.builder('fashion_mnist', data_dir='{tmp_path}', file_format='array_record')" in text
    (code,) = re.findall(r'python -c "(.*)"', text)
    compile(code, "command", "exec")


def test_imagenet_must_be_downloaded_by_hand(tmp_path):
    text = message("imagenet2012", tmp_path)
    assert f"{tmp_path}/downloads/manual" in text
    assert "ILSVRC2012_img_train.tar" in text
    assert "download_and_prepare()" in text


def test_the_default_directory_is_named_when_none_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.data.tfds_source.DATA_DIR", tmp_path)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=re.escape(f"no dataset 'cifar10' in {tmp_path}")) as caught:
        open_split("cifar10", None, "train")
    assert "tfds.builder('cifar10', file_format='array_record')" in str(caught.value)


def test_an_unknown_dataset(tmp_path):
    assert message("no_such_dataset", tmp_path) == (
        f"There is no dataset 'no_such_dataset' in {tmp_path}, and TFDS knows none of that name."
    )


def test_a_malformed_name(tmp_path):
    assert message("../tiny", tmp_path).startswith(f"The dataset '../tiny' in {tmp_path} cannot be opened: ")


def test_a_description_that_is_cut_short(tiny, tmp_path):
    (tiny / "dataset_info.json").write_text('{"name": "ti')
    assert message("tiny", tmp_path).startswith(f"The dataset 'tiny' in {tmp_path} cannot be opened: ")


def test_tfrecord_comes_with_the_command_that_converts_it(tiny, tmp_path):
    info = json.loads((tiny / "dataset_info.json").read_text())
    (tiny / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    text = message("tiny", tmp_path)
    assert f"'tiny' in {tiny} is in tfrecord format" in text
    assert f"tfds convert_format --dataset_version_dir={tiny} --out_file_format=array_record" in text


def test_a_dataset_converted_in_place_is_read(tiny, tmp_path):
    info = json.loads((tiny / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (tiny / "dataset_info.json").write_text(json.dumps(info))
    assert len(open_split("tiny", str(tmp_path), "train")) == 23


@pytest.mark.parametrize("damage", ["missing", "half", "last bytes", "empty"])
def test_incomplete_files(tiny, tmp_path, damage):
    path = tiny / "tiny-train.array_record-00000-of-00001"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: {"half": len(content) // 2, "last bytes": -10, "empty": 0}[damage]])
    text = message("tiny", tmp_path)
    assert text.startswith(f"The dataset 'tiny' in {tmp_path} is not complete:\n1 of 1 files")
    assert str(path) in text
    assert f"Delete the folder {tiny}." in text
    assert "get it again from where it came from" in text
    assert len(open_split("tiny", str(tmp_path), "test")) == 5


def test_a_half_prepared_dataset_of_tfds_comes_with_the_command(make_dataset, photos, tmp_path):
    folder = make_dataset("cifar10", {"train": photos})
    (folder / "cifar10-train.array_record-00000-of-00001").unlink()
    text = message("cifar10:1.0.0", tmp_path)
    assert f"Delete the folder {folder}." in text
    assert "tfds.builder('cifar10:1.0.0'" in text


def test_damage_inside_a_file(tiny, tmp_path):
    path = tiny / "tiny-train.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    # Past the first record's chunk, before the index at the end.
    content[4000:6000] = bytes(2000)
    path.write_bytes(content)
    split = open_split("tiny", str(tmp_path), "train")
    with pytest.raises(DataError, match=r"A file of tiny/train is damaged: .*\nDelete the folder"):
        split.read(range(len(split)))


@pytest.mark.parametrize("split", ["validation", "train[[", "test[:1%]"])
def test_an_unknown_or_empty_split_comes_with_those_there_are(tiny, tmp_path, split):
    said = f"tiny has no split '{split}', or it holds no example. Its splits are: train, test."
    assert message("tiny", tmp_path, split) == said


def test_a_dataset_without_classes(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": photos}, label=tfds.features.Scalar(np.int64))
    text = message("tiny", tmp_path)
    assert text.startswith("tiny is not a dataset for image classification")
    assert "Its features are: file_name (Text), image (Image), label (Scalar)." in text


def test_labels_that_are_not_public(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": photos})
    split = open_split("tiny", str(tmp_path), "train")
    fewer = dataclasses.replace(split, num_classes=2)
    assert fewer.read([0, 1]) == split.read([0, 1])
    with pytest.raises(DataError, match=r"2\.jpg in tiny/train has the label 2, which is none of the 2 classes"):
        fewer.read([2])
