"""Flax networks as the apply functions that training takes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from ltp_jax.training import Apply
from ltp_jax.trees import named_leaves


def linen_apply(module: nn.Module, preprocess: Callable[[jax.Array], jax.Array] = lambda images: images) -> Apply:
    """A Linen module whose ``__call__`` takes images and ``train``.

    Args:
      module: the network; it may keep ``batch_stats`` and draw from the random stream ``dropout``. One that has other
        collections or streams takes an ``Apply`` of its own, whose ``batch_stats`` may hold all collections.
      preprocess: applied to the images on the device, such as their normalisation.

    The function raises ValueError if the network keeps batch statistics that were not given: Flax would begin anew with
    them.
    """

    def apply(params: Any, batch_stats: Any, images: jax.Array, *, train: bool, key: jax.Array | None):
        variables = {"params": params, "batch_stats": batch_stats}
        if not train:
            logits: Any = module.apply(variables, preprocess(images), train=False)
            return logits, batch_stats
        rngs: Any = {} if key is None else {"dropout": key}
        updated: Any
        logits, updated = module.apply(variables, preprocess(images), train=True, mutable=["batch_stats"], rngs=rngs)
        averages = updated.get("batch_stats", batch_stats)
        if missing := sorted(_paths(averages) - _paths(batch_stats)):
            raise ValueError(f"the network has batch statistics that were not given: {', '.join(missing)}")
        return logits, averages

    return apply


def nnx_apply(graphdef: nnx.GraphDef, preprocess: Callable[[jax.Array], jax.Array] = lambda images: images) -> Apply:
    """An NNX module split by ``graphdef, params, rest = nnx.split(model, nnx.Param, ...)``.

    Any other filter in the place of ``nnx.Param`` chooses what is trained; the rest is kept as it is. ``rest`` takes
    the place of the batch statistics: all the network's state that is not among the parameters. ``train``
    switches the module between ``train()`` and ``eval()``, and the key reseeds all its random streams. What it sows,
    ``nnx.Intermediate``, is dropped; what it sowed before the split raises ValueError, and so does anything else that
    it did not have then.
    """

    def apply(params: Any, batch_stats: Any, images: jax.Array, *, train: bool, key: jax.Array | None):
        if nnx.filter_state(batch_stats, nnx.Intermediate):
            raise ValueError(
                "the network was split with what it has sown; call nnx.pop(model, nnx.Intermediate) before nnx.split"
            )
        # Copied, since a module writes to its variables and those given belong to the caller's trace.
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        if train:
            model.train()
            if key is not None:
                streams = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream))
                names = sorted({stream.tag for stream in streams})
                keys: dict[str, Any] = dict(zip(names, jax.random.split(key, len(names)), strict=True))
                nnx.reseed(model, policy="match_shape", **keys)
        else:
            model.eval()
        logits = model(preprocess(images))
        nnx.pop(model, nnx.Intermediate)  # the graph definition does not know of it
        trained = {tuple(path) for path, _ in nnx.to_flat_state(params)}
        rest: Any = nnx.split(model, lambda path, _: tuple(path) in trained, ...)[2]
        if train and key is not None:
            # The streams as they were: reseeded in every step they decide nothing, and a key may be of another kind.
            rest = nnx.merge_state(rest, nnx.filter_state(batch_stats, nnx.RngState))
        if changed := sorted(_paths(rest) ^ _paths(batch_stats)):
            raise ValueError(
                f"a call of the network adds or drops {', '.join(changed)}, of which the split does not know; make its "
                "variables before nnx.split, and sow as nnx.Intermediate"
            )
        return logits, rest

    return apply


def _paths(tree: Any) -> set[str]:
    return {path for path, _ in named_leaves(tree)}
