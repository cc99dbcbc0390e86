"""Photographs of many sizes, from any TFDS image-classification dataset, cropped and resized as they are read."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypedDict

import cv2
import grain
import jax
import numpy as np
from absl import flags

from experiments.data import geometry, order
from experiments.data.dataset import Batch, DataError, Dataset
from experiments.data.decoding import UnreadableImage
from experiments.data.geometry import Interpolation
from experiments.data.tfds_source import DataDir, TfdsSplit, open_split

logger = logging.getLogger(__name__)

# Of ImageNet's images as published: on the 0…255 scale, in the order red, green, blue.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class _Damage:
    """The unreadable images of one split, as far as a process has met them."""

    split: TfdsSplit
    limit: int
    seen: set[int] = field(default_factory=set)

    def report(self, indices: np.ndarray) -> None:
        """Logs each image the first time, and raises DataError when there are more of them than the limit."""
        for index in indices.tolist():
            if index in self.seen:
                continue
            self.seen.add(index)
            logger.warning(
                "Unreadable image %d (at most %d are skipped): %s in %s/%s.",
                len(self.seen),
                self.limit,
                self.split.file_name(index),
                self.split.name,
                self.split.split,
            )
        if len(self.seen) > self.limit:
            raise DataError(_too_many_unreadable(self.split, self.seen, self.limit))


def _too_many_unreadable(split: TfdsSplit, indices: set[int], limit: int) -> str:
    names = ", ".join(split.file_name(i) for i in sorted(indices)[:3])
    return (
        f"More than {limit} images of {split.name}/{split.split} cannot be read, among them {names}.\n"
        f"The dataset is damaged: delete its folder and prepare it again, or allow more with a higher limit."
    )


class _RawBatch(TypedDict):
    """A batch as a worker hands it over, with the unreadable images that it came across."""

    batch: Batch
    unreadable: np.ndarray  # int64, indices into the split


@dataclass(frozen=True, kw_only=True)
class PhotographDataset(Dataset):
    """Photographs that are read, decoded and cropped as they are needed; ``photographs`` opens one.

    In training an unreadable image is replaced by its next readable neighbour in the split, which depends on nothing
    but the split. In evaluation its row is masked.

    Attributes:
        train_split: where training images come from.
        eval_split: where evaluation images come from.
        crop_fraction: of the shorter side that evaluation keeps.
        interpolation: of both streams.
        workers: processes that prepare batches; 0 is threads of this process.
        train_damage: unreadable images of the training split.
        eval_damage: unreadable images of the evaluation split.
    """

    train_split: TfdsSplit
    eval_split: TfdsSplit
    crop_fraction: float
    interpolation: Interpolation
    workers: int
    train_damage: _Damage
    eval_damage: _Damage

    def train(
        self, batch_size: int, *, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        rows = order.process_rows(batch_size, process_index, process_count)
        # Workers receive what these functions refer to: plain values, not this object and its record of damage.
        split, size, interpolation, limit = (
            self.train_split,
            self.image_shape[0],
            self.interpolation,
            self.train_damage.limit,
        )

        def batch(step: int, rng: np.random.Generator) -> _RawBatch:
            # Numbers are drawn for the global batch, so that they do not depend on how many processes share it.
            draws = rng.random((batch_size, geometry.DRAWS))[rows].tolist()
            index = order.train_indices(len(split), step, batch_size, rows, seed)
            images = np.empty((len(index), size, size, 3), np.uint8)
            labels = np.empty(len(index), np.int32)
            unreadable: list[int] = []
            examples = split.read(index.tolist())
            for row, example in enumerate(examples):
                candidate = int(index[row])
                failed: set[int] = set()
                while True:
                    try:
                        geometry.train_view(example.image, draws[row], images[row], interpolation)
                        break
                    except UnreadableImage:
                        failed.add(candidate)
                        if len(failed) > limit or len(failed) == len(split):
                            raise DataError(_too_many_unreadable(split, failed, limit)) from None
                        candidate = (candidate + 1) % len(split)
                        (example,) = split.read([candidate])
                labels[row] = example.label
                unreadable += sorted(failed)
            mask = np.ones(len(index), bool)
            return _RawBatch(
                batch=Batch(image=images, label=labels, mask=mask), unreadable=np.asarray(unreadable, np.int64)
            )

        steps = grain.MapDataset.range(sys.maxsize // batch_size).seed(seed).random_map(batch)
        return _iterate(steps[start_step:], self.workers, self.train_damage)

    def evaluate(self, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        rows = order.process_rows(batch_size, process_index, process_count)
        split, size, crop_fraction, interpolation = (
            self.eval_split,
            self.image_shape[0],
            self.crop_fraction,
            self.interpolation,
        )

        def batch(step: int) -> _RawBatch:
            index, mask = order.eval_indices(len(split), step, batch_size, rows)
            images = np.zeros((len(index), size, size, 3), np.uint8)
            labels = np.zeros(len(index), np.int32)
            unreadable: list[int] = []
            (present,) = np.nonzero(mask)
            for row, example in zip(present, split.read(index[present].tolist()), strict=True):
                try:
                    images[row] = geometry.eval_view(example.image, size, crop_fraction, interpolation)
                    labels[row] = example.label
                except UnreadableImage:
                    mask[row] = False
                    unreadable.append(int(index[row]))
            return _RawBatch(
                batch=Batch(image=images, label=labels, mask=mask), unreadable=np.asarray(unreadable, np.int64)
            )

        steps = grain.MapDataset.range(order.eval_steps(len(split), batch_size)).map(batch)
        return _iterate(steps, self.workers, self.eval_damage)


def photographs(
    name: str = "imagenet2012",
    data_dir: DataDir = None,
    *,
    image_size: int = 224,
    crop_fraction: float = 0.875,
    interpolation: Interpolation = "bilinear",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    eval_split: str | None = None,
    workers: int = 0,
    max_unreadable: int = 100,
) -> PhotographDataset:
    """Opens a TFDS image-classification dataset for training on square views of its photographs.

    Training sees a random part of each image, resized and mirrored at random; evaluation sees the middle.

    Args:
        name: of the dataset in TFDS, or of its folder in ``data_dir``.
        data_dir: the TFDS data directory; None is TFDS's own default.
        image_size: pixels of the square's side.
        crop_fraction: of the shorter side that evaluation keeps, ``0 < crop_fraction ≤ 1``.
        interpolation: of both streams.
        mean: per channel, on the 0…255 scale, for the caller to normalise with.
        std: per channel, on the 0…255 scale, for the caller to normalise with.
        eval_split: in TFDS's notation; None is ``validation`` for imagenet2012 and what is made of it, whose test
            labels are not public, and ``test`` for others.
        workers: processes that prepare batches; 0 is threads of this process. The batches are the same. Each worker
            holds up to two batches of this process's rows, in shared memory.
        max_unreadable: images of a split that may be skipped, in each process of a job, before it is an error.

    Raises:
        DataError: the dataset or a split is not there, not complete, or not for image classification.
    """
    train = open_split(name, data_dir, "train")
    held_out = open_split(name, data_dir, eval_split or ("validation" if name.startswith("imagenet2012") else "test"))
    return PhotographDataset(
        name=name,
        num_classes=train.num_classes,
        train_size=len(train),
        eval_size=len(held_out),
        image_shape=(image_size, image_size, 3),
        mean=mean,
        std=std,
        train_split=train,
        eval_split=held_out,
        crop_fraction=crop_fraction,
        interpolation=interpolation,
        workers=workers,
        train_damage=_Damage(train, max_unreadable),
        eval_damage=_Damage(held_out, max_unreadable),
    )


def is_imagenet(name: str) -> bool:
    """Whether a dataset in TFDS's notation, with or without configuration and version, is ImageNet of 2012."""
    return re.split("[/:]", name)[0] == "imagenet2012"


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_worker(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    # A request to end may be sent to all processes of a group: a run saves its state then, and needs its images for it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Were anything in a worker to touch JAX, it must not take the accelerator away from the process that trains.
    jax.config.update("jax_platforms", "cpu")
    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    """Ends a worker whose run was killed: it would wait for ever, and keep its memory."""
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _iterate(batches: grain.MapDataset, workers: int, damage: _Damage) -> Iterator[Batch]:
    # Batches are made side by side, one to a thread or process; OpenCV's own threads would only contend with these.
    cv2.setNumThreads(1)
    workers = min(workers, len(batches))  # each takes seconds to start
    if workers:
        # Grain's settings are absl flags, which it refuses to read before somebody has parsed a command line with absl.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        iterator = iter(stream.mp_prefetch(options, worker_init_fn=_prepare_worker))
    else:
        threads = usable_cores()
        iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))
    try:
        for raw in iterator:
            damage.report(raw["unreadable"])
            yield raw["batch"]
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise DataError(
            f"a worker that reads images is gone ({error}): -7 says that /dev/shm is full, as in a container started "
            "without --shm-size, -9 that memory was; give it more of that, or run with fewer --workers"
        ) from error
    finally:
        iterator.close()
