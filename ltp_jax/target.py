"""LTP to a target compression: the density follows a plan, and the target is met exactly when the masks are fixed.

The threshold of a layer is written ``√τ_l = m · exp(a_l)``. The common scale ``m`` belongs to the plan: it moves at
every step so that the kept weights follow the planned curve. The offsets ``a_l`` belong to the loss: they descend its
gradient, less the component that would only change how much is pruned. That component is the multiplier λ of LTP's
penalty, which is thereby set by the budget and no longer by the user.

The offsets begin where the scores of LAMP would put the thresholds of the target. The score of a weight has no scale,
so that rescaling a layer that batch normalisation follows does not change what is pruned, as with eq. 15.

What there is of each layer is taken as one row, float32 ``[layers]``, in the order in which ``ravel_pytree`` puts the
thresholds: as many scalars would each cost a compiler and a device an operation of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from ltp_jax import method, transform
from ltp_jax.pruner import Pruner, finite_or_zero, project, unit_costs
from ltp_jax.selection import Params, Plan, named_leaves
from ltp_jax.transform import PruneState, Scalars

FIXED_THRESHOLD = 1e-35
"""``τ`` of fixed masks, in units of ``w²``: a weight of less than 3e-18 counts as zero."""
FIXED_TEMPERATURE = 2e-38
"""``T`` of fixed masks, about the least of float32: the soft mask is a step, and soft and hard network are the same."""
SLOPE_WIDTH = 0.1
"""Distance in ``log √τ`` to both sides over which slopes are measured: wide enough for a layer of a hundred weights."""
MAX_STEP = 0.3
"""Most that ``log m`` moves in a training step."""
SCORE_BITS = 15
"""Of LAMP's least score that are settled: the exponent and seven of the fraction, a step of 0.8 %."""


class TargetState(flax.struct.PyTreeNode):
    """The state of LTP on its way to a target.

    Attributes:
      prune: what the verbs of the library take.
      log_scale: ``log m``, a float32 scalar; ``m`` has no unit, and 1 is the target as LAMP has it.
      offsets: ``a_l``, a row; ``exp(a_l)`` is in units of ``w``.
      optimizer: the state of the offsets' optimizer.
      fixed: whether the masks are, a bool scalar.
    """

    prune: PruneState
    log_scale: jax.Array
    offsets: jax.Array
    optimizer: optax.OptState
    fixed: jax.Array

    @property
    def thresholds(self) -> Scalars:
        return self.prune.thresholds


def planned_density(density: float, steps: int) -> Callable[[ArrayLike], jax.Array]:
    """The plan ``d^(1 − (1 − t/steps)³)``, and ``d`` from ``steps`` on: it falls in ever smaller factors.

    A network loses little while it is half full, and much when the last weights go: a plan for the density itself,
    such as that of gradual magnitude pruning, passes from 7 % to 1 % in a tenth of the descent.

    Args:
      density: what is left at the end, in (0, 1].
      steps: how many steps the descent takes.
    """

    def plan(step: ArrayLike) -> jax.Array:
        rest = 1 - jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0, 1)
        return jnp.float32(density) ** (1 - rest**3)

    return plan


