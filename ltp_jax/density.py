"""How many weights thresholds leave, and the thresholds that leave so many.

Quantities with one value per layer are rows, float32 ``[layers]``, in the order of ``ravel_pytree(thresholds)``: as
many scalars would each cost a compiler and a device an operation of its own. Nothing is sorted: a sort of one layer can
take the compiler for a TPU half a minute, and numbers are found by halving instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from ltp_jax import method
from ltp_jax.transform import Scalars
from ltp_jax.trees import Params, named_leaves

SLOPE_WIDTH = 0.1
"""Distance in ``log √τ`` to both sides over which slopes are measured: wide enough for a layer of a hundred weights."""
SLACK = 1e-6
"""Share by which a density may be exceeded, since a float32 sum of costs is that uncertain."""
SCORE_BITS = 15
"""Of LAMP's least score that are settled: the exponent and seven of the fraction, a step of 0.8 %."""


class Measured(NamedTuple):
    """What is left under some thresholds, and how that changes with them.

    Attributes:
      density: a float32 scalar in [0, 1].
      kept: what each layer has of it, a row.
      present: the density of thresholds of zero.
      slopes: what the density loses per unit of ``log √τ_l``, a row; not negative.
      largest: the largest ``w²`` of each layer, a row.
    """

    density: jax.Array
    kept: jax.Array
    present: jax.Array
    slopes: jax.Array
    largest: jax.Array


def measure(params: Params, thresholds: Scalars, shares: Mapping[str, float]) -> Measured:
    """The density under some thresholds and beside them, and each layer's largest weight; reads each weight once.

    Args:
      params: the parameters.
      thresholds: ``τ`` by path.
      shares: the cost of one weight of each tensor over that of all weights, by path.
    """
    leaves = dict(named_leaves(params))
    width = math.exp(2 * SLOPE_WIDTH)
    measured = {
        path: _counts(leaves[path], (jnp.zeros_like(tau), tau / width, tau, tau * width))
        for path, tau in thresholds.items()
    }
    share = _shares(thresholds, shares)
    nonzero, below, kept, above = (
        share * _row({path: counts[level] for path, (counts, _) in measured.items()}) for level in range(4)
    )
    return Measured(
        density=jnp.sum(kept),
        kept=kept,
        present=jnp.sum(nonzero),
        slopes=(below - above) / (2 * SLOPE_WIDTH),
        largest=_row({path: largest for path, (_, largest) in measured.items()}),
    )


def scaled_thresholds(scale: jax.Array, offsets: jax.Array) -> jax.Array:
    """``τ_l = (m · exp(a_l))²`` in units of ``w²``, a row as the offsets are."""
    return jnp.square(scale * jnp.exp(offsets))


def exact_thresholds(
    params: Params, thresholds: Scalars, offsets: jax.Array, density: ArrayLike, shares: Mapping[str, float]
) -> Scalars:
    """The thresholds ``(m · exp(a_l))²`` with the smallest ``m`` that leaves no more than a density; no layer is empty.

    A density is met to one weight, or to one in a million where there are more. Each threshold is moved half way to the
    smallest weight that it keeps: otherwise it would be the size of a weight, whose soft mask would be a half where its
    hard mask is zero. Weights of exactly one size are kept or pruned together, so that where there are many of them
    fewer weights are left; the largest of a layer are always kept.

    Args:
      params: the parameters.
      thresholds: scalars by path that have the shapes of the thresholds; their values are not looked at.
      offsets: ``a_l``, a row.
      density: share of the total cost that is left, in (0, 1].
      shares: the cost of one weight of each tensor over that of all weights, by path.
    """
    leaves, by_path = dict(named_leaves(params)), ravel_pytree(thresholds)[1]
    largest = _row({path: _counts(leaves[path], (tau,))[1] for path, tau in thresholds.items()})
    scale = solve_scale(params, thresholds, offsets, largest, density, shares)

    def between(w: jax.Array, tau: jax.Array) -> jax.Array:
        above = _smallest_kept(w, tau)
        middle = tau + (above - tau) / 2
        return jnp.where(middle < above, middle, tau)

    kept = by_path(keep_one(scaled_thresholds(scale, offsets), largest))
    return {path: between(leaves[path], tau) for path, tau in kept.items()}


def keep_one(thresholds: jax.Array, largest: jax.Array) -> jax.Array:
    """The thresholds, lowered where a layer would be left without a weight: it keeps its largest.

    Args:
      thresholds: ``τ``, a row.
      largest: ``w²`` of the largest weight of each layer, a row.
    """
    return jnp.minimum(thresholds, jnp.nextafter(largest, jnp.float32(0)))


def solve_scale(
    params: Params,
    thresholds: Scalars,
    offsets: jax.Array,
    largest: jax.Array,
    density: ArrayLike,
    shares: Mapping[str, float],
) -> jax.Array:
    """The smallest ``m`` that leaves no more than a density, to ``SLACK``, where each layer keeps its largest weight.

    It is found by halving the range of the positive float32 numbers, whose order is that of their bits: 31 counts of
    the weights settle it to the last bit, without a sort, a copy, or a gathering of weights that lie on many devices.
    Arguments as for ``exact_thresholds`` and ``keep_one``.
    """
    leaves, by_path = dict(named_leaves(params)), ravel_pytree(thresholds)[1]
    share = _shares(thresholds, shares)

    def left(row: jax.Array) -> jax.Array:
        return _left(leaves, by_path(keep_one(row, largest)), share)

    # Where many weights of one size are the largest of their layers, they alone may be more than that. Then no scale is
    # enough, and each layer is taken to have one of them: the others shall not be emptied in vain.
    least = left(jnp.full_like(offsets, jnp.inf))
    aim = density * (1 + SLACK)
    aim = jnp.where(least > aim, aim + (least - jnp.sum(share)), aim)
    return _smallest_float(lambda scale: left(scaled_thresholds(scale, offsets)) <= aim)


