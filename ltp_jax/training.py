"""A training step and an evaluation step for any apply function."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ltp_jax.pruner import Pruner
from ltp_jax.trees import Params, named_leaves

Batch = Mapping[str, jax.Array]
"""``image`` [b, ...], ``label`` int32 [b] and, where evaluation has padding, ``mask`` bool [b] that is False for it.

Labels and mask may have other shapes, such as one a pixel, if the logits have that shape and an axis of classes.
"""


class Apply(Protocol):
    """A network: ``(params, batch_stats, images, train, key) -> (logits float32 [b, classes], batch_stats)``."""

    def __call__(
        self, params: Params, batch_stats: Any, images: jax.Array, *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, Any]: ...


Loss = Callable[[jax.Array, Batch], jax.Array]
"""``(logits [b, classes], batch) -> scalar``."""


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step.

    Attributes:
      step: int32 scalar, how many steps were taken; also the position in the training data.
      params: the latent weights, float32.
      batch_stats: what the network averages while it trains, or an empty dict.
      pruning: the state of the pruning method.
      optimizer: the state of the weights' optimizer.
      key: the random key of the run. Each step folds its number into it.
      totals: sums over the steps of this epoch: ``loss`` (without the penalty), ``correct`` (labels that got the
        highest logit), and ``examples`` (all labels); float32 scalars.
    """

    step: jax.Array
    params: Params
    batch_stats: Any
    pruning: Any
    optimizer: optax.OptState
    key: jax.Array
    totals: dict[str, jax.Array]


def create_state(
    params: Params, batch_stats: Any, optimizer: optax.GradientTransformation, pruner: Pruner, key: jax.Array
) -> TrainState:
    """The state of a run that has not begun. Its arrays are its own: a step may donate them.

    Raises:
      ValueError: if one of the parameters is not of floating point, and so cannot be trained; as ``pruner.init``.
    """
    for path, leaf in named_leaves(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"{path} is of {dtype}, which cannot be trained; what is kept as it is belongs into batch_stats"
            )
    # Of a weak type, as jnp.full(3, 0.1) is, the first step would make another one, and be compiled again for that.
    params, batch_stats = jax.tree.map(_typed, (params, batch_stats))
    # The state of an optimizer may begin with the very arrays of the parameters, and that of thresholds with theirs.
    own = jax.tree.map(jnp.copy, (params, batch_stats, pruner.init(params), optimizer.init(params), key))
    params, batch_stats, pruning, optimizer_state, key = own
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        pruning=pruning,
        optimizer=optimizer_state,
        key=key,
        totals=zero_totals(),
    )


def _typed(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    return leaf if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(leaf, dtype)


def zero_totals() -> dict[str, jax.Array]:
    """The sums of an epoch that has not begun."""
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "examples")}


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Mean softmax cross entropy; a share ``label_smoothing``, in [0, 1], of each label is spread over all classes."""

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        one_hot = jax.nn.one_hot(batch["label"], logits.shape[-1], dtype=jnp.promote_types(logits.dtype, jnp.float32))
        labels = optax.smooth_labels(one_hot, label_smoothing)
        return jnp.mean(optax.softmax_cross_entropy(logits, labels))

    return loss


def make_train_step(
    apply: Apply, optimizer: optax.GradientTransformation, pruner: Pruner, loss: Loss
) -> Callable[[TrainState, Batch], TrainState]:
    """One step of training the soft-pruned network, weights and thresholds together, as a pure function.

    Args:
      apply: the network.
      optimizer: updates the weights, from gradients and parameters alone. It never sees a threshold, and so cannot
        decay one.
      pruner: the pruning method, which updates its own thresholds.
      loss: what is minimised, together with the method's penalty, which a scale within it does not reach. Devices
        that each see a part of the batch by ``jax.shard_map`` take their mean here: a mean that the optimizer takes
        would leave each with thresholds of its own. Under ``jax.shard_map`` this needs ``check_vma=True``,
        the default, and ``jax.pmap`` is not supported: each device would have gradients of its own.

    Raises:
      ValueError: from the step, if the labels are not of the logits' shape without its last axis.
    """

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        key = jax.random.fold_in(state.key, state.step)

        def objective(params, thresholds):
            pruned, penalty = pruner.soften(params, thresholds, state.pruning, state.step)
            logits, batch_stats = apply(pruned, state.batch_stats, batch["image"], train=True, key=key)
            _check_shape(logits, batch, "label")
            task = loss(logits, batch)
            # Of the penalty only the gradient is used: its value would cost a pass over all weights in every step.
            return task + penalty, (task, logits, batch_stats)

        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (grads, threshold_grads), (task, logits, batch_stats) = gradient(state.params, state.pruning.thresholds)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params, pruning = pruner.update(threshold_grads, state.params, params, state.pruning, state.step)
        n = jnp.float32(batch["label"].size)
        step_totals = {
            "loss": task.astype(jnp.float32) * n,
            "correct": jnp.sum(_numbers(logits) & (jnp.argmax(logits, -1) == batch["label"]), dtype=jnp.float32),
            "examples": n,
        }
        return TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            pruning=pruning,
            optimizer=optimizer_state,
            key=state.key,
            totals=jax.tree.map(jnp.add, state.totals, step_totals),
        )

    return train_step


def make_eval_step(apply: Apply) -> Callable[[Params, Any, Batch], dict[str, jax.Array]]:
    """Evaluation of one batch, as a pure function.

    Args:
      apply: the network.

    Returns:
      ``(params, batch_stats, batch) -> counts``: sums over the rows that are no padding, float32 scalars. ``examples``
      counts them, ``top1`` and ``top5`` those whose label is among the one or five highest logits, ``loss`` adds up
      their cross entropy in nats. With fewer than six classes every example counts in ``top5``.

    Raises:
      ValueError: from the step, if labels or mask are not of the logits' shape without its last axis.
    """

    def eval_step(params: Params, batch_stats: Any, batch: Batch) -> dict[str, jax.Array]:
        logits, _ = apply(params, batch_stats, batch["image"], train=False, key=None)
        for name in ("label", "mask") if "mask" in batch else ("label",):
            _check_shape(logits, batch, name)
        logits = logits.astype(jnp.float32)  # a sum of many losses in half precision is percents off
        real = jnp.asarray(batch.get("mask", jnp.ones(batch["label"].shape)), bool)
        best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == batch["label"][..., None]
        best &= _numbers(logits)[..., None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {
            "top1": jnp.sum(real & best[..., 0], dtype=jnp.float32),
            "top5": jnp.sum(real & jnp.any(best, axis=-1), dtype=jnp.float32),
            # Not mask · loss: what a network makes of padding may be infinite.
            "loss": jnp.sum(jnp.where(real, losses, 0.0)),
            "examples": jnp.sum(real, dtype=jnp.float32),
        }

    return eval_step


def _numbers(logits: jax.Array) -> jax.Array:
    """Which examples have no NaN among their logits: it would pass for the highest of them."""
    return ~jnp.any(jnp.isnan(logits), -1)


def _check_shape(logits: jax.Array, batch: Batch, name: str) -> None:
    """Raises ValueError for labels, or a mask, that would be broadcast against the logits and make them all wrong."""
    if not hasattr(logits, "shape"):
        raise ValueError(f"the network gives a {type(logits).__name__}; accepted are its logits alone")
    if (shape := jnp.shape(batch[name])) != logits.shape[:-1]:
        raise ValueError(
            f"the batch has {name} of shape {shape}, the network gives logits of shape {logits.shape}; "
            f"accepted is {name} of shape {logits.shape[:-1]}"
        )
