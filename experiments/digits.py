"""Prunes a small convolutional network on the handwritten digits that come with scikit-learn.

python -m experiments.digits
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.config import Config, LtpConfig, TrainConfig, parse
from experiments.data.digits import digits
from experiments.distributed import initialize
from experiments.ending import run_command
from experiments.options import ConfigError
from experiments.run import run
from ltp_jax import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig(Config):
    """Handwritten digits, 8×8 pixels, from scikit-learn."""

    arch: Literal["digits"] = "digits"
    workdir: Path = Path("runs/digits")
    pretrain: TrainConfig = TrainConfig(epochs=20, batch_size=64, learning_rate=0.1, warmup_epochs=1, weight_decay=5e-4)
    train: TrainConfig = TrainConfig(epochs=30, batch_size=64, learning_rate=0.05, warmup_epochs=1)
    ltp: LtpConfig = LtpConfig(target_compression=16.0)

    def check(self) -> None:
        super().check()
        if self.data_dir is not None:
            raise ConfigError("--data-dir would do nothing: the digits come with scikit-learn")


def main() -> None:
    config = parse({"digits": DigitsConfig()}, "Learned Threshold Pruning on scikit-learn's handwritten digits.")
    initialize(config.distributed)
    dataset = digits()
    run(config, models.create(config.arch, num_classes=dataset.num_classes), dataset)


if __name__ == "__main__":
    run_command(main)
