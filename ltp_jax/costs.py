"""What a weight costs: how often a network uses it for one input."""

import math
from typing import Any

import flax.linen as nn
import jax

from ltp_jax.selection import Plan


def uses_per_input(module: nn.Module, inputs: Any, plan: Plan, **kwargs: Any) -> dict[str, float]:
    """How many multiply-accumulates each weight of the selected kernels takes part in, for one input.

    A weight of a dense layer is used once for every position of its input but the batch and the features; one of a
    convolution, grouped or not, once for every position of its output. So ``uses · size`` is what a layer computes,
    and ``uses · kept`` what is left of it. Nothing is computed: the network is traced with shapes alone.

    Args:
      module: a Linen network.
      inputs: a batch of inputs, an array or its ``jax.ShapeDtypeStruct``; the first axis is the batch.
      plan: which tensors are pruned.
      **kwargs: of the call of the network, such as ``train=False``.

    Returns:
      The uses by path of the tensor.

    Raises:
      ValueError: if a selected tensor is no ``kernel`` with the features of its module's output as the last axis.
    """
    uses: dict[str, float] = {}

    def watch(next_method, args, method_kwargs, context):
        output = next_method(*args, **method_kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            kernel = context.module.get_variable("params", "kernel")
            path = "/".join((*context.module.path, "kernel"))
            if isinstance(output, jax.Array) and output.ndim > 1 and output.shape[-1] == kernel.shape[-1]:
                # A module that is called several times uses its weights as often.
                uses[path] = uses.get(path, 0) + math.prod(output.shape[1:-1])
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **kwargs), inputs)
    if missing := [path for path in plan.paths if path not in uses]:
        raise ValueError(
            f"the uses of {', '.join(missing)} are not known: only tensors named 'kernel' are counted, whose last axis "
            "is that of their module's output; give their costs yourself"
        )
    return {path: uses[path] for path in plan.paths}
