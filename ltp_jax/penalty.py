"""LTP to a penalty, as in the paper: thresholds are trained with the weights on ``L + λ Σ_l L0_l``."""

from collections.abc import Mapping
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ltp_jax import method, transform
from ltp_jax.pruner import Pruner, finite_or_zero, project, unit_and_total_costs
from ltp_jax.selection import Plan
from ltp_jax.transform import PruneState, Scalars
from ltp_jax.trees import named_leaves


class LearnedThresholdState(flax.struct.PyTreeNode):
    """``prune`` is what the verbs of the library take; ``optimizer`` is the state of the thresholds' own optimizer."""

    prune: PruneState
    optimizer: optax.OptState

    @property
    def thresholds(self) -> Scalars:
        return self.prune.thresholds


def learned_thresholds(
    plan: Plan,
    penalty: optax.Schedule,
    optimizer: optax.GradientTransformation,
    *,
    learn_steps: int,
    t0: float = 1e-3,
    exact_gradient: bool = False,
    l0_to_weights: bool = False,
    costs: Mapping[str, float] | None = None,
) -> Pruner:
    """Learned Threshold Pruning: thresholds are trained with the weights on ``L + λ Σ_l L0_l``, then frozen.

    Weights go on moving, and a few cross a frozen threshold in either direction. One that is exactly zero before a
    step, as in a network that was pruned before, stays zero.

    The optimizer sees each threshold as ``r = √τ / std(|w|)``, the size below which weights are pruned in units of
    their spread (that of the trained weights, ``Var(|w|) = T / t0``). A rate in these units means the same in every
    layer, and rescaling a layer that batch normalisation follows does not change what is pruned.

    Args:
      plan: which tensors are pruned.
      penalty: ``λ · N`` as a function of the step, where ``N`` is the number of prunable weights (or their total cost):
        what keeping all of them would cost, in units of the loss. It should rise from zero: a large penalty at once
        prunes far too much before the loss has a say.
      optimizer: updates the thresholds, all of them in one array. Weight decay has no place in it.
      learn_steps: thresholds are frozen from this step on, 1 or more, while the network recovers.
      t0: temperature in units of ``Var(|w|)``, eq. 15.
      exact_gradient: see ``ltp_jax.soft_prune``.
      l0_to_weights: see ``ltp_jax.l0``.
      costs: what a weight of each tensor costs, by path, also of a stack one number. By default every weight costs one.

    Raises:
      TypeError: if the penalty is no function.
      ValueError: if the plan prunes nothing, there is no step to learn in, a tensor that is pruned has no cost, or one
        that is not positive; from ``init``, as ``ltp_jax.init``, and if a tensor is of less precision than float32.
    """
    unit, total = unit_and_total_costs(plan, costs)
    if learn_steps < 1:
        raise ValueError(f"learn_steps is {learn_steps}; accepted is 1 or more")
    if not callable(penalty):
        raise TypeError(f"the penalty is {penalty!r}; accepted is a function of the step, as optax has them")

    def init(params):
        prune = transform.init(params, plan, t0)
        for path, leaf in named_leaves(params):
            if path in unit and jnp.finfo(leaf.dtype).bits < 32:
                raise ValueError(
                    f"{path} is of {leaf.dtype}; to be trained with a threshold weights have to be float32: in less "
                    "precision they come by zero, and a weight of zero stays pruned"
                )
        return LearnedThresholdState(prune, optimizer.init(ravel_pytree(prune.thresholds)[0]))

    def soften(params, thresholds, state, step):
        pruned, counts = transform.soft_prune_and_count(
            params,
            state.prune.replace(thresholds=thresholds),
            exact_gradient=exact_gradient,
            l0_to_weights=l0_to_weights,
        )
        return pruned, jnp.asarray(penalty(step)) * transform.total_cost(counts, unit) / total

    def update(grads, old_params, params, state, step):
        params = project(params, old_params, state.thresholds, fixed=False)
        learned = step_thresholds(grads, state, optimizer, t0)
        # One trace serves the whole run: after the last learning step the new state is computed and not taken.
        return params, jax.tree.map(lambda new, old: jnp.where(step < learn_steps, new, old), learned, state)

    return Pruner(init, soften, update, lambda params, state: transform.hard_prune(params, state.prune))


def step_thresholds(
    grads: Scalars, state: LearnedThresholdState, optimizer: optax.GradientTransformation, t0: float
) -> LearnedThresholdState:
    """One optimizer step of ``r = √τ / std(|w|)``, which is kept in its valid range, ``r ≥ 0``.

    A layer without spread, which ``ltp_jax.init`` cannot see under ``jax.jit``, has no such unit: it stays whole.

    Args:
      grads: ``∂L/∂τ`` by path.
      state: thresholds, temperatures and the optimizer's state, which is of ``r``.
      optimizer: the thresholds' optimizer.
      t0: that of the temperatures.
    """
    tau, by_path = ravel_pytree(state.thresholds)
    variance = ravel_pytree(state.prune.temperatures)[0] / t0
    varied = variance > 0
    spread = jnp.sqrt(jnp.where(varied, variance, 1.0))
    r = jnp.sqrt(method.valid_threshold(tau)) / spread
    # ∂τ/∂r = 2 r · spread² vanishes at r = 0, where every run starts: it is taken no smaller than at a hundredth.
    tau_grads = jnp.where(varied, ravel_pytree(grads)[0], 0.0)
    r_grads = tau_grads * 2 * jnp.maximum(r, 0.01) * jnp.square(spread)
    updates, optimizer_state = optimizer.update(finite_or_zero(r_grads), state.optimizer, r)
    r = jnp.maximum(cast(jax.Array, optax.apply_updates(r, finite_or_zero(cast(jax.Array, updates)))), 0)
    return LearnedThresholdState(state.prune.replace(thresholds=by_path(jnp.square(r * spread))), optimizer_state)
