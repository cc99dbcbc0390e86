"""The method over a pytree of parameters: the verbs of the library."""

from collections.abc import Iterator, Mapping

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ltp_jax import method
from ltp_jax.selection import Plan, format_table
from ltp_jax.trees import Params, map_selected, named_leaves

Scalars = dict[str, jax.Array]
"""A float32 scalar of every pruned tensor by its path; of a stack of layers an array of one for each, which is 1 along
the axes of a layer."""


class PruneState(flax.struct.PyTreeNode):
    """What LTP knows of a network beside its weights.

    Attributes:
      thresholds: ``τ`` of every pruned tensor, in units of ``w²``. Learned. One below zero counts as zero.
      temperatures: ``T`` of every pruned tensor, in units of ``w²``. Constant.
    """

    thresholds: Scalars
    temperatures: Scalars


def init(params: Params, plan: Plan, t0: ArrayLike = 1e-3) -> PruneState:
    """The state of the unpruned network: thresholds of zero, temperatures ``t0 · Var(|w|)`` (eq. 15).

    Args:
      params: trained parameters. LTP starts from a trained network: temperatures come from its weights.
      plan: which of them are pruned.
      t0: the width of the band in which the mask is soft. At 1e-3 the soft and the hard network agree.

    Raises:
      ValueError: if the plan is not of these parameters, or a selected tensor is empty, not of floating point, constant
        or not finite (the last two outside of ``jax.jit``, where values can be looked at).
    """
    leaves = dict(named_leaves(params))
    for tensor in plan.tensors:
        if tensor.prune and (tensor.path not in leaves or leaves[tensor.path].shape != tensor.shape):
            found = leaves[tensor.path].shape if tensor.path in leaves else "nothing"
            raise ValueError(f"the plan has {tensor.path} of shape {tensor.shape}, the parameters have {found}")
        if tensor.prune and not tensor.size:
            raise ValueError(
                f"{tensor.path} of shape {tensor.shape} has no weights; a rule with prune=False leaves it out"
            )
    for path in plan.paths:
        if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
            raise ValueError(f"{path} is of {leaves[path].dtype}; what is pruned has to be of floating point")
    shapes = {tensor.path: tensor.threshold_shape for tensor in plan.tensors if tensor.prune}
    temperatures = {path: method.temperature(leaves[path], t0, shape) for path, shape in shapes.items()}
    for path, layers in temperatures.items():
        if isinstance(layers, jax.core.Tracer):
            continue
        # Rounding leaves weights of one size a variance that is not zero.
        sizes = jnp.abs(leaves[path])
        ends = (method.over_layers(reduction, sizes, layers.shape) for reduction in (jnp.min, jnp.max))
        varied = dict(each_layer(path, jax.device_get(jnp.not_equal(*ends))))
        for layer, temperature in each_layer(path, jax.device_get(layers)):
            if not (np.isfinite(temperature) and temperature > 0 and varied[layer]):
                raise ValueError(
                    f"{layer} has a temperature of {temperature}: its weights are all of one size or not finite, or so "
                    "small or large that float32 has no number for their squares, or t0 is not positive. LTP starts "
                    "from trained weights; a rule with prune=False leaves a tensor out"
                )
    return PruneState({path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()}, temperatures)


