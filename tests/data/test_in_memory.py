"""Streams of the datasets that lie in memory."""

import numpy as np
import pytest

from experiments.data.dataset import DataError
from experiments.data.digits import digits
from experiments.data.in_memory import InMemoryDataset, shift_and_flip
from experiments.data.tfds_in_memory import cifar10, fashion_mnist
from experiments.data.tfds_source import Example
from tests.data.images import encode
from tests.data.streams import assert_equal, joined, take


def numbered(train_size: int = 50, eval_size: int = 23, padding: int = 2, flip: bool = True) -> InMemoryDataset:
    """A dataset whose labels are the examples' indices, so that a batch tells which examples it holds."""
    rng = np.random.default_rng(0)
    return InMemoryDataset(
        name="numbered",
        num_classes=max(train_size, eval_size),
        train_size=train_size,
        eval_size=eval_size,
        image_shape=(6, 5, 3),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        padding=padding,
        flip=flip,
        train_images=rng.integers(1, 256, (train_size, 6, 5, 3), np.uint8),
        train_labels=np.arange(train_size, dtype=np.int32),
        eval_images=rng.integers(1, 256, (eval_size, 6, 5, 3), np.uint8),
        eval_labels=np.arange(eval_size, dtype=np.int32),
    )


def test_batches_have_the_promised_shapes_and_dtypes():
    batch = next(numbered().train(8, seed=0))
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 6, 5, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)
    assert (batch["mask"].shape, batch["mask"].dtype) == ((8,), bool)
    assert batch["mask"].all()


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    dataset = numbered()
    first = take(dataset.train(8, seed=3), 10)
    assert_equal(first, take(dataset.train(8, seed=3), 10))
    other = take(dataset.train(8, seed=4), 10)
    assert any((a["label"] != b["label"]).any() for a, b in zip(first, other, strict=True))


def test_start_step_goes_on_as_an_uninterrupted_stream():
    dataset = numbered()
    whole = take(dataset.train(8, seed=3), 20)
    assert_equal(whole[13:], take(dataset.train(8, seed=3, start_step=13), 7))
    far = take(dataset.train(8, seed=3, start_step=10**9), 2)
    assert far[0]["label"].shape == (8,)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(process_count):
    dataset = numbered()
    parts = [
        take(dataset.train(8, seed=3, process_index=i, process_count=process_count), 15) for i in range(process_count)
    ]
    assert_equal(joined(parts), take(dataset.train(8, seed=3), 15))


def test_every_epoch_holds_each_example_once_in_a_new_order():
    dataset = numbered(train_size=50)
    labels = np.concatenate([b["label"] for b in take(dataset.train(8, seed=0), 25)])
    epochs = labels.reshape(4, 50)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_may_be_larger_than_the_dataset():
    labels = next(numbered(train_size=5).train(16, seed=0))["label"]
    assert (np.bincount(labels[:15]) == 3).all()


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_counts_every_example_exactly_once(process_count):
    dataset = numbered(eval_size=21)
    parts = [list(dataset.evaluate(8, process_index=i, process_count=process_count)) for i in range(process_count)]
    batches = joined(parts)
    assert [len(b["label"]) for b in batches] == [8, 8, 8]
    labels = np.concatenate([b["label"][b["mask"]] for b in batches])
    np.testing.assert_array_equal(labels, np.arange(21))
    images = np.concatenate([b["image"][b["mask"]] for b in batches])
    np.testing.assert_array_equal(images, dataset.eval_images)