def target_density(
    plan: Plan,
    density: float,
    *,
    prune_steps: int,
    select_steps: int,
    t0: float = 1e-2,
    leak: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    costs: Mapping[str, float] | None = None,
) -> Pruner:
    """LTP that keeps a given share of the weights.

    The density descends to the target within ``prune_steps``. Until ``select_steps`` it is held there while the soft
    masks go on choosing which weights to keep. Then the thresholds are set so that the target is met exactly, what
    they prune becomes zero and stays zero, and the rest goes on training. A layer keeps at least one weight. Weights
    that are zero at the start, as in a network that was pruned before, stay zero.

    Each step counts the weights above each threshold and a tenth beside it, and looks for the largest; where exactly
    the target lies is found once, at the end of the selection. A training of fewer steps than ``select_steps`` does
    not come to it: its density is near the planned one. Fixed masks stay as they are: to prune further, call ``init``
    on the pruned parameters.

    Args:
      plan: which tensors are pruned.
      density: share of the weights, or of their total cost, that is left in the end, in (0, 1).
      prune_steps: training steps in which the density descends.
      select_steps: training steps after which the masks are fixed, no fewer than ``prune_steps``.
      t0: temperature in units of ``Var(|w|)``, eq. 15. Wider than without a target: more weights tell the offsets
        where to go, and fixing the masks closes the hardening gap.
      leak: share of its gradient that a pruned weight gets at step 0, so that one for which the loss has a use grows
        and comes back. It falls linearly to zero at ``select_steps``: at first many weights are tried, in the end
        their choice settles. 0 is eq. 14; 0.3 gained up to half a point from 64 times on on LeNet-300-100, and nothing
        on LeNet-5.
      optimizer: of the offsets ``a_l``, dimensionless and in one array; Adam at 3e-4 if nothing is said. At a hundred
        times that a layer was seen to run empty.
      costs: what a weight of each tensor costs, by path, such as its uses per image for a budget of
        multiply-accumulates. By default every weight costs one.

    Raises:
      ValueError: if the density, the leak, the steps or the costs are out of range, the plan prunes nothing, or the
        target is below one weight for each tensor; from ``init``, as ``ltp_jax.init``, and if a tensor is not float32,
        whose weights are too often of exactly one size for a target to be met.
    """
    sizes = {tensor.path: tensor.size for tensor in plan.tensors if tensor.prune}
    if not sizes:
        raise ValueError("the plan prunes no tensor: there is nothing to bring to a target")
    unit = unit_costs(plan, costs)
    total = sum(unit[path] * size for path, size in sizes.items())
    shares = {path: cost / total for path, cost in unit.items()}
    layers = {tensor.path: tensor.layers for tensor in plan.tensors if tensor.prune}
    least = sum(shares[path] * n for path, n in layers.items())
    if not 0 < density < 1:
        raise ValueError(f"the density is {density}; accepted is more than 0, less than 1")
    if not 0 <= leak <= 1:
        raise ValueError(f"the leak is {leak}; accepted is 0 to 1")
    if not 1 <= prune_steps <= select_steps:
        raise ValueError(f"prune_steps is {prune_steps}, select_steps {select_steps}; accepted is 1 to select_steps")
    if density < least:
        raise ValueError(
            f"a density of {density:.3g} leaves fewer than one weight to each of the {sum(layers.values())} layers; "
            f"the least is {least:.3g}"
        )
    planned = planned_density(density, prune_steps)
    optimizer = optax.adam(3e-4) if optimizer is None else optimizer

    def init(params: Params) -> TargetState:
        prune = transform.init(params, plan, t0)
        for path, leaf in named_leaves(params):
            if path in sizes and leaf.dtype != jnp.float32:
                raise ValueError(f"{path} is of {leaf.dtype}; to meet a target weights have to be float32")
        offsets = lamp_offsets(params, prune.thresholds, density, shares)
        # The network begins whole, with thresholds of zero; the scale where the plan is after its first step, which is
        # said of the weights that are not zero already: no threshold can leave more than those.
        measured = measure(params, prune.thresholds, shares)
        aim = measured.present * planned(1)
        scale = solve_scale(params, prune.thresholds, offsets, measured.largest, aim, shares)
        return TargetState(prune, jnp.log(scale), offsets, optimizer.init(offsets), jnp.zeros((), bool))

    def soften(params, thresholds, state, step):
        # No weight comes back to fixed masks: what it got of the gradient would only distort a norm of it.
        now = jnp.where(state.fixed, 0.0, leak * jnp.clip(1 - step / select_steps, 0, 1))
        pruned = transform.soft_prune(params, state.prune.replace(thresholds=thresholds), leak=now)
        return pruned, jnp.zeros((), jnp.float32)

    def update(grads, old_params, params, state, step):
        params = project(params, old_params, state.thresholds, state.fixed)
        measured = measure(params, state.thresholds, shares)
        # Before the first step the network is whole, and the scale is that of the plan after it already. While the
        # plan asks for more weights than are not zero, the scale waits for it.
        wanted = planned(step + 1)
        move = newton_step(measured.density, measured.slopes, wanted)
        log_scale = state.log_scale + jnp.where((step == 0) | (wanted >= measured.present), 0, move)
        # ∂L/∂a = 2τ · ∂L/∂τ
        tau, by_path = ravel_pytree(state.thresholds)
        loss_grads = finite_or_zero(ravel_pytree(grads)[0] * 2 * tau)
        updates, optimizer_state = optimizer.update(
            without_component(loss_grads, measured.slopes), state.optimizer, state.offsets
        )
        moved = cast(jax.Array, optax.apply_updates(state.offsets, updates))
        offsets = below_the_largest(moved, log_scale, measured.largest)
        prune = state.prune.replace(thresholds=by_path(scaled_thresholds(jnp.exp(log_scale), offsets)))
        selected = TargetState(prune, log_scale, offsets, optimizer_state, state.fixed)
        fix_now = (step + 1 >= select_steps) & ~state.fixed
        exact = jax.lax.cond(
            fix_now,
            lambda: exact_thresholds(params, state.thresholds, offsets, density, shares),
            lambda: jax.tree.map(lambda tau: jnp.full_like(tau, FIXED_THRESHOLD), state.thresholds),
        )
        cold = jax.tree.map(lambda t: jnp.full_like(t, FIXED_TEMPERATURE), state.prune.temperatures)
        hard = state.replace(prune=PruneState(exact, cold), fixed=jnp.ones((), bool))
        return params, jax.tree.map(lambda soft, hard: jnp.where(state.fixed | fix_now, hard, soft), selected, hard)

    def harden(params, state):
        return transform.hard_prune(params, state.prune)

    return Pruner(init, soften, update, harden)


