"""The rule that fills networks and images with numbers, the same with PyTorch and without."""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
NUM_CLASSES = 1000

_LAST_OF_BOTTLENECK = re.compile(r"layer\d\.\d+\.bn3\.weight")


def fill_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers for the tensor ``name`` of a state dict, scaled so that activations neither grow nor vanish."""
    # RandomState, because NumPy promises that its stream never changes.
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    kind = name.rsplit(".", 1)[-1]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if kind == "running_var":
        return 1 + 0.2 * np.abs(noise)
    if kind in ("running_mean", "bias"):
        return 0.1 * noise
    if len(shape) == 1:
        # Small residual branches: with large ones even PyTorch's own float32 misses the first gradient of a deep
        # network in training by per cents.
        return (1 + 0.1 * noise) * np.float32(0.2 if _LAST_OF_BOTTLENECK.fullmatch(name) else 1)
    return noise * np.float32(math.sqrt(2 / math.prod(shape[1:])))


def fill_state_dict(fixture: str) -> dict[str, np.ndarray]:
    """The state dict of the network that a file of ``fixtures`` is of, under the names and in the layout of PyTorch."""
    shapes = json.loads(np.load(FIXTURES / f"{fixture}.npz")["tensors"].tobytes())
    return {name: fill_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def fill_images(batch: int, size: int) -> np.ndarray:
    """Float32 images ``[batch, size, size, 3]``."""
    return np.random.RandomState(20).standard_normal((batch, size, size, 3)).astype(np.float32)


def fill_labels(batch: int) -> np.ndarray:
    """Int32 labels ``[batch]``."""
    return (37 * np.arange(batch) % NUM_CLASSES).astype(np.int32)


def sample(values: np.ndarray, count: int = 128) -> np.ndarray:
    """Evenly spaced elements of an array, few enough to keep in a fixture."""
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // count)][:count]