def test_shift_and_flip_by_hand():
    image = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[np.newaxis, :, :, np.newaxis]
    images = np.concatenate([image] * 3)
    crops = shift_and_flip(images, np.array([[1, 1], [0, 2], [2, 0]]), np.array([False, False, True]), padding=1)
    np.testing.assert_array_equal(crops[0, ..., 0], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(crops[1, ..., 0], [[0, 0, 0], [2, 3, 0]])
    np.testing.assert_array_equal(crops[2, ..., 0], [[5, 4, 0], [0, 0, 0]])


def test_shift_and_flip_keeps_the_channels_of_a_pixel_together():
    images = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    crop = shift_and_flip(images, np.array([[0, 0]]), np.array([True]), padding=0)
    np.testing.assert_array_equal(crop, images[:, :, ::-1])


def test_augmentation_reaches_every_offset_and_both_directions():
    dataset = numbered(train_size=1, padding=1)
    (image,) = dataset.train_images
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    crops = {padded[y : y + 6, x : x + 5][:, ::d].tobytes() for y in range(3) for x in range(3) for d in (1, -1)}
    assert len(crops) == 18
    seen = {image.tobytes() for batch in take(dataset.train(64, seed=0), 5) for image in batch["image"]}
    assert seen == crops


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(DataError, match="batch size 10, processes 4"):
        numbered().train(10, seed=0, process_count=4)
    with pytest.raises(DataError, match="batch size 0, processes 1"):
        numbered().evaluate(0)


def test_digits_have_a_fixed_stratified_split():
    dataset = digits()
    assert (dataset.train_size, dataset.eval_size, dataset.num_classes) == (1257, 540, 10)
    assert dataset.train_images.shape == (1257, 8, 8, 1)
    assert dataset.train_images.max() == 255
    np.testing.assert_array_equal(dataset.eval_images, digits().eval_images)
    share = np.bincount(dataset.eval_labels) / np.bincount(np.concatenate([dataset.eval_labels, dataset.train_labels]))
    assert (np.abs(share - 0.3) < 0.01).all()
    train = {image.tobytes() for image in dataset.train_images}
    assert not any(image.tobytes() in train for image in dataset.eval_images)


def test_fashion_mnist(data_dir):
    dataset = fashion_mnist(data_dir)
    assert (dataset.train_size, dataset.eval_size, dataset.num_classes) == (60_000, 10_000, 10)
    assert dataset.image_shape == (28, 28, 1)
    assert (np.bincount(dataset.train_labels) == 6000).all()
    assert (np.bincount(dataset.eval_labels) == 1000).all()  # so they are in the test split
    np.testing.assert_allclose(dataset.train_images.mean(), dataset.mean, atol=0.01)
    np.testing.assert_allclose(dataset.train_images.std(), dataset.std, atol=0.01)
    batch = next(dataset.train(4, seed=0))
    assert all((dataset.train_images == image).all(axis=(1, 2, 3)).any() for image in batch["image"])


def test_cifar10(data_dir):
    dataset = cifar10(data_dir)
    assert (dataset.train_size, dataset.eval_size, dataset.num_classes) == (50_000, 10_000, 10)
    assert dataset.image_shape == (32, 32, 3)
    # The copy to develop with is re-encoded as JPEG, which moves the channels' means by a few hundredths.
    np.testing.assert_allclose(dataset.train_images.mean(axis=(0, 1, 2)), dataset.mean, atol=0.1)
    np.testing.assert_allclose(dataset.train_images.std(axis=(0, 1, 2)), dataset.std, atol=0.5)
    assert (dataset.padding, dataset.flip) == (4, True)
    assert (np.bincount(dataset.eval_labels) == 1000).all()  # so they are in the test split


@pytest.mark.parametrize("image", [b"", b"broken", encode(np.zeros((32, 31, 3), np.uint8), "PNG")])
def test_an_image_that_is_none_of_the_dataset_is_one_message(monkeypatch, image):
    class Split(list):
        image_shape, num_classes = (32, 32, 3), 10

        def read(self, indices):
            return [self[i] for i in indices]

    whole = Example(encode(np.zeros((32, 32, 3), np.uint8), "PNG"), 3)
    split = Split([whole, Example(image, 3)])
    monkeypatch.setattr("experiments.data.tfds_in_memory.open_split", lambda name, data_dir, split_name: split)
    with pytest.raises(DataError, match=r"^Example 1 of cifar10/train is not a readable 32×32 image\.$"):
        cifar10()
    split.pop()
    np.testing.assert_array_equal(cifar10().train_images, np.zeros((1, 32, 32, 3)))
