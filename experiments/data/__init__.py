"""Images for the experiments: deterministic streams of batches whose whole position is a step number."""

from experiments.data.dataset import Batch as Batch
from experiments.data.dataset import DataError as DataError
from experiments.data.dataset import Dataset as Dataset
from experiments.data.in_memory import cifar10 as cifar10
from experiments.data.in_memory import digits as digits
from experiments.data.in_memory import fashion_mnist as fashion_mnist
from experiments.data.photographs import photographs as photographs
