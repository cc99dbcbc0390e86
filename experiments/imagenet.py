"""Prunes the networks of the paper on ImageNet, or on any image-classification dataset of TFDS.

python -m experiments.imagenet --arch=resnet50 --pretrained=resnet50.safetensors --data-dir=/data/tfds
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import dry_run
from experiments.config import Config, ConfigError, LtpConfig, TrainConfig, parse
from experiments.console import run_command
from experiments.data import Dataset, photographs
from experiments.distributed import initialize
from experiments.run import Start, run
from ltp_jax import models, pretrained
from ltp_jax.pretrained import PretrainedError, WeightSettings

Arch = Literal[
    "alexnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "mobilenet_v2",
    "mobilenet_v2_050",
    "mobilenet_v2_140",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_lite0",
    "mixnet_s",
    "mixnet_m",
    "mixnet_l",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetTrainConfig(TrainConfig):
    """Training of the weights: SGD with momentum, warm-up, and a cosine to zero."""

    batch_size: int = 1024
    """Images per step, over all devices."""
    learning_rate: float
    """The highest learning rate of the weights for 256 images a step; it is scaled in proportion to the batch."""

    def scaled(self) -> TrainConfig:
        """The same with the learning rate for its own batch size."""
        return dataclasses.replace(self, learning_rate=self.learning_rate * self.batch_size / 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneTrainConfig(ImagenetTrainConfig):
    """Training while pruning: SGD with momentum, warm-up, and a cosine to zero."""

    from_scratch: bool = False
    """Train the dense network from a random start instead of taking pretrained weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetConfig(Config):
    """ImageNet, or any image-classification dataset of TFDS."""

    arch: Arch = "resnet50"
    """The network."""
    workdir: Path = Path("runs/imagenet")
    """Where the run writes: trail/, resume/, dense/, report/, config.json, metrics.jsonl, log.txt. Hosts share it."""
    dataset: str = "imagenet2012"
    """The dataset's name in TFDS."""
    eval_split: str | None = None
    """The held-out split; validation for imagenet2012 and test for others if nothing is said."""
    pretrained: Path | None = None
    """Weights of torchvision or timm: a state dict in safetensors, .npz, or as torch.save writes it."""
    origin: str | None = None
    """Whose weights they are, such as torchvision-v2; seen from the file, or from the run of --dense, if nothing is
    said."""
    image_size: int | None = None
    """Side of the images in pixels; that of the weights if nothing is said."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of activations and products; auto is bfloat16 on accelerators and float32 on the CPU."""
    workers: int | None = None
    """Processes of each host that prepare images, 0 for threads; all its cores but one if nothing is said."""
    max_unreadable: int = 100
    """Images of a split that may be skipped because they cannot be read."""
    dry_run: bool = False
    """Tell what the run would do and cost, without data or accelerator, and stop."""
    topology: str | None = None
    """With --dry-run: compile the training step for this TPU slice, such as v5e:4x4."""
    pretrain: ImagenetTrainConfig
    """Training of the dense network, from scratch or with a new head."""
    train: PruneTrainConfig
    """Training while pruning."""

    def check(self) -> None:
        super().check()
        if self.topology is not None and not self.dry_run:
            raise ConfigError("--topology compiles for a TPU that is not here; it goes with --dry-run")
        if self.image_size is not None and self.image_size < 32:
            raise ConfigError(f"--image-size is {self.image_size}; accepted is at least 32")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"--workers is {self.workers}; accepted is 0 or more")
        if not self.dry_run and self.pretrained is None and self.dense is None and not self.train.from_scratch:
            raise ConfigError(WHERE_WEIGHTS_COME_FROM.format(arch=self.arch))
        if self.pretrained is not None and self.train.from_scratch:
            raise ConfigError("--pretrained and --train.from-scratch exclude each other")


WHERE_WEIGHTS_COME_FROM = """\
--pretrained is missing: LTP starts from a trained network. Where torch is installed, save one so:
  import safetensors.torch, timm, torchvision
  model = torchvision.models.get_model({arch!r}, weights="DEFAULT")   # or timm.create_model({arch!r}, pretrained=True)
  safetensors.torch.save_file(model.state_dict(), "{arch}.safetensors")
and give --pretrained={arch}.safetensors. (A downloaded .pth file will do as well; --dense takes the dense/ directory
of an earlier run; --train.from-scratch trains the dense network first.)"""


