"""Which tensors are pruned: rules over parameter paths, decided from shapes alone."""

import collections
import dataclasses
import math
import re
import warnings
from collections.abc import Sequence

import jax
from flax import nnx

from ltp_jax.trees import Params, named_leaves


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a selection.

    Attributes:
      pattern: a regular expression that must match the whole path of a tensor, such as ``"head/.*"``.
      prune: whether the tensors that it matches are pruned.
      min_ndim: the rule passes over tensors of fewer dimensions.
      stack_axes: the axes along which a tensor is a stack of layers, each with a threshold of its own: those that
        ``nn.scan`` and ``nn.vmap`` are told in ``variable_axes``, or that of the experts of a mixture. Counted from the
        end if negative.

    Raises:
      ValueError: if the pattern is not a regular expression.
      TypeError: if ``prune`` is not a bool, ``min_ndim`` not an int, or ``stack_axes`` not a tuple of ints.
    """

    pattern: str
    _: dataclasses.KW_ONLY
    prune: bool = True
    min_ndim: int = 0
    stack_axes: tuple[int, ...] = ()

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"the rule pattern {self.pattern!r} is not a regular expression: {error}") from error
        if type(self.prune) is not bool or type(self.min_ndim) is not int:
            raise TypeError(f"prune is {self.prune!r} and min_ndim {self.min_ndim!r}; accepted are a bool and an int")
        if not isinstance(self.stack_axes, tuple) or not all(type(axis) is int for axis in self.stack_axes):
            raise TypeError(f"stack_axes is {self.stack_axes!r}; accepted is a tuple of axes, such as (0,)")

    def matches(self, path: str, ndim: int) -> bool:
        return ndim >= self.min_ndim and re.fullmatch(self.pattern, path) is not None

    def __str__(self) -> str:
        stack = f", a stack along {', '.join(map(str, self.stack_axes))}" if self.stack_axes else ""
        return f"{'prune' if self.prune else 'keep'} {self.pattern}{stack}"


DEFAULT_RULES = (Rule(r"(.*/)?kernel", min_ndim=2),)
"""Every convolution and dense kernel, by Flax's name. Biases, normalisation and embeddings have other names."""


@dataclasses.dataclass(frozen=True)
class Selected:
    """One tensor of a plan: its path, shape, and the rule that decided (``None`` if none matched)."""

    path: str
    shape: tuple[int, ...]
    rule: Rule | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def prune(self) -> bool:
        return self.rule is not None and self.rule.prune

    @property
    def threshold_shape(self) -> tuple[int, ...]:
        """That of a scalar, or of a stack of layers the tensor's with 1 along the axes of a layer."""
        stack = {axis % len(self.shape) for axis in self.rule.stack_axes} if self.rule else set()
        return tuple(n if axis in stack else 1 for axis, n in enumerate(self.shape)) if stack else ()

    @property
    def layers(self) -> int:
        """How many layers it has, each with a threshold: one, unless it is a stack."""
        return math.prod(self.threshold_shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What is pruned and what is not: an immutable table with a row per tensor. Prints as that table.

    Attributes:
      tensors: one ``Selected`` per tensor, in the order of the pytree.
      unused_rules: the given rules that decided no tensor, most often a misspelt path.
    """

    tensors: tuple[Selected, ...]
    unused_rules: tuple[Rule, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the tensors that are pruned."""
        return tuple(tensor.path for tensor in self.tensors if tensor.prune)

    @property
    def prunable(self) -> int:
        """How many weights the selected tensors have."""
        return sum(tensor.size for tensor in self.tensors if tensor.prune)

    def __str__(self) -> str:
        rows = [
            (tensor.path, "×".join(map(str, tensor.shape)) or "scalar", f"{tensor.size:,}", str(tensor.rule or "keep"))
            for tensor in self.tensors
        ]
        total = sum(tensor.size for tensor in self.tensors)
        rows.append(("total", "", f"{total:,}", f"{self.prunable:,} in {len(self.paths)} tensors are pruned"))
        lines = [format_table(("path", "shape", "parameters", "rule"), rows, right=(1, 2))]
        lines += [f"unused rule: {rule}" for rule in self.unused_rules]
        return "\n".join(lines)


def plan(params: Params, rules: Sequence[Rule] = ()) -> Plan:
    """Decides which tensors are pruned.

    Each of them has one threshold. The layers that ``nn.scan``, ``nn.vmap`` and their like stack in one tensor share
    it, so that of layers of different scales one may be left without a weight, unless a rule names the axis along which
    they are stacked: ``Rule("blocks/.*kernel", stack_axes=(0,))``.

    Args:
      params: the parameters, or their shapes from ``jax.eval_shape``: values are not looked at.
      rules: what to decide otherwise than by default. The first rule that matches a tensor's path decides; what none
        matches is decided by the default, which prunes every convolution and dense kernel.

    Returns:
      The plan. A rule that decides no tensor is listed in it, and warned of.

    Raises:
      ValueError: if two tensors have the same path, or a tensor lacks an axis along which a rule stacks it, or has no
        other.
      TypeError: if the rules are no sequence of rules, one of the parameters is no array, or they are an NNX module.
    """
    if isinstance(params, nnx.Module):
        raise TypeError("the parameters are an NNX module, where shared layers would be met twice; give its nnx.state")
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError(f"the rules are {rules!r}; accepted is a list of ltp_jax.Rule")
    for path, leaf in named_leaves(params):
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{path} is {leaf!r}; accepted are arrays, or their shapes")
    candidates = (*rules, *DEFAULT_RULES)
    tensors = tuple(
        Selected(path, tuple(leaf.shape), next((r for r in candidates if r.matches(path, len(leaf.shape))), None))
        for path, leaf in named_leaves(params)
    )
    repeated = [path for path, n in collections.Counter(t.path for t in tensors).items() if n > 1]
    if repeated:
        raise ValueError(f"several tensors have the same path: {', '.join(repeated)}; rename one of their modules")
    for tensor in tensors:
        ndim, axes = len(tensor.shape), tensor.rule.stack_axes if tensor.rule else ()
        if not all(-ndim <= axis < ndim for axis in axes) or len({axis % ndim for axis in axes}) == ndim > 0:
            raise ValueError(
                f"{tensor.path} of shape {tensor.shape} cannot be a stack along {axes}; accepted are some of its axes, "
                "and not all of them"
            )
    used = {tensor.rule for tensor in tensors}
    result = Plan(tensors, tuple(rule for rule in rules if rule not in used))
    for rule in result.unused_rules:
        warnings.warn(f"the rule {rule.pattern!r} decides no tensor; print the plan for their paths", stacklevel=2)
    if not result.paths:
        warnings.warn("the plan prunes no tensor: by default those named 'kernel' are; give rules", stacklevel=2)
    return result


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Plain text columns under a header; the columns numbered in ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])
