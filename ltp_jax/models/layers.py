"""Layers shared by all networks: convolution, pooling and normalisation, for NHWC images.

XLA compiles a few operations badly on the CPU: grouped convolutions, the gradient of a max-pool, and 1x1
convolutions. Those are written a second time below, in a form that the CPU runs well, and
``jax.lax.platform_dependent`` takes that form when, and only when, the code is lowered for a CPU. A TPU or a GPU
gets the plain operation and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

Padding = Literal["torch", "same", "valid"] | int
"""How a convolution pads its input.

``"torch"`` pads both sides by ``kernel // 2``; ``"same"`` is TensorFlow's, which depends on the input size and puts the
odd pixel last; ``"valid"`` pads nothing; a number pads both sides by just that.
"""

_MOMENTUM = 0.9  # of running statistics: what they keep of themselves in a step

Activation = Callable[[jax.Array], jax.Array]
Pads = Sequence[tuple[int, int]]

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He et al. 2015 (arXiv 1502.01852), preserving the variance of the gradient."""

depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""The same for a depthwise kernel, where fan in and fan out are both ``k * k``."""


def explicit_padding(padding: Padding, size: tuple[int, int], kernel: int, stride: int) -> Pads:
    """The pixels to add before and after each spatial axis of an image of height and width ``size``."""
    if padding == "valid":
        return ((0, 0), (0, 0))
    if padding == "torch":
        return ((kernel // 2, kernel // 2),) * 2
    if padding == "same":
        return lax.padtype_to_pads(size, (kernel, kernel), (stride, stride), "SAME")
    if isinstance(padding, int):
        return ((padding, padding),) * 2
    raise ValueError(f"unknown padding {padding!r}: expected 'torch', 'same', 'valid' or a number of pixels")


def _shifts(x: jax.Array, height: int, width: int, stride: int) -> list[jax.Array]:
    """The ``height * width`` shifted and strided views of an image that is padded already, in row-major order."""
    batch, rows, columns, channels = x.shape
    rows, columns = (rows - height) // stride * stride, (columns - width) // stride * stride
    return [
        lax.slice(x, (0, i, j, 0), (batch, i + rows + 1, j + columns + 1, channels), (1, stride, stride, 1))
        for i in range(height)
        for j in range(width)
    ]


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Depthwise convolution of padded ``x`` as a sum of shifted products."""
    size, features = kernel.shape[0], kernel.shape[-1]
    taps = kernel.reshape(size, size, features)
    zero = jnp.zeros((), x.dtype)
    if size <= 5:
        windows = _shifts(x, size, size, stride)
        return sum((window * tap for window, tap in zip(windows, taps.reshape(-1, features), strict=True)), start=zero)

    # Compiling 49 products and more, with their gradients, takes longer than it saves: loop over the rows.
    height = (x.shape[1] - size) // stride * stride + 1
    width = (x.shape[2] - size) // stride + 1

    def add_row(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        offset, taps = row
        windows = _shifts(lax.dynamic_slice_in_dim(x, offset, height, axis=1), 1, size, stride)
        return total + sum((window * tap for window, tap in zip(windows, taps, strict=True)), start=zero), None

    total = jnp.zeros((x.shape[0], (height - 1) // stride + 1, width, features), x.dtype)
    return lax.scan(add_row, total, (jnp.arange(size), taps))[0]


def conv2d(x: jax.Array, kernel: jax.Array, *, stride: int = 1, pads: Pads, groups: int = 1) -> jax.Array:
    """Convolution of ``x [N, H, W, C]`` with ``kernel [k, k, C / groups, features]``, in the dtype of its arguments."""
    size, features = kernel.shape[0], kernel.shape[3]

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            tuple(pads),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x[:, ::stride, ::stride] @ kernel[0, 0]

    def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _depthwise(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, stride)

    if size == 1 and groups == 1 and not any(before + after for before, after in pads):
        return lax.platform_dependent(x, kernel, cpu=pointwise, default=plain)
    if groups == x.shape[-1] == features:
        return lax.platform_dependent(x, kernel, cpu=depthwise, default=plain)
    return plain(x, kernel)


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Maximum over ``window x window`` patches of ``x [N, H, W, C]``, ``stride`` apart; minus infinity pads them."""
    pads = ((padding, padding),) * 2

    def plain(x: jax.Array) -> jax.Array:
        minimum = np.array(-np.inf, x.dtype)  # a constant: only then is this a maximum that has a gradient
        return lax.reduce_window(
            x, minimum, lax.max, (1, window, window, 1), (1, stride, stride, 1), ((0, 0), *pads, (0, 0))
        )

    def shifted(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
        result, *rest = _shifts(x, window, window, stride)
        for other in rest:
            result = jnp.maximum(result, other)
        return result

    return lax.platform_dependent(x, cpu=shifted, default=plain)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over the pixels, ``[N, H, W, C] -> [N, C]``, summed in float32 whatever the dtype of ``x``."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


class Conv(nn.Module):
    """Convolution with a square kernel, ``[N, H, W, C] -> [N, H', W', features]``.

    Parameters are float32: ``kernel [k, k, C / groups, features]`` and, with ``use_bias``, ``bias [features]``. The
    product is computed in ``dtype``. ``groups`` equal to the input channels makes it depthwise.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: Padding = "torch"
    groups: int = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", conv_init if self.groups == 1 else depthwise_init, shape, jnp.float32)
        pads = explicit_padding(self.padding, (x.shape[1], x.shape[2]), self.kernel_size, self.strides)
        x = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.strides, pads=pads, groups=self.groups)
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return x


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy, arXiv 1502.03167).

    Statistics are float32 means over the batch axis of the traced array: when ``jax.jit`` shards that axis over a mesh,
    they are the statistics of the global batch. A running statistic keeps nine tenths of itself in a step, a momentum
    of 0.1 in the words of PyTorch. The running variance averages the biased variance of the batch, as in TensorFlow;
    PyTorch averages the unbiased one, which is larger by ``n / (n - 1)`` for ``n`` values a channel.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            wide = x.astype(jnp.float32)
            mean = jnp.mean(wide, axes)
            # One pass over x instead of two; the maximum guards against cancellation.
            var = jnp.maximum(jnp.mean(jnp.square(wide), axes) - jnp.square(mean), 0.0)
            if not self.is_initializing():
                running_mean.value = _MOMENTUM * running_mean.value + (1 - _MOMENTUM) * mean
                running_var.value = _MOMENTUM * running_var.value + (1 - _MOMENTUM) * var
        # A product and a sum for each value, where Flax' own layer has a difference, a product and a sum.
        factor = scale * lax.rsqrt(var + self.epsilon)
        return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(self.dtype)


def _split(channels: int, shares: int) -> list[int]:
    """Equal shares of ``channels``, the first taking what is left over."""
    sizes = [channels // shares] * shares
    sizes[0] += channels - sum(sizes)
    return sizes


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, activation: submodules ``conv`` and ``norm``.

    Of several kernel sizes each convolves its share of the channels (Tan and Le, arXiv 1907.09595): ``conv_0``,
    ``conv_1``, ...
    """

    features: int
    kernels: Sequence[int] = (3,)
    strides: int = 1
    depthwise: bool = False
    activation: Activation | None = nn.relu
    padding: Padding = "torch"
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shares = len(self.kernels)
        inputs, outputs = _split(x.shape[-1], shares), _split(self.features, shares)
        stops = [sum(inputs[: index + 1]) for index in range(shares - 1)]
        parts = [x] if shares == 1 else jnp.split(x, stops, axis=-1)
        for index, kernel in enumerate(self.kernels):
            conv = Conv(
                outputs[index],
                kernel,
                self.strides,
                padding=self.padding,
                groups=inputs[index] if self.depthwise else 1,
                dtype=self.dtype,
                name="conv" if shares == 1 else f"conv_{index}",
            )
            parts[index] = conv(parts[index])
        x = parts[0] if shares == 1 else jnp.concatenate(parts, axis=-1)
        x = BatchNorm(self.epsilon, self.dtype, name="norm")(x, train)
        return x if self.activation is None else self.activation(x)
