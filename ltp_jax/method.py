"""The arithmetic of Learned Threshold Pruning (LTP) on one tensor.

Equation numbers are those of *Learned Threshold Pruning* (arXiv 2003.00075). A layer has weights ``w`` of any shape,
a scalar threshold ``τ`` that is compared with ``w²``, and a scalar temperature ``T``. Everything here is computed in
float32 whatever the dtype of ``w``, since ``w² − τ`` is a small difference of small numbers.

A tensor may be a stack of layers. Then ``τ`` and ``T`` have as many dimensions as ``w`` and are 1 along the axes of a
layer, ``[n, 1, 1]`` for ``n`` dense kernels, and where a scalar is spoken of there is such an array of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def temperature(w: jax.Array, t0: ArrayLike, shape: tuple[int, ...] = ()) -> jax.Array:
    """``T = t0 · Var(|w|)`` of the trained weights, eq. 15: a float32 scalar in units of ``w²``.

    Because it scales as the weights do, rescaling a layer together with its threshold leaves every mask unchanged.

    Args:
      w: weights, any shape and floating dtype.
      t0: temperature in units of ``Var(|w|)``.
      shape: that of the result, which says of what layers ``w`` is a stack.
    """
    return jnp.float32(t0) * over_layers(jnp.var, jnp.abs(w.astype(jnp.float32)), shape)


def layer_axes(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes within one layer, by the shape of the tensor's thresholds; None means all axes."""
    return tuple(axis for axis, n in enumerate(shape) if n == 1) if shape else None


def over_layers(reduction: Callable[..., jax.Array], x: jax.Array, shape: tuple[int, ...], **kwargs: Any) -> jax.Array:
    """A reduction such as ``jnp.sum`` over each layer, of the shape of the thresholds."""
    return unsplit(reduction(x, axis=layer_axes(shape), keepdims=bool(shape), **kwargs))


@jax.custom_jvp
def valid_threshold(threshold: jax.Array) -> jax.Array:
    """``max(τ, 0)`` with the gradient of ``τ``: below zero every mask is 1, and a threshold would be stuck there.

    An optimizer that pushes ``τ`` below zero changes nothing by it, and its gradient can bring it back.
    """
    return jnp.maximum(threshold, 0)


@valid_threshold.defjvp
def _valid_threshold_jvp(primals, tangents):
    return valid_threshold(*primals), tangents[0]


def soft_mask(w: jax.Array, threshold: jax.Array, temperature: jax.Array) -> jax.Array:
    """``s = sigmoid((w² − τ) / T)``, float32 of the shape of ``w``: how much of each weight is left, in [0, 1]."""
    return jax.nn.sigmoid((jnp.square(w.astype(jnp.float32)) - threshold) / temperature)


def hard_mask(w: jax.Array, threshold: jax.Array) -> jax.Array:
    """``1[w² > τ]``, bool of the shape of ``w``: True where the weight survives.

    NaN survives, so that a network that diverged is not taken for a sparse one.
    """
    return ~(jnp.square(w.astype(jnp.float32)) <= threshold)


def count(w: jax.Array, threshold: jax.Array) -> jax.Array:
    """``Σ 1[w² > τ]`` over each layer, int32 of the shape of the thresholds: how many weights survive."""
    return over_layers(jnp.sum, hard_mask(w, threshold), threshold.shape, dtype=jnp.int32)


def hard_threshold(w: jax.Array, threshold: jax.Array) -> jax.Array:
    """``v = w · 1[w² > τ]``: ``w`` with exact zeros where it is pruned; shape and dtype of ``w``."""
    return jnp.where(hard_mask(w, threshold), w, jnp.zeros((), w.dtype))


