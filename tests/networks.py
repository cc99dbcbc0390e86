"""Networks and data that several tests use."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class LinenNet(nn.Module):
    """A convolution, batch normalisation, a depthwise convolution and a dense head, in Linen."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """The same network in NNX, with the same module names."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.depthwise(x).mean((1, 2)))


THREE_LAYERS = {"one/kernel": (16, 40), "two/kernel": (40, 24), "head/kernel": (24, 4)}
"""The kernels of a network without convolutions, 1,696 weights."""


def three_layers(seed=0):
    """Its parameters, random kernels and biases of zero."""
    keys = jax.random.split(jax.random.key(seed), len(THREE_LAYERS))
    params = {}
    for key, (path, shape) in zip(keys, THREE_LAYERS.items(), strict=True):
        layer = path.split("/")[0]
        params[layer] = {"kernel": jax.random.normal(key, shape) / shape[0] ** 0.5, "bias": jnp.zeros(shape[1])}
    return params


@functools.cache
def linen_variables(seed=0):
    init = jax.jit(lambda key: LinenNet().init(key, jnp.zeros((1, 6, 6, 3)), train=False))
    return init(jax.random.key(seed))


def batch(n=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(n, 6, 6, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 5, n), jnp.int32),
        "mask": jnp.ones(n, bool),
    }
