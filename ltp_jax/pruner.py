"""Pruning while training: what a training step needs of a method, and what methods that learn thresholds share."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ltp_jax import method
from ltp_jax.selection import Plan
from ltp_jax.transform import Scalars
from ltp_jax.trees import Params, map_selected, named_leaves, nnx_variables


class Pruner(NamedTuple):
    """A pruning method as pure functions, all of which can be traced.

    ``step`` counts the updates from 0, whatever was trained before: schedules and plans go by it.

    Attributes:
      init: ``params -> state``, for trained parameters: any pytree with ``thresholds``, the part that the loss is
        differentiated by.
      soften: ``(params, thresholds, state, step) -> (pruned, penalty)``: the parameters that the network trains with
        and a scalar that is added to its loss. Differentiated in ``params`` and ``thresholds``.
      update: ``(grads, old_params, params, state, step) -> (params, state)``: called with the loss's gradients with
        respect to the thresholds and the parameters before and after the optimizer's update. ``nnx.Optimizer`` writes
        to the parameters in place: ``jax.tree.map(lambda w: w, nnx.state(model, nnx.Param))`` keeps those before it.
      harden: ``(params, state) -> pruned``: the parameters that are handed over, with exact zeros. It is for those that
        were trained: ``ltp_jax.mask`` says what of their average is pruned.
    """

    init: Callable[[Params], Any]
    soften: Callable[[Params, Scalars, Any, jax.Array], tuple[Params, jax.Array]]
    update: Callable[[Scalars, Params, Params, Any, jax.Array], tuple[Params, Any]]
    harden: Callable[[Params, Any], Params]


class NoState(flax.struct.PyTreeNode):
    """The state of a method that has none."""

    thresholds: Scalars = flax.struct.field(default_factory=dict)


def dense() -> Pruner:
    """The method that prunes nothing: for training before pruning, and as a control."""
    return Pruner(
        init=lambda params: NoState(),
        soften=lambda params, thresholds, state, step: (params, jnp.zeros((), jnp.float32)),
        update=lambda grads, old_params, params, state, step: (params, state),
        harden=lambda params, state: params,
    )


def unit_and_total_costs(plan: Plan, costs: Mapping[str, float] | None) -> tuple[dict[str, float], float]:
    """What a weight of each tensor that is pruned costs, by path: one if not given. And what all of them cost.

    Raises:
      ValueError: if the plan prunes nothing, or one of the tensors has no cost, or one that is not positive.
    """
    if not plan.paths:
        raise ValueError("the plan prunes no tensor: there is no threshold to learn")
    given: dict[str, Any] = {path: 1.0 if costs is None else costs.get(path) for path in plan.paths}
    for path, cost in given.items():
        if cost is None or np.ndim(cost) or not 0 < float(cost) < math.inf:
            raise ValueError(f"{path} has a cost of {cost}; accepted is a positive number for each that is pruned")
    unit = {path: float(cost) for path, cost in given.items()}
    return unit, sum(unit[tensor.path] * tensor.size for tensor in plan.tensors if tensor.prune)


def project(params: Params, old_params: Params, thresholds: Scalars, fixed: ArrayLike) -> Params:
    """The parameters after an optimizer's step, in which what was zero before it is zero still.

    If masks are fixed, so is what was pruned before the step: momentum would otherwise bring weights back. A weight of
    zero is one that was pruned in an earlier run. While thresholds are near zero its mask is a half, not zero.

    Args:
      params: those after the step.
      old_params: those before it.
      thresholds: ``τ`` before it, by path.
      fixed: whether the masks are, a bool scalar.

    Raises:
      ValueError: if both are the very same NNX variables, so that those before the step are lost.
    """
    if nnx_variables(old_params) & nnx_variables(params):
        raise ValueError(
            "the parameters before the optimizer's step are the same NNX variables as those after it, which it wrote "
            "to in place; keep jax.tree.map(lambda w: w, nnx.state(model, nnx.Param)) before the step"
        )
    old = dict(named_leaves(old_params))

    def kept(path: str, w: jax.Array) -> jax.Array:
        pruned = (old[path] == 0) | (fixed & ~method.hard_mask(old[path], thresholds[path]))
        return jnp.where(pruned, jnp.zeros((), w.dtype), w)

    return map_selected(kept, params, thresholds)


def finite_or_zero(grads: jax.Array) -> jax.Array:
    """The gradients, or zeros if one of them is not finite: a single bad batch would prune everything for good.

    Applied to updates too: an optimizer that divides by a gradient, as ``prodigy`` does, gives NaN for one of zero, and
    the first may be that. Optimizers of weights are guarded against bad batches by ``optax.apply_if_finite``.
    """
    return jnp.where(jnp.all(jnp.isfinite(grads)), grads, 0)
