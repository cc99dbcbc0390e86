"""Small networks for small grey images: handwritten digits and Fashion-MNIST."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ltp_jax.models.layers import BatchNorm, Conv, ConvNorm, max_pool
from ltp_jax.models.spec import NetworkSpec


class Digits(nn.Module):
    """A convolutional network for the 8x8 digits of scikit-learn: three 3x3 convolutions and two dense layers.

    Maps float ``[N, 8, 8, 1]`` to float32 logits ``[N, num_classes]``. Every hidden layer is batch-normalised.
    """

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        for index, width in enumerate((16, 32, 64), start=1):
            x = ConvNorm(width, dtype=self.dtype, name=f"block{index}")(x, train)
            if index > 1:
                x = max_pool(x, 2, 2)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(64, use_bias=False, dtype=self.dtype, name="dense")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train))
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))


class LeNet300100(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998), two hidden layers, each followed by batch normalisation.

    Maps float ``[N, H, W, C]``, flattened, to float32 logits ``[N, num_classes]``. Batch normalisation is not in the
    original; with it the scale of a hidden layer has no meaning, which is the case that the L0 penalty is made for.
    """

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for index, width in enumerate((300, 100), start=1):
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name=f"dense{index}")(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"norm{index}")(x, train))
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))


class LeNet5(nn.Module):
    """LeNet-5 in the 20-50-500 form that ships with Caffe and that the pruning literature calls LeNet-5.

    Maps float ``[N, 28, 28, 1]`` to float32 logits ``[N, num_classes]``: two 5x5 convolutions without padding, each
    max-pooled, and two dense layers with a rectifier between them. Without batch normalisation, as in Caffe, so it
    has no batch statistics. 431,080 parameters with ten classes.
    """

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        del train  # Neither normalisation nor dropout: training and evaluation are the same function.
        x = images
        for index, width in enumerate((20, 50), start=1):
            x = Conv(width, 5, padding="valid", use_bias=True, dtype=self.dtype, name=f"conv{index}")(x)
            x = max_pool(x, 2, 2)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(500, dtype=self.dtype, name="dense")(x))
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x.astype(jnp.float32))


def _row(name: str, module: type[nn.Module], input_size: int, parameters: int) -> NetworkSpec:
    return NetworkSpec(name, module, {}, input_size, parameters, channels=1, num_classes=10)


NETWORKS = (
    _row("digits", Digits, 8, 40_570),
    _row("lenet_300_100", LeNet300100, 28, 267_010),
    _row("lenet5", LeNet5, 28, 431_080),
)
