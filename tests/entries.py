"""Entries of a trail with figures made by hand."""

from typing import Any

from ltp_jax.trail import Entry


def entry(epoch: int, compression: float = 1.0, top1: float = 90.0, **figures: Any) -> Entry:
    """One of a network with one tensor; ``figures`` are those that are not to be the usual ones."""
    usual = {
        "step": 10 * epoch,
        "density": 1 / compression,
        "densities": {"conv/kernel": 1 / compression},
        "thresholds": {"conv/kernel": 0.25},
        "top5": 99.0,
        "loss": 0.5,
        "soft_top1": top1 + 0.5,
        "soft_top5": 99.0,
        "soft_loss": 0.4,
        "train_loss": 0.3 if epoch else None,
    }
    return Entry(epoch=epoch, compression=compression, top1=top1, **usual | figures)
