"""Residual networks for ImageNet (He et al., arXiv 1512.03385); a bottleneck has its stride in the 3x3 convolution."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ltp_jax.models.layers import BatchNorm, Conv, ConvNorm, global_average_pool, max_pool
from ltp_jax.models.spec import NetworkSpec


class _Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of three that ends four times as wide, with a shortcut around them."""

    width: int
    strides: int
    bottleneck: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.bottleneck:
            layers = ((self.width, 1, 1), (self.width, 3, self.strides), (4 * self.width, 1, 1))
        else:
            layers = ((self.width, 3, self.strides), (self.width, 3, 1))
        features = layers[-1][0]

        y = x
        for index, (channels, kernel, strides) in enumerate(layers, start=1):
            y = Conv(channels, kernel, strides, dtype=self.dtype, name=f"conv{index}")(y)
            y = BatchNorm(dtype=self.dtype, name=f"norm{index}")(y, train)
            if index < len(layers):
                y = nn.relu(y)
        if self.strides != 1 or x.shape[-1] != features:
            shortcut = ConvNorm(
                features,
                kernels=(1,),
                strides=self.strides,
                activation=None,
                dtype=self.dtype,
                name="shortcut",
            )
            x = shortcut(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Maps float ``[N, H, W, 3]`` to float32 logits ``[N, num_classes]``; ``H`` and ``W`` are 224 in the paper."""

    num_classes: int
    repeats: Sequence[int]
    bottleneck: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        stem = ConvNorm(64, (7,), 2, dtype=self.dtype, name="stem")
        x = max_pool(stem(images, train), 3, 2, padding=1)
        for stage, repeats in enumerate(self.repeats, start=1):
            for index in range(repeats):
                block = _Block(
                    width=64 * 2 ** (stage - 1),
                    strides=2 if stage > 1 and index == 0 else 1,
                    bottleneck=self.bottleneck,
                    dtype=self.dtype,
                    name=f"block{stage}_{index}",
                )
                x = block(x, train)
        x = global_average_pool(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))


def _row(name: str, repeats: Sequence[int], bottleneck: bool, parameters: int) -> NetworkSpec:
    return NetworkSpec(name, ResNet, {"repeats": repeats, "bottleneck": bottleneck}, 224, parameters)


NETWORKS = (
    _row("resnet18", (2, 2, 2, 2), False, 11_689_512),
    _row("resnet34", (3, 4, 6, 3), False, 21_797_672),
    _row("resnet50", (3, 4, 6, 3), True, 25_557_032),
    _row("resnet101", (3, 4, 23, 3), True, 44_549_160),
    _row("resnet152", (3, 8, 36, 3), True, 60_192_808),
)
