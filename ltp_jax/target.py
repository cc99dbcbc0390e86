"""LTP to a target compression: the density follows a plan, and the target is met exactly when the masks are fixed.

The threshold of a layer is written ``√τ_l = m · exp(a_l)``. The common scale ``m`` belongs to the plan: it moves at
every step so that the kept weights follow the planned curve. The offsets ``a_l`` belong to the loss: they descend its
gradient, less the component that would only change how much is pruned. That component is the multiplier λ of LTP's
penalty, which is thereby set by the budget and no longer by the user.

The offsets begin where the scores of LAMP would put the thresholds of the target. The score of a weight has no scale,
so that rescaling a layer that batch normalisation follows does not change what is pruned, as with eq. 15.

Quantities with one value per layer are rows, float32 ``[layers]``, as in ``density``, which counts the weights.
"""

from collections.abc import Callable, Mapping
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from ltp_jax import transform
from ltp_jax.density import SLACK, exact_thresholds, lamp_offsets, measure, scaled_thresholds, solve_scale
from ltp_jax.pruner import Pruner, finite_or_zero, project, unit_and_total_costs
from ltp_jax.selection import Plan
from ltp_jax.transform import PruneState, Scalars
from ltp_jax.trees import Params, named_leaves

FIXED_THRESHOLD = 1e-35
"""``τ`` of fixed masks, in units of ``w²``: a weight of less than 3e-18 counts as zero."""
FIXED_TEMPERATURE = 2e-38
"""``T`` of fixed masks, about the least of float32: the soft mask is a step, and soft and hard network are the same."""
MAX_STEP = 0.3
"""Most that ``log m`` moves in a training step."""
ANY_SCALE = 1e-3
"""``m`` to begin with where every one leaves as many weights."""
LEAST_SHARE = 0.1
"""Of the weights that LAMP would leave a layer at the target, what it keeps on the way there."""


class TargetState(flax.struct.PyTreeNode):
    """The state of LTP on its way to a target.

    Attributes:
      prune: what the verbs of the library take.
      log_scale: ``log m``, a float32 scalar; ``m`` has no unit, and 1 is the target as LAMP has it.
      offsets: ``a_l``, a row; ``exp(a_l)`` is in units of ``w``.
      least: what each layer keeps of the density on the way, a row.
      optimizer: the state of the offsets' optimizer.
      fixed: whether the masks are, a bool scalar.
    """

    prune: PruneState
    log_scale: jax.Array
    offsets: jax.Array
    least: jax.Array
    optimizer: optax.OptState
    fixed: jax.Array

    @property
    def thresholds(self) -> Scalars:
        return self.prune.thresholds


