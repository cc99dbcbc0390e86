"""The options of the ImageNet command, and what they are for each network if not given."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.chips import COMPILE_TIMEOUT
from experiments.config import Config, LtpConfig, TrainConfig
from experiments.options import ConfigError, require, require_local
from ltp_jax import models, pretrained
from ltp_jax.pretrained import WeightSettings

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

IMAGENET_TRAIN_SIZE = 1_281_167


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetTrainConfig(TrainConfig):
    """Training of the weights: SGD with momentum, warm-up, and a cosine to zero."""

    # Work for 4 to 32 chips, and well below the 8,192 up to which a learning rate in proportion to the batch is known
    # to cost no accuracy (Goyal et al., arXiv 1706.02677).
    batch_size: int = 1024
    """Images per step, over all devices."""
    learning_rate: float
    """The highest learning rate of the weights for 256 images a step; it is scaled in proportion to the batch."""

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate * self.batch_size / 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetConfig(Config):
    """ImageNet, or any image-classification dataset of TFDS."""

    arch: Arch = "resnet50"
    workdir: Path = Path("runs/imagenet")
    """Where the run writes: trail/, resume/, dense/, report/, config.json, metrics.jsonl, log.txt. Hosts share it."""
    dataset: str = "imagenet2012"
    """The dataset's name in TFDS."""
    eval_split: str | None = None
    """The held-out split; validation for imagenet2012 and test for others if not given."""
    pretrained: Path | None = None
    """Weights of torchvision or timm: a state dict in safetensors, .npz, or as torch.save writes it."""
    origin: str | None = None
    """Whose weights they are, such as torchvision-v2; if not given, seen from the file, or from the run of
    --dense."""
    image_size: int | None = None
    """Side of the images in pixels; that of the weights if not given."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of activations and products; auto is bfloat16 on accelerators and float32 on the CPU."""
    workers: int | None = None
    """Processes that prepare images for each process of the job, 0 for threads; if not given, all its cores but one,
    divided by the processes of the job that have the same cores."""
    max_unreadable: int = 100
    """Images of a split that may be skipped because they cannot be read."""
    dry_run: bool = False
    """Tell what the run would do and cost, without data or accelerator, and stop."""
    topology: str | None = None
    """With --dry-run: compile the training step, and what it begins with, for this TPU slice, such as v5e:4x4."""
    dry_run_timeout: float = COMPILE_TIMEOUT
    """With --topology: seconds that each compilation may take."""
    from_scratch: bool = False
    """Train the dense network from a random start instead of taking pretrained weights."""
    pretrain: ImagenetTrainConfig
    """Training of the dense network, from scratch or with a new head."""
    train: ImagenetTrainConfig
    """Training while pruning."""

    def check(self) -> None:
        super().check()
        require_local(self, "pretrained")
        if self.topology is not None and not self.dry_run:
            raise ConfigError("--topology compiles for a TPU that is not here; it goes with --dry-run")
        if self.dry_run_timeout != COMPILE_TIMEOUT and self.topology is None:
            raise ConfigError("--dry-run-timeout is that of a compilation; it goes with --topology")
        smallest = max(32, models.spec(self.arch).min_size)
        if self.image_size is not None and self.image_size < smallest:
            raise ConfigError(f"--image-size is {self.image_size}; accepted is at least {smallest} for {self.arch}")
        require(self.workers is None or self.workers >= 0, "--workers", self.workers, "0 or more")
        require(self.max_unreadable >= 0, "--max-unreadable", self.max_unreadable, "0 or more")
        require(self.dry_run_timeout > 0, "--dry-run-timeout", self.dry_run_timeout, "more than 0")
        if not self.dry_run and self.pretrained is None and self.dense is None and not self.from_scratch:
            raise ConfigError(where_weights_come_from(self.arch))
        ways = {
            "--dense": self.dense is not None,
            "--pretrained": self.pretrained is not None,
            "--from-scratch": self.from_scratch,
        }
        if len(given := [way for way, taken in ways.items() if taken]) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other; accepted is one of them")


WHERE_WEIGHTS_COME_FROM = """\
--pretrained is missing: LTP starts from a trained network. Where {library} and safetensors are installed, save one so:
  import safetensors.torch, {library}
  model = {model}
  safetensors.torch.save_file(model.state_dict(), "{file}")
and give --pretrained={file}: its name tells whose weights they are.
{others}A downloaded .pth file under its own name will do as well; --dense takes the dense/ directory of an
earlier run; --from-scratch trains the dense network first."""