def lamp_offsets(params: Params, thresholds: Scalars, density: ArrayLike, shares: Mapping[str, float]) -> jax.Array:
    """``log √τ_l`` of the thresholds by which LAMP (Lee et al., arXiv 2010.07611) leaves a density, a row.

    The score of a weight is ``w² / Σ u²`` over the weights ``u`` of its layer that are no smaller than it. Weights of
    all layers are compared by it. A layer keeps its largest weight, and small layers stay denser than large ones.

    The least score is found by halving, to a hundredth, which will do for a beginning, and so are the sizes that reach
    a score. Arguments as for ``exact_thresholds``.
    """
    leaves, by_path = dict(named_leaves(params)), ravel_pytree(thresholds)[1]
    squares = {path: jnp.square(leaves[path].astype(jnp.float32)) for path in thresholds}
    share = _shares(thresholds, shares)
    largest = _row({path: _counts(leaves[path], (tau,))[1] for path, tau in thresholds.items()})

    def not_smaller(row: jax.Array) -> jax.Array:
        kept = {path: jnp.where(squares[path] >= tau, squares[path], 0) for path, tau in by_path(row).items()}
        return _row({path: method.layer_sums(square, thresholds[path].shape) for path, square in kept.items()})

    def below(score: jax.Array) -> Scalars:
        # The scores of a layer grow with its weights: those that reach a score are those that reach a size.
        size = _smallest_float(lambda row: row >= score * not_smaller(row), largest.shape)
        return by_path(jnp.nextafter(jnp.minimum(size, largest), jnp.float32(0)))

    score = _smallest_float(lambda score: _left(leaves, below(score), share) <= density * (1 + SLACK), bits=SCORE_BITS)
    found = below(jnp.minimum(score, 1))
    return jnp.log(_row({path: _smallest_kept(leaves[path], tau) for path, tau in found.items()})) / 2


def _left(leaves: Mapping[str, jax.Array], thresholds: Scalars, share: jax.Array) -> jax.Array:
    """The density under some thresholds, of tensors by path and the shares of their layers."""
    return jnp.sum(share * _row({path: _counts(leaves[path], (tau,))[0][0] for path, tau in thresholds.items()}))


def _smallest_kept(w: jax.Array, threshold: jax.Array) -> jax.Array:
    """The least ``w²`` of each layer that survives a threshold."""
    squares = jnp.where(method.hard_mask(w, threshold), jnp.square(w.astype(jnp.float32)), jnp.inf)
    return method.over_layers(jnp.min, squares, threshold.shape)


def _row(scalars: Scalars) -> jax.Array:
    """The values of all layers, given by path, as a row."""
    return ravel_pytree(jax.tree.map(jnp.float32, scalars))[0]


def _shares(thresholds: Scalars, shares: Mapping[str, float]) -> jax.Array:
    """The share of one weight of each layer, a row."""
    return _row({path: jnp.full_like(tau, shares[path]) for path, tau in thresholds.items()})


def _smallest_float(enough: Callable[[jax.Array], jax.Array], shape: tuple[int, ...] = (), bits: int = 31) -> jax.Array:
    """The smallest positive float32 numbers that are enough, where every larger one is enough as well.

    Args:
      enough: of numbers of that shape, each by itself.
      shape: that of the result.
      bits: how many of a number's bits are settled, from the highest on; the others are zero.
    """
    unit = 31 - bits

    def number(high: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(high << unit, jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        is_enough = enough(number(middle))
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    largest = jax.lax.bitcast_convert_type(jnp.finfo(jnp.float32).max, jnp.int32) >> unit
    bounds = jnp.zeros(shape, jnp.int32), jnp.full(shape, largest)
    return number(jax.lax.fori_loop(0, bits, halve, bounds)[1])


def _counts(w: jax.Array, thresholds: Sequence[jax.Array]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """How many weights of each layer lie above each threshold, and the largest ``w²``, float32 of a threshold's shape.

    For a CPU it is one reduction of several operands, since XLA would write each mask to memory before it sums it up,
    which takes twenty times as long. The counts are int32 there: a float32 sum of ones stops at 2²⁴. Elsewhere they are
    sums of float32, each made of a great many partial sums, since that reduction costs a TPU more than separate ones.
    XLA makes one pass of them, of the thresholds' gradients and of the optimizer's step, and would make another of sums
    of integers.
    """

    def together(square: jax.Array, *masks: jax.Array) -> tuple[jax.Array, ...]:
        zeros = (jnp.float32(0), *(jnp.int32(0) for _ in masks))

        def combine(a, b):
            return jnp.maximum(a[0], b[0]), *(x + y for x, y in zip(a[1:], b[1:], strict=True))

        ones = (mask.astype(jnp.int32) for mask in masks)
        reduced = jax.lax.reduce((square, *ones), zeros, combine, range(w.ndim) if axes is None else axes)
        whole = (x if axes is None else jnp.expand_dims(method.unsplit(x), axes) for x in reduced)
        return tuple(x.astype(jnp.float32) for x in whole)

    def apart(square: jax.Array, *masks: jax.Array) -> tuple[jax.Array, ...]:
        counts = (method.over_layers(jnp.sum, mask, shape, dtype=jnp.float32) for mask in masks)
        return method.over_layers(jnp.max, square, shape), *counts

    shape = thresholds[0].shape
    axes = method.layer_axes(shape)
    square = jnp.square(w.astype(jnp.float32))
    masks = (square > tau for tau in thresholds)
    largest, *counts = jax.lax.platform_dependent(square, *masks, cpu=together, default=apart)
    return tuple(counts), largest