class Recipe(NamedTuple):
    """What the members of a family have in common; learning rates are for 256 images a step."""

    learning_rate: float
    weight_decay: float
    label_smoothing: float
    pretrain: ImagenetTrainConfig

    def preset(self, arch: Arch, target: float) -> ImagenetConfig:
        return ImagenetConfig(
            arch=arch,
            workdir=Path("runs/imagenet") / arch,
            pretrain=self.pretrain,
            train=PruneTrainConfig(
                epochs=30,  # the paper's length for ResNet-50
                learning_rate=self.learning_rate,
                warmup_epochs=1,  # momentum is built up before pruning begins in earnest
                weight_decay=self.weight_decay,
                label_smoothing=self.label_smoothing,
            ),
            ltp=LtpConfig(target_compression=target),
        )


# None of these was run on ImageNet by us: rates and decays are those of the networks' own training recipes, reduced to
# what continues a trained network. The README says what was measured.
RESNET = Recipe(
    learning_rate=0.02,  # a fifth of the 0.1 that trains it from scratch
    weight_decay=5e-5,  # half of the dense recipe's: a network with a tenth of the weights fits less of the noise
    label_smoothing=0.1,  # as in the recipes that reach the best top-1 at 90 % sparsity
    pretrain=ImagenetTrainConfig(epochs=90, learning_rate=0.1, warmup_epochs=5, weight_decay=1e-4, label_smoothing=0.1),
)
MOBILE = Recipe(
    learning_rate=0.01,  # each channel has few weights, so what is pruned must be taken over by fewer
    weight_decay=1e-5,  # as in the recipes of these networks; depthwise kernels do not bear more
    label_smoothing=0.1,  # they were trained with it
    pretrain=ImagenetTrainConfig(
        epochs=180, learning_rate=0.1, warmup_epochs=5, weight_decay=4e-5, label_smoothing=0.1
    ),
)
ALEXNET = Recipe(
    learning_rate=0.0025,  # a quarter of the 0.01 that trains it: without batch normalisation it bears no more
    weight_decay=1e-4,  # a fifth of the dense recipe's, since pruning regularises its large dense layers already
    label_smoothing=0.0,  # it underfits ImageNet
    pretrain=ImagenetTrainConfig(epochs=90, learning_rate=0.01, warmup_epochs=5, weight_decay=5e-4),
)

# Targets lie a little past the paper's compression where it gives one. The trail leads there from the dense network,
# so every milder compression is on it.
PRESETS: dict[str, ImagenetConfig] = {
    "resnet50": RESNET.preset("resnet50", 10.0),  # paper: 9.1×
    "alexnet": ALEXNET.preset("alexnet", 28.0),  # paper: 26.4×
    "mobilenet_v2": MOBILE.preset("mobilenet_v2", 4.0),
    "efficientnet_b0": MOBILE.preset("efficientnet_b0", 4.0),
    "mixnet_s": MOBILE.preset("mixnet_s", 4.0),
    "efficientnet_lite0": MOBILE.preset("efficientnet_lite0", 4.0),
    "resnet18": RESNET.preset("resnet18", 10.0),
    "resnet34": RESNET.preset("resnet34", 10.0),
    "resnet101": RESNET.preset("resnet101", 10.0),
    "resnet152": RESNET.preset("resnet152", 10.0),
    "mobilenet_v2_050": MOBILE.preset("mobilenet_v2_050", 4.0),
    "mobilenet_v2_140": MOBILE.preset("mobilenet_v2_140", 4.0),
    "efficientnet_b1": MOBILE.preset("efficientnet_b1", 4.0),
    "efficientnet_b2": MOBILE.preset("efficientnet_b2", 4.0),
    "efficientnet_b3": MOBILE.preset("efficientnet_b3", 4.0),
    "efficientnet_b4": MOBILE.preset("efficientnet_b4", 4.0),
    "mixnet_m": MOBILE.preset("mixnet_m", 4.0),
    "mixnet_l": MOBILE.preset("mixnet_l", 4.0),
}


