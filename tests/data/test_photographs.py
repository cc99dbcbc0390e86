"""Streams of photographs: order, processes, workers, unreadable images."""

import itertools
import logging
import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.data import photographs as photographs_module
from experiments.data.dataset import DataError
from experiments.data.photographs import photographs
from tests.commands import run_python
from tests.data.streams import assert_equal, joined, take


@pytest.fixture
def dataset(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": photos, "test": photos[:10]})
    return photographs("tiny", str(tmp_path), image_size=16)


def test_description(dataset):
    assert (dataset.name, dataset.num_classes, dataset.train_size, dataset.eval_size) == ("tiny", 3, 23, 10)
    assert dataset.image_shape == (16, 16, 3)
    batch = next(dataset.train(4, seed=0))
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 16, 16, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((4,), np.int32)
    assert batch["mask"].all()


def test_the_stream_is_a_function_of_seed_and_step(dataset):
    whole = take(dataset.train(8, seed=3), 9)
    assert_equal(whole, take(dataset.train(8, seed=3), 9))
    assert_equal(whole[5:], take(dataset.train(8, seed=3, start_step=5), 4))
    other = take(dataset.train(8, seed=4), 1)
    assert (other[0]["image"] != whole[0]["image"]).any()


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(dataset, process_count):
    parts = [
        take(dataset.train(8, seed=3, process_index=i, process_count=process_count), 5) for i in range(process_count)
    ]
    assert_equal(joined(parts), take(dataset.train(8, seed=3), 5))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_counts_every_example_exactly_once(dataset, process_count):
    parts = [list(dataset.evaluate(8, process_index=i, process_count=process_count)) for i in range(process_count)]
    batches = joined(parts)
    assert [len(b["label"]) for b in batches] == [8, 8]
    labels = np.concatenate([b["label"][b["mask"]] for b in batches])
    np.testing.assert_array_equal(labels, np.arange(10) % 3)
    red = np.concatenate([b["image"][b["mask"]] for b in batches])[..., 0].mean(axis=(1, 2))
    np.testing.assert_allclose(np.diff(red), 10, atol=3)  # example i is redder than its predecessor by 10 levels


def test_worker_processes_change_nothing(make_dataset, photos, tmp_path, caplog):
    damaged = [*photos[:4], photos[4][:200], *photos[5:]]
    make_dataset("tiny", {"train": damaged, "test": damaged[:10]})
    here = photographs("tiny", str(tmp_path), image_size=16, max_unreadable=1)
    there = photographs("tiny", str(tmp_path), image_size=16, max_unreadable=1, workers=2)
    with caplog.at_level(logging.WARNING):
        assert_equal(take(there.train(8, seed=3, start_step=2), 7), take(here.train(8, seed=3, start_step=2), 7))
        assert_equal(list(there.evaluate(4)), list(here.evaluate(4)))
    # No more of them than batches.
    before, first = set(multiprocessing.active_children()), there.evaluate(10)
    next(first)
    assert len(set(multiprocessing.active_children()) - before) == 1
    assert list(first) == []
    # Once for each split of each of the two, although every epoch meets the image again, in whichever worker.
    assert [record.getMessage() for record in caplog.records].count(
        "Unreadable image 1 (at most 1 are skipped): 4.jpg in tiny/train."
    ) == 2
    assert len(caplog.records) == 4


def test_an_error_in_a_worker_process_arrives_as_it_is(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": [b"broken"] * 6, "test": photos})
    dataset = photographs("tiny", str(tmp_path), image_size=16, max_unreadable=3, workers=1)
    with pytest.raises(DataError, match="More than 3 images of tiny/train cannot be read"):
        next(dataset.train(4, seed=0))


def test_a_worker_process_outlasts_a_request_to_end_and_its_loss_is_one_message(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": photos, "test": photos})
    batches = photographs("tiny", str(tmp_path), image_size=16, workers=1).train(4, seed=0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    assert len(list(itertools.islice(batches, 100))) == 100  # many more than lie ready
    assert worker.is_alive()
    worker.kill()
    with pytest.raises(DataError, match=r"a worker that reads images is gone .*exit code -9"):
        take(batches, 100)


ORPHANS = """
import multiprocessing, os, signal, sys
from experiments.data.photographs import photographs

batches = photographs("tiny", sys.argv[1], image_size=16, workers=1).train(4, seed=0)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_worker_processes_end_with_a_run_that_is_killed(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": photos, "test": photos})
    done = run_python("-c", ORPHANS, tmp_path, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (worker,) = done.stdout.split()

    def runs() -> bool:
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    for _ in range(300):
        if not runs():
            return
        time.sleep(0.1)
    pytest.fail("a worker goes on")


def test_training_replaces_an_unreadable_image_by_its_readable_neighbour(make_dataset, photos, tmp_path):
    # Of three images only the last is readable, so it stands for all of them.
    make_dataset("tiny", {"train": [b"broken", photos[0][:300], photos[2]], "test": photos})
    dataset = photographs("tiny", str(tmp_path), image_size=16, max_unreadable=2)
    for batch in take(dataset.train(6, seed=0), 3):
        assert (batch["label"] == 2).all()
        assert batch["mask"].all()


def test_evaluation_masks_an_unreadable_image(make_dataset, photos, tmp_path, caplog):
    make_dataset("tiny", {"train": photos, "test": [photos[0], b"broken", photos[2]]})
    dataset = photographs("tiny", str(tmp_path), image_size=16)
    with caplog.at_level(logging.WARNING):
        (batch,) = dataset.evaluate(4)
        np.testing.assert_array_equal(batch["mask"], [True, False, True, False])
        list(dataset.evaluate(4))
    assert [record.getMessage() for record in caplog.records] == [
        "Unreadable image 1 (at most 100 are skipped): 1.jpg in tiny/test."
    ]


def test_too_many_unreadable_images_are_an_error_that_names_them(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": photos, "test": [b"broken", photos[1], b"broken", photos[3], b"broken"]})
    dataset = photographs("tiny", str(tmp_path), image_size=16, max_unreadable=2)
    with pytest.raises(DataError, match=r"More than 2 images of tiny/test .* among them 0.jpg, 2.jpg, 4.jpg"):
        list(dataset.evaluate(5))


def test_a_dataset_without_one_readable_image_is_an_error(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": [b"broken"] * 2, "test": photos})
    dataset = photographs("tiny", str(tmp_path), image_size=16)
    with pytest.raises(DataError, match="cannot be read"):
        next(dataset.train(2, seed=0))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("imagenet2012", None, "validation"),  # the labels of its test split are not public
        ("imagenet2012_subset/1pct:5.0.0", None, "validation"),
        ("tiny", None, "test"),
        ("imagenet2012", "train[:5%]", "train[:5%]"),
    ],
)
def test_images_to_evaluate_on_are_those_held_out(make_dataset, photos, tmp_path, monkeypatch, name, given, expected):
    make_dataset("tiny", {"train": photos, "test": photos[:10]})
    opened, open_split = [], photographs_module.open_split

    def opening(name, data_dir, split):
        opened.append((name, split))
        return open_split("tiny", data_dir, "train" if split == "train" else "test")

    monkeypatch.setattr(photographs_module, "open_split", opening)
    dataset = photographs(name, str(tmp_path), image_size=16, eval_split=given)
    assert opened == [(name, "train"), (name, expected)]
    assert (dataset.train_size, dataset.eval_size) == (23, 10)


def test_splits_may_be_parts_of_splits(make_dataset, photos, tmp_path):
    make_dataset("tiny", {"train": photos})
    dataset = photographs("tiny", str(tmp_path), image_size=16, eval_split="train[20:]")
    assert (dataset.train_size, dataset.eval_size) == (23, 3)
    (batch,) = dataset.evaluate(3)
    np.testing.assert_array_equal(batch["label"], [2, 0, 1])


def test_real_photographs(data_dir):
    clothes = photographs("clothing_small", data_dir, image_size=64)
    assert (clothes.num_classes, clothes.train_size, clothes.eval_size) == (10, 3068, 372)
    assert sum(batch["mask"].sum() for batch in clothes.evaluate(100)) == 372
    standing_in = photographs("imagenet2012", data_dir, image_size=64)
    assert (standing_in.num_classes, standing_in.train_size, standing_in.eval_size) == (1000, 256, 100)
    assert next(standing_in.train(8, seed=0))["image"].std() > 10
