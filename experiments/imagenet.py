"""Prunes the networks of the paper on ImageNet, or on any image-classification dataset of TFDS.

python -m experiments.imagenet --arch=resnet50 --pretrained=resnet50-0676ba61.pth --data-dir=/data/tfds
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import dry_run
from experiments.config import parse
from experiments.data.dataset import DataError
from experiments.data.photographs import is_imagenet, photographs, usable_cores
from experiments.data.tfds_source import open_split
from experiments.distributed import initialize, sharers_of_cores
from experiments.ending import require_device, run_command
from experiments.imagenet_config import IMAGENET_TRAIN_SIZE, PRESETS, ImagenetConfig
from experiments.imagenet_weights import dense_settings, planned_settings, read_weights, start_from
from experiments.run import run, trains_dense
from ltp_jax import models
from ltp_jax.pretrained import WeightSettings


def make_module(config: ImagenetConfig, settings: WeightSettings, num_classes: int) -> nn.Module:
    """The network in the form that the weights want, in the compute dtype of the options."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if config.topology is not None or jax.default_backend() != "cpu" else "float32"
    return models.create(config.arch, num_classes=num_classes, dtype=jnp.dtype(dtype), **settings.options)


def dry_run_counts(config: ImagenetConfig) -> tuple[int, int, str | None]:
    """Images of an epoch and classes, and what to say if they are ImageNet's for want of the dataset that is named."""
    images, classes = IMAGENET_TRAIN_SIZE, models.spec(config.arch).num_classes
    if is_imagenet(config.dataset):
        return images, classes, None
    try:
        split = open_split(config.dataset, config.data_dir, "train")
    except DataError as error:
        reason = str(error).splitlines()[0]
        return images, classes, f"{reason} ImageNet's {images:,} images and {classes:,} classes are assumed above."
    return len(split), split.num_classes, None


def main() -> None:
    config = parse(PRESETS, "Learned Threshold Pruning on ImageNet or any image-classification dataset of TFDS.")
    if config.dry_run:
        if config.topology is None:
            require_device()
        settings = planned_settings(config)
        train_size, num_classes, note = dry_run_counts(config)
        new_head = num_classes != models.spec(config.arch).num_classes
        to_train = trains_dense(config, trained=not (config.from_scratch or new_head))
        dry_run.report(
            config,
            make_module(config, settings, num_classes),
            image_size=config.image_size or settings.input_size,
            train_size=train_size,
            pretrains=to_train,
        )
        if note:
            print(note)
        return
    initialize(config.distributed)
    sharers = sharers_of_cores()  # of every process, whatever its options: they ask each other
    # Read before the data are opened: which weights these are decides what the images must look like.
    weights = None if config.pretrained is None else read_weights(config.pretrained, config)
    settings = dense_settings(config) if weights is None else weights.settings
    # Recorded with the run, so that its own dense network can be taken by another.
    config = dataclasses.replace(config, origin=settings.origin)
    dataset = photographs(
        config.dataset,
        config.data_dir,
        image_size=config.image_size or settings.input_size,
        crop_fraction=settings.crop_fraction,
        interpolation=settings.interpolation,
        mean=tuple(255 * value for value in settings.mean),
        std=tuple(255 * value for value in settings.std),
        eval_split=config.eval_split,
        workers=max(usable_cores() // sharers - 1, 1) if config.workers is None else config.workers,
        max_unreadable=config.max_unreadable,
    )
    module = make_module(config, settings, dataset.num_classes)
    run(config, module, dataset, None if weights is None else start_from(weights, config, dataset))


if __name__ == "__main__":
    run_command(main)