def scaled_thresholds(scale: jax.Array, offsets: jax.Array) -> jax.Array:
    """``τ_l = (m · exp(a_l))²`` in units of ``w²``, a row as the offsets are."""
    return jnp.square(scale * jnp.exp(offsets))


def lamp_offsets(params: Params, thresholds: Scalars, density: ArrayLike, shares: Mapping[str, float]) -> jax.Array:
    """``log √τ_l`` of the thresholds by which LAMP (Lee et al., arXiv 2010.07611) leaves a density, a row.

    The score of a weight is ``w² / Σ u²`` over the weights ``u`` of its layer that are no smaller than it. Weights of
    all layers are compared by it. A layer keeps its largest weight, and small layers stay denser than large ones.

    Nothing is sorted: a sort of one layer can take the compiler for a TPU half a minute. The least score is found by
    halving, to a hundredth, which will do for a beginning, and so are the sizes that reach a score. Arguments as for
    ``exact_thresholds``.
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

    score = _smallest_float(lambda score: _left(leaves, below(score), share) <= density * (1 + 1e-6), bits=SCORE_BITS)
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
    """What there is of each layer by path, as a row."""
    return ravel_pytree(jax.tree.map(jnp.float32, scalars))[0]


def _shares(thresholds: Scalars, shares: Mapping[str, float]) -> jax.Array:
    """The share of one weight of each layer, a row."""
    return _row({path: jnp.full_like(tau, shares[path]) for path, tau in thresholds.items()})


class Measured(NamedTuple):
    """What is left under some thresholds, and how that changes with them.

    Attributes:
      density: a float32 scalar in [0, 1].
      present: the density of thresholds of zero.
      slopes: what the density loses per unit of ``log √τ_l``, a row; not negative.
      largest: the largest ``w²`` of each layer, a row.
    """

    density: jax.Array
    present: jax.Array
    slopes: jax.Array
    largest: jax.Array


def measure(params: Params, thresholds: Scalars, shares: Mapping[str, float]) -> Measured:
    """Reads each weight once.

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
        present=jnp.sum(nonzero),
        slopes=(below - above) / (2 * SLOPE_WIDTH),
        largest=_row({path: largest for path, (_, largest) in measured.items()}),
    )