def soft_threshold(
    w: jax.Array,
    threshold: jax.Array,
    temperature: jax.Array,
    *,
    exact_gradient: bool = False,
    l0_to_weights: bool = False,
    leak: ArrayLike = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Soft-pruned weights and their soft count, from one pass over the weights.

    Args:
      w: weights, any shape and floating dtype.
      threshold: ``τ``, float32 scalar in units of ``w²``.
      temperature: ``T``, float32 scalar in units of ``w²``. It is a constant of the method: its gradient is zero.
      exact_gradient: differentiate the mask of the pruned weights with respect to ``w`` as well. By default the
        gradient is that of eq. 14, which takes the sigmoid as a constant of ``w``. The dropped term reaches
        ``τ / 2T`` at the threshold, hundreds of times what is kept: it throws weights out of the band in which
        thresholds have a gradient, and pruning stalls.
      l0_to_weights: let the gradient of the soft count reach ``w`` too, not only ``τ``.
      leak: share, from 0 to 1, of its gradient that a pruned weight still gets: ``∂v/∂w ≈ s + leak · (1 − s)``. By
        eq. 14 it gets none, keeps the size that it had, and returns only if its threshold falls below that. With a
        small share of it a weight grows for which the loss has a use, and comes back. Not in the paper. A constant, as
        the temperature is.

    Returns:
      ``v = w · s``, shape and dtype of ``w``, and ``L0 = Σ s`` (eq. 6), a float32 scalar.
    """
    # Where jax.shard_map splits w, this zero differs between devices as w does. The scalars, which are those of all of
    # them, do so with it, and their gradients are sums over all parts of w. Outside of a trace nothing is split so, and
    # JAX has no zero like an array that lies on an explicit mesh.
    traced = isinstance(w, Tracer)
    zero = jnp.zeros_like(w, jnp.float32, shape=(), device=everywhere(w)) if traced else jnp.float32(0)
    return _soft_threshold(w, threshold + zero, temperature + zero, leak + zero, exact_gradient, l0_to_weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _soft_threshold(w, threshold, temperature, leak, exact_gradient, l0_to_weights):
    del leak, exact_gradient, l0_to_weights
    s = soft_mask(w, threshold, temperature)
    return (w.astype(jnp.float32) * s).astype(w.dtype), layer_sums(s, threshold.shape)


def _soft_threshold_fwd(w, threshold, temperature, leak, exact_gradient, l0_to_weights):
    # The mask is recomputed in the backward pass: to keep it would cost a float32 copy of every weight.
    pruned = _soft_threshold(w, threshold, temperature, leak, exact_gradient, l0_to_weights)
    return pruned, (w, threshold, temperature, leak)


def _soft_threshold_bwd(exact_gradient, l0_to_weights, residuals, cotangents):
    w, threshold, temperature, leak = residuals
    g, g_count = cotangents
    s = soft_mask(w, threshold, temperature)
    slope = s * (1 - s)  # −T · ∂s/∂τ; one division of a sum is cheaper than one of every weight
    w32, g32 = w.astype(jnp.float32), g.astype(jnp.float32)
    # One reduction serves the classification loss and the penalty: −Σ (g·w + λ) · s(1−s)/T.
    d_threshold = -layer_sums((g32 * w32 + g_count) * slope, threshold.shape) / temperature
    d_w = g32 * (s + leak * (1 - s))
    if exact_gradient:
        d_w += g32 * w32 * 2 * w32 * slope / temperature
    if l0_to_weights:
        d_w += g_count * 2 * w32 * slope / temperature
    return d_w.astype(w.dtype), d_threshold, jnp.zeros_like(temperature), jnp.zeros_like(leak)


_soft_threshold.defvjp(_soft_threshold_fwd, _soft_threshold_bwd)


def everywhere(x: jax.Array) -> NamedSharding | None:
    """Where an explicit mesh splits an array, the sharding of one that lies on all its devices; None elsewhere."""
    sharding = jax.typeof(x).sharding
    return sharding.update(spec=PartitionSpec()) if any(sharding.spec) else None


def unsplit(x: jax.Array) -> jax.Array:
    """The array, all of it on every device of an explicit mesh."""
    sharding = everywhere(x)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def layer_sums(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``Σ x`` over each layer, float32 of the shape of the thresholds. On a CPU, the sum of a single layer is taken
    by repeated halving: XLA makes one pass of those additions and of what ``x`` is computed from, while its reduction
    wants ``x`` and every constant in it written to memory first."""

    if shape or everywhere(x):  # an array that is split cannot take any shape
        return over_layers(jnp.sum, x, shape)

    def halves(x: jax.Array) -> jax.Array:
        x = x.reshape(-1)
        while x.size % 2 == 0 and x.size > 4096:
            x = x.reshape(2, -1)
            x = x[0] + x[1]
        return jnp.sum(x)

    return jax.lax.platform_dependent(x, cpu=halves, default=jnp.sum)