def weight_settings(config: ImagenetConfig) -> WeightSettings:
    """The settings of the weights that the options name, before the weights are read: the most likely ones.

    Raises:
      ConfigError: if no published weights of the network have that origin.
    """
    rows = pretrained.settings(config.arch)
    for row in rows:
        if config.origin is None or row.origin == config.origin:
            return row
    origins = ", ".join(row.origin for row in rows)
    raise ConfigError(f"--origin is {config.origin}; accepted for {config.arch} are {origins}")


def dense_settings(config: ImagenetConfig) -> WeightSettings:
    """The settings of a run without ``--pretrained``: those of the run that ``--dense`` is from.

    Raises:
      ConfigError: if several sorts of weights exist and nothing says which these are.
    """
    rows = pretrained.settings(config.arch)
    if config.dense is None or config.origin is not None or len(rows) == 1:
        return weight_settings(config)
    path = config.dense.parent / "config.json"
    try:
        origin = json.loads(path.read_text())["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        origin = None
    if origin is None:
        raise ConfigError(
            f"--origin is missing: {path} does not say whose weights --dense began from, and so what images they want; "
            f"accepted for {config.arch} are {', '.join(row.origin for row in rows)}"
        )
    return weight_settings(dataclasses.replace(config, origin=origin))


def make_module(config: ImagenetConfig, settings: WeightSettings, num_classes: int) -> nn.Module:
    """The network in the form that the weights want, in the compute dtype of the options."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if config.topology is not None or jax.default_backend() != "cpu" else "float32"
    return models.create(config.arch, num_classes=num_classes, dtype=jnp.dtype(dtype), **settings.options)


def main() -> None:
    config = parse(PRESETS, "Learned Threshold Pruning on ImageNet or any image-classification dataset of TFDS.")
    config = dataclasses.replace(config, pretrain=config.pretrain.scaled(), train=config.train.scaled())
    if config.dry_run:
        settings = weight_settings(config)
        module = make_module(config, settings, models.spec(config.arch).num_classes)
        dry_run.report(config, module, image_size=config.image_size or settings.input_size)
        return
    initialize(config.distributed)
    if config.pretrained is None:
        settings, load = dense_settings(config), None
    else:
        # Read before the data are opened: which weights these are decides what the images must look like.
        settings, load = read_pretrained(config)
    # Recorded with the run, so that its own dense network can be taken by another.
    config = dataclasses.replace(config, origin=settings.origin)
    mean, std = ([255 * value for value in values] for values in (settings.mean, settings.std))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    dataset = photographs(
        config.dataset,
        config.data_dir,
        image_size=config.image_size or settings.input_size,
        crop_fraction=settings.crop_fraction,
        interpolation=settings.interpolation,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        eval_split=config.eval_split,
        workers=max(cores - 1, 1) if config.workers is None else config.workers,
        max_unreadable=config.max_unreadable,
    )
    module = make_module(config, settings, dataset.num_classes)
    run(config, module, dataset, None if load is None else lambda: load(dataset))


def read_pretrained(config: ImagenetConfig) -> tuple[WeightSettings, Callable[[Dataset], Start]]:
    """Reads ``--pretrained``: the settings of its weights, and what a run on a dataset begins from.

    A dataset with another number of classes than the weights gets a new head, and training before it is pruned.

    Raises:
      ConfigError: if the file is not there, cannot be read, or is not of this network.
    """
    assert config.pretrained is not None
    try:
        variables, settings = pretrained.load(config.pretrained, config.arch, origin=config.origin)
    except (PretrainedError, ValueError) as error:
        raise ConfigError(f"--pretrained: {error}") from error

    def load(dataset: Dataset) -> Start:
        classes = models.spec(config.arch).num_classes
        if dataset.num_classes == classes:
            published = dataset.name == "imagenet2012" and config.image_size in (None, settings.input_size)
            return Start(variables["params"], variables["batch_stats"], True, settings.top1 if published else None)
        fresh, _ = pretrained.load(
            config.pretrained or "",
            config.arch,
            origin=config.origin,
            num_classes=dataset.num_classes,
            head_key=jax.random.key(config.seed),
        )
        return Start(fresh["params"], fresh["batch_stats"], False)

    return settings, load


if __name__ == "__main__":
    run_command(main)
