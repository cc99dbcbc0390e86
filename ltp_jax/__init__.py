"""Learned Threshold Pruning for JAX and Flax."""

from ltp_jax.selection import DEFAULT_RULES, Plan, Rule, plan
from ltp_jax.transform import (
    PruneState,
    Summary,
    hard_prune,
    init,
    l0,
    mask,
    soft_prune,
    soft_prune_and_count,
    summarize,
    total_cost,
)
from ltp_jax.trees import named_leaves

__all__ = [
    "DEFAULT_RULES",
    "Plan",
    "PruneState",
    "Rule",
    "Summary",
    "hard_prune",
    "init",
    "l0",
    "mask",
    "named_leaves",
    "plan",
    "soft_prune",
    "soft_prune_and_count",
    "summarize",
    "total_cost",
]