def each_layer(path: str, values: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """What there is for each layer of a tensor, under the names of the layers: ``"blocks/kernel[3]"`` in a stack."""
    if not values.shape:
        yield path, values
        return
    stack = [axis for axis, n in enumerate(values.shape) if n > 1] or [0]
    for index in np.ndindex(values.shape):
        yield f"{path}[{', '.join(str(index[axis]) for axis in stack)}]", values[index]


def soft_prune(params: Params, state: PruneState, *, exact_gradient: bool = False, leak: ArrayLike = 0.0) -> Params:
    """``v = w · sigmoid((w² − τ)/T)`` for every selected tensor: the network that is trained.

    Differentiable in ``params`` and ``state.thresholds``, in reverse mode; the gradient with respect to ``params`` is
    that of eq. 14 unless ``exact_gradient``, and pruned weights get a share ``leak`` of theirs
    (``method.soft_threshold`` says what for). Returns the structure, shapes and dtypes of ``params``; what is not
    selected is returned as it is.

    Raises:
      ValueError: if a tensor of the state is not in ``params``, or its thresholds are of another shape.
    """
    return soft_prune_and_count(params, state, exact_gradient=exact_gradient, leak=leak)[0]


def l0(
    params: Params, state: PruneState, *, costs: Mapping[str, ArrayLike] | None = None, l0_to_weights: bool = False
) -> jax.Array:
    """``Σ_l Σ sigmoid((w² − τ)/T)``, eq. 6: the soft count of weights that are left, a float32 scalar.

    Args:
      params: the parameters.
      state: their thresholds and temperatures.
      costs: what each weight of a tensor counts, by path: its uses per image, say, for a count of
        multiply-accumulates; in a stack it may be an array of the thresholds' shape. By default each counts one.
      l0_to_weights: let the gradient reach the weights too. By default it reaches the thresholds alone (eq. 14).

    Raises:
      ValueError: if a tensor of the state is not in ``params``, its thresholds are of another shape, or it has no
        cost.
    """
    counts = soft_prune_and_count(params, state, l0_to_weights=l0_to_weights)[1]
    return total_cost(counts, costs)


def soft_prune_and_count(
    params: Params,
    state: PruneState,
    *,
    exact_gradient: bool = False,
    l0_to_weights: bool = False,
    leak: ArrayLike = 0.0,
) -> tuple[Params, Scalars]:
    """``soft_prune`` and the soft count of every selected tensor by path, which share their work.

    A training step that adds ``λ · total_cost(counts)`` to its loss reads each weight once in the forward and once in
    the backward pass. Counts are float32 of the thresholds' shapes.

    Raises:
      ValueError: if a tensor of the state is not in ``params``, or its thresholds are of another shape.
    """
    counts: Scalars = {}

    def prune(path: str, w: jax.Array) -> jax.Array:
        if path not in state.temperatures:
            raise ValueError(f"the state has a threshold for {path} and no temperature")
        tau, temperature = jnp.broadcast_arrays(_threshold(path, w, state), state.temperatures[path])
        pruned, counts[path] = method.soft_threshold(
            w, tau, temperature, exact_gradient=exact_gradient, l0_to_weights=l0_to_weights, leak=leak
        )
        return pruned

    return map_selected(prune, params, state.thresholds), counts


def total_cost(counts: Scalars, costs: Mapping[str, ArrayLike] | None = None) -> jax.Array:
    """``Σ_l cost_l · count_l``, a float32 scalar; without costs every weight counts one.

    Raises:
      ValueError: if a tensor has no cost, or costs of another number of layers.
    """
    costs = dict.fromkeys(counts, 1.0) if costs is None else costs
    if missing := [path for path in counts if path not in costs]:
        raise ValueError(f"the costs lack {', '.join(missing)}, which the state prunes")
    for path, count in counts.items():
        if (shape := jnp.shape(costs[path])) not in ((), jnp.shape(count)):
            raise ValueError(f"the cost of {path} is of shape {shape}; accepted is a number, or {jnp.shape(count)}")
    terms = [jnp.float32(count) * jnp.float32(costs[path]) for path, count in counts.items()]
    return sum(map(jnp.sum, terms), start=jnp.zeros((), jnp.float32))


def _threshold(path: str, w: jax.Array, state: PruneState) -> jax.Array:
    """The threshold of a tensor, not below zero, once it is certain to be one of this tensor's layers."""
    tau = jnp.asarray(state.thresholds[path], jnp.float32)
    fits = len(tau.shape) == len(w.shape) and all(n in (1, size) for n, size in zip(tau.shape, w.shape, strict=True))
    if tau.shape and not fits:
        raise ValueError(f"{path} is of shape {w.shape}, and the state has thresholds for it of shape {tau.shape}")
    return method.valid_threshold(tau)


def hard_prune(params: Params, state: PruneState) -> Params:
    """``v = w · 1[w² > τ]`` for every selected tensor: the network that is handed over, with exact zeros.

    Returns the structure, shapes and dtypes of ``params``; what is not selected is returned as it is: outside of
    ``jax.jit`` the very arrays of ``params``, which a step that donates them deletes.

    Raises:
      ValueError: if a tensor of the state is not in ``params``, or its thresholds are of another shape.
    """

    def prune(path: str, w: jax.Array) -> jax.Array:
        return method.hard_threshold(w, _threshold(path, w, state))

    return map_selected(prune, params, state.thresholds)


def mask(params: Params, state: PruneState) -> Params:
    """``1[w² > τ]`` for every selected tensor, and True for all others: bool arrays in the structure of ``params``.

    For weights that go with the trained ``params`` and are not they, such as their moving average, in which pruned
    weights are not zero: ``jax.tree.map(lambda w, kept: jnp.where(kept, w, 0), average, mask(params, state))``.

    Raises:
      ValueError: if a tensor of the state is not in ``params``, or its thresholds are of another shape.
    """

    def kept(path: str, w: jax.Array) -> jax.Array:
        return method.hard_mask(w, _threshold(path, w, state))

    return map_selected(kept, params, state.thresholds, lambda w: jnp.ones_like(w, bool))


class TensorSummary(flax.struct.PyTreeNode):
    """What is left of one pruned tensor. In a stack ``kept`` and ``threshold`` are arrays of one for each layer.

    Attributes:
      weights: how many each layer has in all.
      kept: how many of them survive, int32.
      threshold: ``τ``.
    """

    weights: int = flax.struct.field(pytree_node=False)
    kept: jax.Array
    threshold: jax.Array

    @property
    def density(self) -> jax.Array:
        """The kept fraction, in [0, 1]."""
        return self.kept / self.weights


class Summary(flax.struct.PyTreeNode):
    """What is left of a network. Prints as a table.

    Attributes:
      tensors: a ``TensorSummary`` per pruned tensor, by path.
      unpruned: how many parameters the tensors have that are not selected.
    """

    tensors: dict[str, TensorSummary]
    unpruned: int = flax.struct.field(pytree_node=False)

    @property
    def weights(self) -> int:
        """How many weights the pruned tensors have."""
        return sum(tensor.weights * tensor.kept.size for tensor in self.tensors.values())

    @property
    def kept(self) -> jax.Array:
        """How many of them survive: an int32 scalar, or a float32 one if there are more than int32 can count."""
        dtype = jnp.int32 if self.weights < 2**31 else jnp.float32
        counts = (jnp.sum(tensor.kept.astype(dtype)) for tensor in self.tensors.values())
        return sum(counts, start=jnp.zeros((), dtype))

    @property
    def density(self) -> jax.Array:
        """The kept fraction of the pruned tensors, in [0, 1]."""
        return self.kept.astype(jnp.float32) / float(max(self.weights, 1))

    @property
    def compression(self) -> jax.Array:
        """``weights / kept`` of the pruned tensors, the figure that papers report; infinite if nothing is left, 1 if
        there are none."""
        return float(self.weights) / self.kept.astype(jnp.float32) if self.weights else jnp.ones((), jnp.float32)

    def count_kept(self) -> int:
        """``kept`` to the last weight, however many there are; needs real values."""
        return sum(int(np.sum(tensor.kept, dtype=np.int64)) for tensor in jax.device_get(self.tensors).values())

    @property
    def parameters(self) -> int:
        """How many parameters the whole network has, pruned or not."""
        return self.weights + self.unpruned

    @property
    def network_compression(self) -> jax.Array:
        """The same ratio over all parameters, biases and normalisation included."""
        return float(self.parameters) / (self.kept.astype(jnp.float32) + float(self.unpruned))

    def __str__(self) -> str:
        summary = jax.device_get(self)
        rows = [
            (layer, f"{t.weights:,}", f"{int(kept):,}", f"{int(kept) / t.weights:.2%}", f"{float(threshold):.3e}")
            for path, t in summary.tensors.items()
            for (layer, kept), threshold in zip(each_layer(path, t.kept), np.ravel(t.threshold), strict=True)
        ]
        kept = summary.count_kept()
        whole = kept + self.unpruned
        rows.append(("pruned tensors", f"{self.weights:,}", f"{kept:,}", f"{kept / max(self.weights, 1):.2%}", ""))
        rows.append(
            ("whole network", f"{self.parameters:,}", f"{whole:,}", f"{whole / max(self.parameters, 1):.2%}", "")
        )
        table = format_table(("path", "weights", "kept", "density", "threshold"), rows, right=(1, 2, 3, 4))
        return f"{table}\ncompression {float(self.compression):.2f}×"


def summarize(params: Params, state: PruneState) -> Summary:
    """Counts what ``hard_prune`` leaves, per tensor and in total. Works on traced values; printing needs real ones.

    Of many networks at once, by ``jax.vmap``, take the summary of one, ``jax.tree.map(lambda x: x[0], summaries)``,
    before you ask it for anything: its arrays are otherwise those of a stack of layers.

    Raises:
      ValueError: if a tensor of the state is not in ``params``, or its thresholds are of another shape.
    """
    tensors: dict[str, TensorSummary] = {}

    def count(path: str, w: jax.Array) -> jax.Array:
        tau = _threshold(path, w, state)
        tensors[path] = TensorSummary(weights=w.size // tau.size, kept=method.count(w, tau), threshold=tau)
        return w

    map_selected(count, params, state.thresholds)
    return Summary(tensors, unpruned=sum(w.size for path, w in named_leaves(params) if path not in tensors))
