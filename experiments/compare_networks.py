"""The networks on which methods are compared, and how they are trained there."""

from collections.abc import Callable
from typing import NamedTuple

from experiments.config import TrainConfig
from experiments.data.in_memory import InMemoryDataset
from experiments.data.tfds_in_memory import cifar10, fashion_mnist
from experiments.data.tfds_source import DataDir

HELD_OUT = 10_000  # training images that settings are judged on


class Setup(NamedTuple):
    """How methods are compared on a network.

    Attributes:
      load: its dataset; the function has the name of the dataset.
      pretrain: how it is trained before it is pruned.
      train: and while it is.
      compressions: those of the grid.
      tuning_compressions: those that settings are judged at, by the mean over them.
    """

    load: Callable[[DataDir], InMemoryDataset]
    pretrain: TrainConfig
    train: TrainConfig
    compressions: tuple[float, ...] = (8, 16, 32, 64, 128)
    tuning_compressions: tuple[int, ...] = (32,)


NETWORKS = {
    "lenet_300_100": Setup(
        fashion_mnist,
        TrainConfig(epochs=15, batch_size=128, learning_rate=0.05, weight_decay=5e-4),
        TrainConfig(epochs=10, batch_size=128, learning_rate=0.1, weight_decay=5e-4),
        tuning_compressions=(32, 128),
    ),
    "lenet5": Setup(
        fashion_mnist,
        TrainConfig(epochs=6, batch_size=128, learning_rate=0.02, warmup_epochs=1, weight_decay=5e-4),
        TrainConfig(epochs=5, batch_size=128, learning_rate=0.02, weight_decay=5e-4),
    ),
    "resnet20": Setup(
        cifar10,
        # Three core-minutes an epoch: as much as a grid of runs can have, and far from convergence.
        TrainConfig(epochs=5, batch_size=128, learning_rate=0.1, warmup_epochs=1, weight_decay=5e-4),
        TrainConfig(epochs=3, batch_size=128, learning_rate=0.05, weight_decay=5e-4),
        compressions=(5, 10, 20),
        tuning_compressions=(20,),
    ),
}