def planned_density(density: float, steps: int) -> Callable[[ArrayLike], jax.Array]:
    """The plan ``d^(1 − (1 − t/steps)³)``, and ``d`` from ``steps`` on: it falls in ever smaller factors.

    A network loses little while it is half full, and much when the last weights go: a plan for the density itself,
    such as that of gradual magnitude pruning, passes from 7 % to 1 % in a quarter of the descent to 128×, this one in
    two fifths.

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
    that are zero at the start, as in a network that was pruned before, stay zero; if fewer are left than the target
    asks for, all of them are kept.

    Each step counts the weights above each threshold and a tenth beside it, and looks for the largest; where exactly
    the target lies is found once, at the end of the selection. A training of fewer steps than ``select_steps`` does
    not come to it: its density is near the planned one. Fixed masks stay as they are: to prune further, call ``init``
    on the pruned parameters. Under ``jax.vmap`` the search is part of every step.

    Weights of exactly one size in a layer are kept or pruned together. Where there are many of them, as of quantised
    weights that are not trained, the target cannot be met to one weight.

    Args:
      plan: which tensors are pruned.
      density: share of the weights, or of their total cost, that is left in the end, in (0, 1).
      prune_steps: training steps in which the density descends.
      select_steps: training steps after which the masks are fixed, no fewer than ``prune_steps``.
      t0: temperature in units of ``Var(|w|)``, eq. 15. Wider than without a target: more weights tell the offsets
        where to go, and fixing the masks closes the hardening gap.
      leak: share of its gradient that a pruned weight gets at step 0, so that one for which the loss has a use grows
        and comes back. It falls linearly to zero at ``select_steps``: at first many weights are tried, in the end
        their choice settles. 0 is eq. 14; 0.3 gained up to half a point at 64× and 128× on LeNet-300-100, a quarter
        at 10× on ResNet-20, and nothing on LeNet-5.
      optimizer: of the offsets ``a_l``, dimensionless and in one array; Adam at 3e-4 if not given. At a hundred
        times that a layer was seen to run empty.
      costs: what a weight of each tensor costs, by path, such as its uses per image for a budget of
        multiply-accumulates. By default every weight costs one.

    Raises:
      ValueError: if the density, the leak, the steps or the costs are out of range, the plan prunes nothing, or the
        target is below one weight for each layer; from ``init``, as ``ltp_jax.init``, and if a tensor is not float32,
        whose weights are too often of exactly one size for a target to be met.
    """
    unit, total = unit_and_total_costs(plan, costs)
    shares = {path: cost / total for path, cost in unit.items()}
    layers = {tensor.path: tensor.layers for tensor in plan.tensors if tensor.prune}
    least_density = sum(shares[path] * n for path, n in layers.items())
    if not 0 < density < 1:
        raise ValueError(f"the density is {density}; accepted is more than 0, less than 1")
    if not 0 <= leak <= 1:
        raise ValueError(f"the leak is {leak}; accepted is 0 to 1")
    if not 1 <= prune_steps <= select_steps:
        raise ValueError(f"prune_steps is {prune_steps}, select_steps {select_steps}; accepted is 1 to select_steps")
    if density < least_density * (1 - SLACK):
        raise ValueError(
            f"a density of {density:.3g} leaves fewer than one weight to each of the {sum(layers.values())} layers; "
            f"the least is {least_density:.3g}"
        )
    planned = planned_density(density, prune_steps)
    optimizer = optax.adam(3e-4) if optimizer is None else optimizer

    def init(params: Params) -> TargetState:
        prune = transform.init(params, plan, t0)
        for path, leaf in named_leaves(params):
            if path in shares and leaf.dtype != jnp.float32:
                raise ValueError(f"{path} is of {leaf.dtype}; to meet a target weights have to be float32")
        offsets, least, scale = begin(params, prune.thresholds)
        return TargetState(prune, jnp.log(scale), offsets, least, optimizer.init(offsets), jnp.zeros((), bool))

    @jax.jit  # or each operation would be compiled by itself where the caller does not compile: seconds for a layer
    def begin(params, thresholds):
        offsets = lamp_offsets(params, thresholds, density, shares)
        # The network begins whole, with thresholds of zero; the scale where the plan is after its first step, which is
        # said of the weights that are not zero already: no threshold can leave more than those.
        measured = measure(params, thresholds, shares)
        # A long plan leaves all of them at first: some weight has to go, or the scale would be zero and stay there.
        aim = measured.present * jnp.minimum(planned(1), 1 - 2 * SLACK)
        scale = solve_scale(params, thresholds, offsets, measured.largest, aim, shares)
        # Where the largest weights of their layers, all of one size, are more than that, none is enough: any will do.
        scale = jnp.where(scale > 0, scale, ANY_SCALE)
        at_target = ravel_pytree(thresholds)[1](scaled_thresholds(jnp.float32(1), offsets))
        return offsets, LEAST_SHARE * measure(params, at_target, shares).kept, scale

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
        waits = (step == 0) | (wanted >= measured.present)
        # ∂L/∂a = 2τ · ∂L/∂τ
        tau, by_path = ravel_pytree(state.thresholds)
        loss_grads = finite_or_zero(ravel_pytree(grads)[0] * 2 * tau)
        updates, optimizer_state = optimizer.update(
            without_component(loss_grads, measured.slopes), state.optimizer, state.offsets
        )
        moved = cast(jax.Array, optax.apply_updates(state.offsets, finite_or_zero(cast(jax.Array, updates))))
        move = jnp.where(waits, 0, newton_step(measured.density, measured.slopes, wanted))
        short = measured.kept < state.least
        move = jnp.minimum(move, room(moved, state.log_scale, measured.largest, short))
        log_scale = state.log_scale + move
        lowered = moved - shortfall(measured.kept, measured.slopes, state.least, move)
        offsets = below_the_largest(lowered, log_scale, measured.largest)
        prune = state.prune.replace(thresholds=by_path(scaled_thresholds(jnp.exp(log_scale), offsets)))
        selected = TargetState(prune, log_scale, offsets, state.least, optimizer_state, state.fixed)
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


def below_the_largest(offsets: jax.Array, log_scale: jax.Array, largest: jax.Array) -> jax.Array:
    """The offsets, lowered where a layer would be left without a weight: its threshold stays below its largest.

    Args:
      offsets: ``a_l``, a row.
      log_scale: ``log m``.
      largest: ``w²`` of the largest weight of each layer, a row.
    """
    return jnp.minimum(offsets, highest(largest) - log_scale)


def room(offsets: jax.Array, log_scale: jax.Array, largest: jax.Array, short: jax.Array) -> jax.Array:
    """How far the common scale can rise before no threshold rises with it any more; zero if none does already.

    Where many weights of one size are the largest of their layers, the planned density may be below what they are: the
    scale would rise for ever, until it is infinite.

    Args:
      offsets: ``a_l``, a row.
      log_scale: ``log m``.
      largest: ``w²`` of the largest weight of each layer, a row.
      short: which layers lack weights, so that their thresholds do not rise, a row.
    """
    return jnp.maximum(jnp.max(jnp.where(short, -jnp.inf, highest(largest) - offsets)) - log_scale, 0)


def highest(largest: jax.Array) -> jax.Array:
    """The highest ``log √τ_l`` that still leaves each layer its largest weight, from its ``w²``; rows."""
    # A thousandth, so that rounding leaves the threshold below; the least normal number, for a layer of zeros.
    return jnp.log(jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)) / 2 - 1e-3


def shortfall(kept: jax.Array, slopes: jax.Array, least: jax.Array, move: jax.Array) -> jax.Array:
    """How much the offset of a layer has to fall for it to have its least; zero where it has that.

    The weights of some layers grow while they are trained. Those of others fall behind the common scale then, and far
    from all their thresholds' slopes could bring back would be pruned, to the last one.

    Args:
      kept: what each layer has, a row.
      slopes: what it loses per unit of ``log √τ_l``, a row.
      least: what it has to have, a row.
      move: how much the common scale moves; such a layer's threshold does not rise with it.
    """
    kept = jnp.maximum(kept, jnp.finfo(jnp.float32).tiny)
    # Of normally distributed weights 2 is the slope where one in four is left; it is steeper with fewer.
    fall = jnp.clip(jnp.log(jnp.maximum(least, kept) / kept) / jnp.maximum(slopes / kept, 2), 0, MAX_STEP)
    return fall + jnp.where(kept < least, jnp.maximum(move, 0), 0)


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
