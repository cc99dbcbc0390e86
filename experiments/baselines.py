"""What LTP is compared with: magnitude pruning at once and gradually, and STR, each as a ``Pruner``."""

from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ltp_jax.pruner import Pruner
from ltp_jax.selection import Plan
from ltp_jax.transform import Scalars
from ltp_jax.trees import Params, map_selected, named_leaves

Masks = dict[str, jax.Array]
"""By path, bool of the shape of the tensor: True where a weight is left."""


class MaskState(flax.struct.PyTreeNode):
    """The state of a method that prunes by masks: those of the pruned tensors by path. It learns no thresholds."""

    masks: Masks
    thresholds: Scalars = flax.struct.field(default_factory=dict)


def one_shot_magnitude(plan: Plan, density: float) -> Pruner:
    """Keeps the largest weights of the whole network, decided before the first step, and trains those.

    Args:
      plan: which tensors are pruned.
      density: share of the weights that is left, in (0, 1].

    Raises:
      ValueError: if the density is out of range, or the plan prunes nothing.
    """
    _check(plan, density)
    return _masked(plan, lambda weights: global_masks(weights, jnp.float32(density)))


def gradual_magnitude(
    plan: Plan, density: float, *, prune_steps: int, every: int = 100, uniform: bool = False
) -> Pruner:
    """Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878), from sparsity zero at the first step.

    At every ``every``-th step up to ``prune_steps``, the smallest weights are masked so that the sparsity is
    ``s_f + (0 − s_f)(1 − t/prune_steps)³``. Masked weights keep the value that they had and are not trained.

    Args:
      plan: which tensors are pruned.
      density: ``1 − s_f``, in (0, 1].
      prune_steps: the step of the last change of the masks, a multiple of ``every`` or rounded down to one; at least 1.
      every: steps between two changes of the masks, at least 1.
      uniform: prune every tensor to the same sparsity, as the paper does; otherwise compare the weights of all.

    Raises:
      ValueError: if the density or the steps are out of range, or the plan prunes nothing.
    """
    _check(plan, density)
    if prune_steps < 1 or every < 1:
        raise ValueError(f"prune_steps is {prune_steps}, every is {every}; accepted is at least 1")
    every = min(every, prune_steps)
    last = prune_steps // every * every
    planned = optax.polynomial_schedule(1.0, density, power=3, transition_steps=last)
    masks_at = uniform_masks if uniform else global_masks

    def refresh(weights: Scalars, masks: Masks, step: jax.Array) -> Masks:
        due = (step % every == 0) & (step <= last)
        return jax.lax.cond(due, lambda: masks_at(weights, planned(step)), lambda: masks)

    return _masked(plan, lambda weights: masks_at(weights, planned(0)), refresh)


def global_masks(weights: Scalars, density: ArrayLike) -> Masks:
    """Keeps a share of the weights of all tensors together, the largest: ``round(density · n)`` of ``n``."""
    sizes = jnp.sort(jnp.concatenate([jnp.abs(w).ravel() for w in weights.values()]))
    smallest = _smallest_kept(sizes, density)
    return {path: jnp.abs(w) >= smallest for path, w in weights.items()}


def uniform_masks(weights: Scalars, density: ArrayLike) -> Masks:
    """Keeps the same share of each tensor's weights, the largest: ``round(density · n)`` of ``n``."""
    return {path: jnp.abs(w) >= _smallest_kept(jnp.sort(jnp.abs(w).ravel()), density) for path, w in weights.items()}


def _smallest_kept(ascending: jax.Array, density: ArrayLike) -> jax.Array:
    kept = jnp.clip(jnp.round(jnp.asarray(density) * ascending.size).astype(jnp.int32), 1, ascending.size)
    return ascending[ascending.size - kept]


def _masked(
    plan: Plan,
    first: Callable[[Scalars], Masks],
    refresh: Callable[[Scalars, Masks, jax.Array], Masks] = lambda weights, masks, step: masks,
) -> Pruner:
    """Pruning by the masks ``first(weights)``, and ``refresh(weights, masks, step)`` before every later step."""

    def selected(params: Params) -> Scalars:
        leaves = dict(named_leaves(params))
        return {path: leaves[path] for path in plan.paths}

    def apply(params: Params, state: MaskState) -> Params:
        return map_selected(lambda path, w: jnp.where(state.masks[path], w, 0), params, state.masks)

    def update(grads, old_params, params, state, step):
        del grads
        old = selected(old_params)
        params = map_selected(lambda path, w: jnp.where(state.masks[path], w, old[path]), params, state.masks)
        state = state.replace(masks=refresh(selected(params), state.masks, step + 1))
        return params, state

    return Pruner(
        init=lambda params: MaskState(first(selected(params))),
        soften=lambda params, thresholds, state, step: (apply(params, state), jnp.zeros((), jnp.float32)),
        update=update,
        harden=apply,
    )


class StrState(flax.struct.PyTreeNode):
    """The state of STR: ``thresholds`` is ``s`` of each tensor by path, not ``τ``; and the state of its optimizer."""

    thresholds: Scalars
    optimizer: optax.OptState


def soft_threshold_reparameterization(plan: Plan, optimizer: optax.GradientTransformation, *, initial: float) -> Pruner:
    """STR (Kusupati et al., arXiv 2002.03231): ``sign(w) · relu(|w| − sigmoid(s_l))`` with learned ``s_l``.

    It has no target. Weight decay draws every ``s_l`` to zero and so its threshold up to ``sigmoid(0) = 1/2``: the
    decay, which has to be the same for weights and ``s``, decides with ``initial`` how much is pruned.

    Args:
      plan: which tensors are pruned.
      optimizer: of ``s``, with the weight decay and learning rate of the weights' own.
      initial: the first value of every ``s``.

    Raises:
      ValueError: if the plan prunes nothing.
    """
    _check(plan)

    def prune(params: Params, s: Scalars) -> Params:
        def visit(path: str, w: jax.Array) -> jax.Array:
            return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - jax.nn.sigmoid(s[path]))

        return map_selected(visit, params, s)

    def init(params):
        del params
        s = {path: jnp.full((), initial, jnp.float32) for path in plan.paths}
        return StrState(s, optimizer.init(s))

    def update(grads, old_params, params, state, step):
        del old_params, step
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.thresholds)
        s = cast(Scalars, optax.apply_updates(state.thresholds, updates))
        return params, StrState(s, optimizer_state)

    return Pruner(
        init=init,
        soften=lambda params, thresholds, state, step: (prune(params, thresholds), jnp.zeros((), jnp.float32)),
        update=update,
        harden=lambda params, state: prune(params, state.thresholds),
    )


def _check(plan: Plan, density: float = 1.0) -> None:
    if not plan.paths:
        raise ValueError("the plan prunes no tensor")
    if not 0 < density <= 1:
        raise ValueError(f"the density is {density}; accepted is more than 0, at most 1")
