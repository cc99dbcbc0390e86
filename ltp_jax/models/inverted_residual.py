"""The network of inverted residual blocks that MobileNetV2, EfficientNet and MixNet share.

A member of these families is a sequence of ``Stage`` rows, a stem and a head; see ``mobilenet.py``, ``efficientnet.py``
and ``mixnet.py`` for the rows.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ltp_jax.models.layers import Activation, ConvNorm, Padding, global_average_pool


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of equal blocks; the first of them has the stride and the change of width.

    Attributes:
      number: names the blocks, ``block{number}_{index}``; rows of the same number count on.
      features: output channels.
      repeats: how many blocks.
      strides: of the first block.
      expansion: hidden channels of a block over its input channels; 1 leaves the expansion out.
      kernels: sizes of the depthwise kernels, each for an equal share of the hidden channels.
      expand_groups, project_groups: groups of the 1x1 convolutions.
      squeeze: channels of the squeeze-and-excitation bottleneck over the block's *input* channels; 0 for none.
      activation: of the block's hidden layers.
    """

    number: int
    features: int
    repeats: int
    strides: int
    expansion: int
    kernels: Sequence[int] = (3,)
    expand_groups: int = 1
    project_groups: int = 1
    squeeze: float = 0.0
    activation: Activation = nn.relu


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, or the one above where the nearest would lose more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def scale(stages: Sequence[Stage], width: float, depth: float = 1.0) -> tuple[Stage, ...]:
    """Compound scaling: channels by ``width``, rounded to multiples of 8, and repeats by ``depth``, rounded up."""
    return tuple(
        dataclasses.replace(
            stage, features=round_channels(stage.features * width), repeats=math.ceil(stage.repeats * depth)
        )
        for stage in stages
    )


class SqueezeExcite(nn.Module):
    """Rescales each channel by a function of all channels' means (Hu et al., arXiv 1709.01507)."""

    features: int
    activation: Activation
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        means = global_average_pool(x)
        squeezed = self.activation(nn.Dense(self.features, dtype=self.dtype, name="reduce")(means))
        gates = nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name="expand")(squeezed))
        return x * gates[:, None, None, :]


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation and linear projection (Sandler et al., 1801.04381)."""

    stage: Stage
    strides: int
    drop_rate: float
    padding: Padding
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        stage, inputs = self.stage, x.shape[-1]
        conv_norm = functools.partial(ConvNorm, padding=self.padding, epsilon=self.epsilon, dtype=self.dtype)
        hidden = inputs * stage.expansion
        y = x
        if stage.expansion != 1:
            y = conv_norm(hidden, (1,) * stage.expand_groups, activation=stage.activation, name="expand")(y, train)
        y = conv_norm(
            hidden, stage.kernels, self.strides, depthwise=True, activation=stage.activation, name="depthwise"
        )(y, train)
        if stage.squeeze:
            y = SqueezeExcite(int(inputs * stage.squeeze), stage.activation, self.dtype, name="se")(y)
        y = conv_norm(stage.features, (1,) * stage.project_groups, activation=None, name="project")(y, train)
        if self.strides == 1 and inputs == stage.features:
            # Stochastic depth (Huang et al., arXiv 1603.09382): the branch is dropped for whole images.
            y = x + nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3))(y, deterministic=not train)
        return y


class InvertedResidualNet(nn.Module):
    """Stem, stages of inverted residual blocks, 1x1 convolution, average, dropout, dense head.

    Maps float ``[N, H, W, 3]`` to float32 logits ``[N, num_classes]``. Training draws dropout and stochastic depth from
    the ``dropout`` stream; the rate of stochastic depth grows in equal steps from 0 at the first block.
    """

    num_classes: int
    stages: Sequence[Stage]
    stem_features: int
    head_features: int
    activation: Activation = nn.relu
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.0
    padding: Padding = "torch"
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        conv_norm = functools.partial(
            ConvNorm,
            activation=self.activation,
            padding=self.padding,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        x = conv_norm(self.stem_features, (3,), 2, name="stem")(images, train)
        blocks = [(stage, index) for stage in self.stages for index in range(stage.repeats)]
        counts: dict[int, int] = {}
        for position, (stage, index) in enumerate(blocks):
            number = counts[stage.number] = counts.get(stage.number, -1) + 1
            block = InvertedResidual(
                stage,
                strides=stage.strides if index == 0 else 1,
                drop_rate=self.drop_path_rate * position / len(blocks),
                padding=self.padding,
                epsilon=self.epsilon,
                dtype=self.dtype,
                name=f"block{stage.number}_{number}",
            )
            x = block(x, train)
        x = conv_norm(self.head_features, (1,), name="top")(x, train)
        x = global_average_pool(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))
