"""AlexNet in its one-tower form (Krizhevsky, *One weird trick*, arXiv 1404.5997), as torchvision has it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ltp_jax.models.layers import Conv, max_pool
from ltp_jax.models.spec import NetworkSpec

_GRID = 6  # the dense layers expect this many pixels a side


def _resize_by_averaging(x: jax.Array, size: int) -> jax.Array:
    """Means over ``size x size`` windows that tile, and where need be overlap on, the image."""
    for axis in (1, 2):
        length = x.shape[axis]
        if length == size:
            continue
        weights = np.zeros((length, size), np.float32)
        for i in range(size):
            start, stop = i * length // size, -(-(i + 1) * length // size)
            weights[start:stop, i] = 1 / (stop - start)
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(weights, x.dtype), (axis, 0)), -1, axis)
    return x


class AlexNet(nn.Module):
    """Five convolutions and three dense layers; no batch normalisation, hence no batch statistics.

    Maps float ``[N, 224, 224, 3]`` to float32 logits ``[N, num_classes]``. Other sizes from 63 pixels on are averaged
    to the grid that the dense layers expect. Dropout needs the ``dropout`` stream while training.
    """

    num_classes: int
    dropout_rate: float = 0.5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        layers = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
        for index, (features, kernel, strides, padding) in enumerate(layers, start=1):
            x = nn.relu(
                Conv(features, kernel, strides, padding, use_bias=True, dtype=self.dtype, name=f"conv{index}")(x)
            )
            if index in (1, 2, 5):
                x = max_pool(x, 3, 2)
        x = _resize_by_averaging(x, _GRID)
        x = x.reshape(x.shape[0], -1)
        for index in (1, 2):
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            x = nn.relu(nn.Dense(4096, dtype=self.dtype, name=f"dense{index}")(x))
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))


NETWORKS = (NetworkSpec("alexnet", AlexNet, {}, 224, 61_100_840, min_size=63),)
