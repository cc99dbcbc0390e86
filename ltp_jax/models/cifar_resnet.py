"""The residual networks for CIFAR-10 of He et al., section 4.2 (arXiv 1512.03385)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ltp_jax.models.layers import BatchNorm, Conv, ConvNorm, global_average_pool
from ltp_jax.models.spec import NetworkSpec


class _Block(nn.Module):
    features: int
    strides: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shortcut = x[:, :: self.strides, :: self.strides]
        added = self.features - x.shape[-1]
        if added:
            # Option A of the paper: the new channels of the shortcut are zeros, half of them on each side.
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)))
        x = Conv(self.features, strides=self.strides, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm1")(x, train))
        x = Conv(self.features, dtype=self.dtype, name="conv2")(x)
        x = BatchNorm(dtype=self.dtype, name="norm2")(x, train)
        return nn.relu(x + shortcut)


class CifarResNet(nn.Module):
    """Depth ``6 * blocks + 2``: three stages of basic blocks, 16, 32 and 64 wide, with parameter-free shortcuts.

    Maps float ``[N, 32, 32, 3]`` to float32 logits ``[N, num_classes]``.
    """

    num_classes: int
    blocks: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = ConvNorm(16, dtype=self.dtype, name="stem")(images, train)
        for stage, width in enumerate((16, 32, 64), start=1):
            for index in range(self.blocks):
                strides = 2 if stage > 1 and index == 0 else 1
                x = _Block(width, strides, self.dtype, name=f"block{stage}_{index}")(x, train)
        x = global_average_pool(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))


NETWORKS = (NetworkSpec("resnet20", CifarResNet, {"blocks": 3}, 32, 269_722, num_classes=10),)
