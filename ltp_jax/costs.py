"""What a weight costs: how often a network uses it for one input."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import get_opaque_trace_state

from ltp_jax.selection import Plan


def uses_per_input(module: nn.Module, inputs: Any, plan: Plan, **kwargs: Any) -> dict[str, float]:
    """How many multiply-accumulates each weight of the selected kernels takes part in, for one input.

    A weight of a dense layer is used once for every position of its input but the features; one of a convolution,
    grouped or not, once for every position of its output. Positions are those of the whole batch over its inputs, so
    that a network may fold windows or frames into the batch. So ``uses · size`` is what a layer computes, and ``uses ·
    kept`` what is left of it. Nothing is computed: the network is traced with shapes alone.

    Counted are ``kernel``s of two dimensions whose module leaves the positions of its input as they are, those of
    ``nn.DenseGeneral`` and so of attention, and those with as many dimensions as their module's output, which are taken
    for convolutions. A kernel that another module reads, as a decoder that shares it, is counted for its own alone.

    Args:
      module: a Linen network.
      inputs: a batch of inputs, an array or its ``jax.ShapeDtypeStruct``; the first axis is the batch.
      plan: which tensors are pruned.
      **kwargs: of the call of the network, such as ``train=False``.

    Returns:
      The uses by path of the tensor, in the order in which the network calls their modules.

    Raises:
      ValueError: if a selected tensor is no such kernel, or is not used in this call; if the features of its module's
        output are not its last axis; if it is of a convolution with input dilation, ``nn.ConvTranspose``,
        ``nn.ConvLocal``, ``nn.Einsum`` or a ``nn.DenseGeneral`` with batch axes; or if its module is called within
        ``nn.scan``, ``nn.vmap``, ``nn.remat`` or another transform, or by another method than ``__call__``.
    """
    uses: dict[str, float] = {}
    batch = inputs.shape[0]
    outermost, root = None, None
    running: list[tuple[str, ...]] = []
    counted: dict[str, list[type]] = {}  # a module's class for each call

    def watch(next_method, args, method_kwargs, context):
        nonlocal root
        module = context.module
        if module.scope is None:  # of no network: it has no weights
            return next_method(*args, **method_kwargs)
        at_top = get_opaque_trace_state(convention="flax") == outermost
        if root is None:
            root = module.scope.root
        if at_top and module.scope.root is not root:  # another network, such as a teacher, with paths of its own
            return next_method(*args, **method_kwargs)
        # Other methods that a module calls of its own are part of its call.
        called = context.method_name == "__call__"
        if context.method_name == "setup" or (module.path in running and not called):
            return next_method(*args, **method_kwargs)
        path = "/".join((*module.path, "kernel"))
        calls = counted.setdefault(path, [])
        before = len(calls)
        running.append(module.path)
        output = next_method(*args, **method_kwargs)
        running.pop()
        # The weights are used in the innermost call: one that extends another, or shares its scope, may make it twice,
        # or pool what comes of it.
        if module.has_variable("params", "kernel") and not (called and len(calls) > before):
            calls.append(type(module))
            kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
            # A module that is called several times uses its weights as often; how often a transform calls it is not
            # known here, nor which of several modules of one scope. One call that cannot be counted leaves the sum
            # unknown.
            known = called and at_top and len(set(calls)) == 1
            given = next(iter((*args, *method_kwargs.values())), None)
            positions = _positions(module, kernel, given, output) if known else math.nan
            uses[path] = uses.get(path, 0) + positions / batch
        return output

    def trace(variables, x):
        nonlocal outermost
        outermost = get_opaque_trace_state(convention="flax")
        return module.apply(variables, x, mutable=True, rngs={"params": jax.random.key(0)}, **kwargs)

    # A network may do more while it is initialised, and this is about what it does then.
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **kwargs), inputs)
    with nn.intercept_methods(watch):
        jax.eval_shape(trace, variables, inputs)
    if absent := [path for path in plan.paths if path not in uses]:
        raise ValueError(
            f"the network calls no module with {', '.join(absent)}; the plan has to be of its parameters, those that "
            "it does not use left out by a rule"
        )
    if missing := [path for path in plan.paths if math.isnan(uses[path])]:
        raise ValueError(
            f"the uses of {', '.join(missing)} are not known: counted are tensors named 'kernel' of dense layers and "
            "convolutions that the network calls, neither transposed nor local, by no other method, and outside of "
            "nn.scan, nn.vmap and nn.remat; give their costs yourself, or leave them out by a rule"
        )
    pruned = set(plan.paths)
    return {path: n for path, n in uses.items() if path in pruned}


def _positions(module: nn.Module, kernel: jax.Array, given: Any, output: Any) -> float:
    """At how many positions of a batch a module uses its kernel in one call; NaN if that is not certain."""
    if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
        return math.prod(output.shape[: output.ndim - np.size(module.features)])
    if isinstance(module, nn.DenseGeneral | nn.ConvTranspose | nn.ConvLocal | nn.Einsum):
        return math.nan
    if isinstance(module, nn.Conv) and np.any(np.asarray(module.input_dilation or 1) != 1):
        return math.nan
    if not isinstance(output, jax.Array) or output.ndim < 2 or output.shape[-1] != kernel.shape[-1]:
        return math.nan
    if kernel.ndim == 2 and getattr(given, "shape", ())[:-1] != output.shape[:-1]:
        return math.nan  # it may have pooled what came out of the product
    return math.prod(output.shape[:-1]) if kernel.ndim in (2, output.ndim) else math.nan
