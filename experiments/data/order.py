"""Which examples a step takes: a function of seed and step, the same for any number of processes."""

import functools

import numpy as np

from experiments.data.dataset import DataError


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that process ``process_index`` holds: contiguous, as a sharded array lays them out.

    Raises:
        DataError: ``process_count`` does not divide ``batch_size``.
    """
    if batch_size < 1 or batch_size % process_count:
        raise DataError(
            f"The batch size counts the examples of all processes and must be a positive multiple of their number:\n"
            f"batch size {batch_size}, processes {process_count}."
        )
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def train_indices(size: int, step: int, batch_size: int, rows: slice, seed: int) -> np.ndarray:
    """The examples in some rows of a global training batch.

    Batches follow one another through an endless series of epochs, each a permutation of its own of all examples; a
    batch may straddle two.

    Returns:
        int64 ``[rows]``, each in ``0 … size − 1``.
    """
    epoch, position = np.divmod(step * batch_size + np.arange(batch_size)[rows], size)
    index = np.empty(len(epoch), np.int64)
    for e in range(epoch[0], epoch[-1] + 1):
        index[epoch == e] = _permutation(size, e, seed)[position[epoch == e]]
    return index


# Grain's own shuffle maps one index at a time, in about 13 µs; for small images that is most of a batch's cost. A whole
# permutation takes 10 ns an example. The cache holds both epochs of a straddling batch, for two streams.
@functools.lru_cache(maxsize=4)
def _permutation(size: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def eval_indices(size: int, step: int, batch_size: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """The examples in some rows of a global evaluation batch, in the order of the split.

    Returns:
        int64 ``[rows]``, each in ``0 … size − 1``, and bool ``[rows]``, False where a row is padding.
    """
    index = step * batch_size + np.arange(batch_size)[rows]
    mask = index < size
    return np.where(mask, index, 0), mask


def eval_steps(size: int, batch_size: int) -> int:
    """Batches in one pass over ``size`` examples, the last of which may be padded."""
    return -(-size // batch_size)