def where_weights_come_from(arch: Arch) -> str:
    """How to save weights of a network, those assumed by default first."""

    def model(row: WeightSettings) -> str:
        if row.naming == "torchvision":
            return f'torchvision.models.get_model("{row.network}", weights="{row.release}")'
        return f'timm.create_model("{row.release}", pretrained=True)'

    def file(row: WeightSettings) -> str:
        return f"{arch}-{row.digest or row.origin}.safetensors"

    first, *rest = (row for row in pretrained.settings(arch) if row.naming in ("torchvision", "timm"))
    others = "".join(
        f"  {model(row)}: {file(row)}{'' if row.digest else f', with --origin={row.origin}'}\n" for row in rest
    )
    return WHERE_WEIGHTS_COME_FROM.format(
        library=first.naming,
        model=model(first),
        file=file(first),
        others=f"Other weights of it, and the name to save them under:\n{others}" if others else "",
    )


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
            train=ImagenetTrainConfig(
                epochs=30,  # the paper's length for ResNet-50
                learning_rate=self.learning_rate,
                warmup_epochs=1,  # momentum is built up before pruning begins in earnest
                weight_decay=self.weight_decay,
                label_smoothing=self.label_smoothing,
            ),
            # Neither λ nor a rate of the thresholds is a setting here: to a target, λ is what the planned density makes
            # of it at each step, and thresholds move in units of their own, at one rate for all networks.
            ltp=LtpConfig(
                target_compression=target,
                prune=0.5,  # 15 epochs to descend: early enough to recover, late enough to see which weights matter
                select=0.75,  # the freeze point: until then what was pruned may come back, then the network recovers
            ),
        )


# None of these was run on ImageNet by us: rates and decays are those of the networks' own training recipes, reduced to
# what continues a trained network. docs/measured.md says what was measured.
RESNET = Recipe(
    learning_rate=0.02,  # a fifth of the 0.1 that trains it from scratch
    weight_decay=5e-5,  # half of the dense recipe's: a network with a tenth of the weights fits less of the noise
    label_smoothing=0.1,  # as in the recipes that reach the best top-1 at 90 % sparsity
    pretrain=ImagenetTrainConfig(
        epochs=90,  # the usual length for these networks
        learning_rate=0.1,  # as they were first trained, with 256 images a step
        warmup_epochs=5,  # what large batches take at this rate, by Goyal et al.
        weight_decay=1e-4,  # as they were first trained
        label_smoothing=0.1,  # so that pruning goes on with the loss that the network was trained by
    ),
)
MOBILE = Recipe(
    learning_rate=0.01,  # each channel has few weights, so what is pruned must be taken over by fewer
    weight_decay=1e-5,  # as in the recipes of these networks; depthwise kernels do not bear more
    label_smoothing=0.1,  # they were trained with it
    pretrain=ImagenetTrainConfig(
        epochs=180,  # small networks learn for longer than large ones before they stop gaining
        learning_rate=0.1,  # SGD's usual rate with batch normalisation; the RMSProp of their papers has another
        warmup_epochs=5,  # as above
        weight_decay=4e-5,  # MobileNetV2's own
        label_smoothing=0.1,  # as they were first trained
    ),
)
ALEXNET = Recipe(
    learning_rate=0.0025,  # a quarter of the 0.01 that trains it: without batch normalisation it bears no more
    weight_decay=1e-4,  # a fifth of the dense recipe's, since pruning regularises its large dense layers already
    label_smoothing=0.0,  # it underfits ImageNet
    pretrain=ImagenetTrainConfig(
        epochs=90,  # Krizhevsky's
        learning_rate=0.01,  # Krizhevsky's, a tenth of what batch normalisation allows
        warmup_epochs=5,  # as above
        weight_decay=5e-4,  # Krizhevsky's
        label_smoothing=0.0,  # it underfits ImageNet
    ),
)

# Targets lie a little past the paper's compression where it gives one. The trail leads there from the dense network,
# so every milder compression is on it. The small networks, of which no figure is at hand, have less to spare.
RECIPES: dict[Arch, tuple[Recipe, float]] = {
    "resnet50": (RESNET, 10.0),  # paper: 9.1×
    "alexnet": (ALEXNET, 28.0),  # paper: 26.4×
    "mobilenet_v2": (MOBILE, 4.0),
    "efficientnet_b0": (MOBILE, 4.0),
    "mixnet_s": (MOBILE, 4.0),
    "efficientnet_lite0": (MOBILE, 4.0),
    "resnet18": (RESNET, 10.0),
    "resnet34": (RESNET, 10.0),
    "resnet101": (RESNET, 10.0),
    "resnet152": (RESNET, 10.0),
    "mobilenet_v2_050": (MOBILE, 4.0),
    "mobilenet_v2_140": (MOBILE, 4.0),
    "efficientnet_b1": (MOBILE, 4.0),
    "efficientnet_b2": (MOBILE, 4.0),
    "efficientnet_b3": (MOBILE, 4.0),
    "efficientnet_b4": (MOBILE, 4.0),
    "mixnet_m": (MOBILE, 4.0),
    "mixnet_l": (MOBILE, 4.0),
}
"""Of each network, the first of which is the default."""

PRESETS: dict[str, ImagenetConfig] = {arch: recipe.preset(arch, target) for arch, (recipe, target) in RECIPES.items()}