def below_the_largest(offsets: jax.Array, log_scale: jax.Array, largest: jax.Array) -> jax.Array:
    """The offsets, lowered where a layer would be left without a weight: its threshold stays below its largest.

    Args:
      offsets: ``a_l``, a row.
      log_scale: ``log m``.
      largest: ``w²`` of the largest weight of each layer, a row.
    """
    # A thousandth, so that rounding leaves the threshold below; the least normal number, for a layer of zeros.
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.minimum(offsets, jnp.log(jnp.maximum(largest, tiny)) / 2 - 1e-3 - log_scale)


def newton_step(density: jax.Array, slopes: jax.Array, planned: jax.Array) -> jax.Array:
    """How much ``log m`` has to move for the density to be the planned one: a Newton step on its logarithm, bounded.

    Args:
      density: the present one.
      slopes: what it loses per unit of ``log √τ_l``, a row.
      planned: the density wanted.
    """
    density = jnp.maximum(density, 1e-9)
    slope = jnp.sum(slopes) / density
    # Selection empties the surroundings of a threshold: the slope there would throw it far into the weights beyond.
    # For normally distributed weights the slope is about −1.3 log density; less than half of that is not believed.
    slope = jnp.maximum(slope, -0.65 * jnp.log(density))
    return jnp.clip(jnp.log(density / planned) / jnp.maximum(slope, 1e-3), -MAX_STEP, MAX_STEP)


def without_component(grads: jax.Array, direction: jax.Array) -> jax.Array:
    """The gradients less their component along a direction, both rows: what is left keeps the budget.

    The coefficient of the component, ``<g, b> / <b, b>``, is the multiplier λ of the penalty.
    """
    norm = jnp.sum(jnp.square(direction))
    multiplier = jnp.sum(grads * direction) / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
    return grads - multiplier * direction


def exact_thresholds(
    params: Params, thresholds: Scalars, offsets: jax.Array, density: ArrayLike, shares: Mapping[str, float]
) -> Scalars:
    """The thresholds ``(m · exp(a_l))²`` with the smallest ``m`` that leaves no more than a density; no layer is empty.

    Each is moved half way to the smallest weight that it keeps: it would else be the size of a weight, whose soft mask
    would be a half where its hard mask is zero. Weights of exactly one size are kept or pruned together, so that where
    there are many of them fewer weights are left; the largest of a layer are always kept.

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
    """The smallest ``m`` that leaves no more than a density, where each layer keeps its largest weight.

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
    aim = density * (1 + 1e-6)
    aim = jnp.where(least > aim, aim + (least - jnp.sum(share)), aim)
    return _smallest_float(lambda scale: left(scaled_thresholds(scale, offsets)) <= aim)


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
    return number(jax.lax.fori_loop(0, bits + 1, halve, bounds)[1])


def _counts(w: jax.Array, thresholds: Sequence[jax.Array]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """How many weights of each layer lie above each threshold, and the largest ``w²``, float32 of a threshold's shape.

    For a CPU it is one reduction of several operands, since XLA would write each mask to memory before it sums it up,
    which takes twenty times as long. The counts are int32 there: a float32 sum of ones stops at 2²⁴. Elsewhere, as that
    reduction costs a TPU more than separate ones, they are sums of float32, of which there a great many partial ones
    are added up in the end. XLA makes one pass of them, of the thresholds' gradients and of the optimizer's step, and
    would make another of sums of integers.
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
