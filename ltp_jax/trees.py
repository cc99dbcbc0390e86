"""The tensors of a network by their paths, whatever pytree they are kept in."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from flax import nnx

Params = Any
"""A pytree of arrays: a Linen parameter dict, an NNX ``State`` as ``nnx.state(model, nnx.Param)``, or any other."""


def named_leaves(tree: Params) -> Iterator[tuple[str, Any]]:
    """Yields path and leaf of every tensor: ``"stem/conv/kernel"``, for Linen and NNX alike."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _path_name(keys), leaf


def map_selected(
    fn: Callable[[str, jax.Array], Any],
    params: Params,
    paths: Collection[str],
    otherwise: Callable[[jax.Array], Any] = lambda w: w,
) -> Params:
    """Applies ``fn(path, w)`` to the tensors of some paths, which it has to meet all, and ``otherwise`` to the rest.

    Raises:
      ValueError: if one of the paths is not in ``params``.
    """
    met = set()

    def visit(keys, w):
        path = _path_name(keys)
        if path not in paths:
            return otherwise(w)
        met.add(path)
        return fn(path, w)

    result = jax.tree_util.tree_map_with_path(visit, params)
    missing = [path for path in paths if path not in met]
    if missing:
        raise ValueError(f"the parameters lack {', '.join(missing)}, which the state prunes")
    return result


def nnx_variables(tree: Params) -> set[int]:
    """The ``id`` of every NNX variable in a tree: a ``State`` shares them with its model, which may write to them."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {id(leaf) for leaf in leaves if isinstance(leaf, nnx.Variable)}


def _path_name(keys: tuple[Any, ...]) -> str:
    """The path of a leaf as a string. The box of an NNX variable or of Linen metadata is no part of it.

    A field named ``value`` of a tuple or dataclass is taken for such a box: its path is that of what it is a field of.
    """
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")
