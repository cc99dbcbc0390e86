"""The trail of a run on disk: every epoch's pruned network with its figures.

An entry of the trail is a directory ``<epoch>`` that holds ``network``, the hard-pruned ``params`` and ``batch_stats``
as ordinary dense arrays, and ``metrics``, JSON.
"""

import dataclasses
import json
import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ltp_jax.checkpoints import (
    TrailError,
    checkpoint_manager,
    checkpoint_path,
    in_one_line,
    plain_network,
    restore_network,
    writing,
)
from ltp_jax.transform import Summary, each_layer

AS_SPARSE = 0.99
"""Entries of so much of the largest compression count as equally sparse: thresholds meet a plan to about that."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The figures of one network of the trail. The dense network is entry 0.

    An accuracy or loss that was not measured is NaN.

    Attributes:
      epoch: how many epochs of pruning it has seen.
      step: the same in training steps.
      compression: prunable weights over those kept.
      density: the kept fraction of the prunable weights, in [0, 1].
      densities: the same for each pruned tensor, by path; in a stack for each layer, by path and ``[number]``.
      thresholds: ``τ`` of each, in units of ``w²``.
      top1, top5: of this network, the hard-pruned one, on held-out data; percent.
      loss: its mean cross entropy there, in nats.
      soft_top1, soft_top5, soft_loss: the same for the soft-pruned network that is trained; None if the writer did not
        evaluate it.
      train_loss: mean loss of the soft-pruned network over the epoch's training batches; None before the first epoch.
      macs_compression: multiply-accumulates of the prunable weights for one input over those of the weights kept; None
        if the writer did not count them.
    """

    epoch: int
    step: int
    compression: float
    density: float
    densities: dict[str, float]
    thresholds: dict[str, float]
    top1: float
    top5: float
    loss: float
    soft_top1: float | None = None
    soft_top5: float | None = None
    soft_loss: float | None = None
    train_loss: float | None = None
    macs_compression: float | None = None

    @classmethod
    def of(cls, summary: Summary, **figures: Any) -> "Entry":
        """The entry of a network as ``ltp_jax.summarize`` has it.

        Args:
          summary: compression, densities and thresholds. In a job of several processes each has to have all of it: make
            it with ``jax.jit(ltp_jax.summarize, out_shardings=...)``, replicated.
          **figures: what else an entry has to have: epoch, step, and the accuracy of the network.
        """
        # One by one: of a whole dictionary JAX would forget the order.
        summary = summary.replace(tensors={path: jax.device_get(tensor) for path, tensor in summary.tensors.items()})
        tensors, kept = summary.tensors.items(), summary.count_kept()
        return cls(
            compression=summary.weights / max(kept, 1) if summary.weights else 1.0,
            density=kept / max(summary.weights, 1),
            densities={layer: int(n) / t.weights for path, t in tensors for layer, n in each_layer(path, t.kept)},
            thresholds={layer: float(tau) for path, t in tensors for layer, tau in each_layer(path, t.threshold)},
            **figures,
        )

    @property
    def measured(self) -> bool:
        """Whether it has an accuracy; NaN can be compared with nothing."""
        return not math.isnan(self.top1)

    @property
    def gap(self) -> float | None:
        """The hardening gap: what top-1 loses, in points, when the soft masks become hard ones."""
        return None if self.soft_top1 is None else self.soft_top1 - self.top1

    def figures(self) -> dict[str, Any]:
        """All of them, and the gap, by name, as they are written to JSON."""
        return dataclasses.asdict(self) | {"gap": self.gap}

    def __str__(self) -> str:
        return f"epoch {self.epoch}: {self.compression:.2f}× at {self.top1:.2f} % top-1"


class Trail:
    """The trail in a directory.

    Args:
      path: the directory, or the working directory of a run, which has it as ``trail``.
      create: make it if it is not there, clear away what an interrupted run left half written, and write to it.
        Without it the trail is read alone, also while a run is writing.

    Raises:
      TrailError: if there is none; where it is to be written to, if that cannot be done, or an entry cannot be read.

    Example:
      >>> trail = Trail("runs/digits")
      >>> entry = trail.pick(min_compression=10)
      >>> network = trail.restore(entry)  # {"params": ..., "batch_stats": ...}
    """

    def __init__(self, path: str | Path, *, create: bool = False):
        path = checkpoint_path(path)
        if (path / "trail").is_dir() and not ocp.utils.checkpoint_steps(path):
            path = path / "trail"
        if not path.is_dir() and not create:
            raise TrailError(f"there is no trail in {path}")
        self.path = path
        self._read: dict[int, Entry] = {}
        if create and path.is_dir():
            for epoch in ocp.utils.checkpoint_steps(path):
                self._entry(epoch)  # of one that it cannot read Orbax would not say which
        self._manager = checkpoint_manager(path, max_to_keep=None) if create else None

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs that have an entry, those that are still being written included."""
        steps = ocp.utils.checkpoint_steps(self.path) if self._manager is None else self._manager.all_steps()
        return tuple(sorted(steps))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The figures of all entries, by epoch; waits until those that are being written are on disk.

        Raises:
          TrailError: if an entry cannot be read, or could not be written in the background.
        """
        self.wait()
        return tuple(self._entry(epoch) for epoch in self.epochs)

    @property
    def dense(self) -> Entry:
        """The network before pruning, entry 0; waits as ``entries`` does.

        Raises:
          TrailError: if the trail lacks it; as ``entries``.
        """
        if not (entries := self.entries) or entries[0].epoch != 0:
            raise TrailError(f"the trail in {self.path} lacks the dense network, entry 0")
        return entries[0]

    def pick(self, *, min_compression: float | None = None, max_top1_drop: float | None = None) -> Entry:
        """The entry that meets the request best.

        Args:
          min_compression: ask for at least this compression.
          max_top1_drop: ask for a top-1 of at most so many points below the dense network's.

        Returns:
          Of the entries that meet the request the most accurate, if a drop was allowed only of those that are as sparse
          as the sparsest of them, within 1 %: while masks still move, a target is met to that alone.

        Raises:
          TrailError: if none does, naming the nearest; or if nothing is asked for.
        """
        if min_compression is None and max_top1_drop is None:
            raise TrailError("ask for min_compression, max_top1_drop, or both")
        entries = [entry for entry in self.entries if entry.measured]
        if not entries:
            raise TrailError(f"the trail in {self.path} has no entry yet that has an accuracy")
        if max_top1_drop is not None and not self.dense.measured:
            raise TrailError(f"the dense network of the trail in {self.path} has no accuracy to be compared with")
        wanted_compression = 0.0 if min_compression is None else min_compression
        # Accuracies are counts of images in percent, targets are met to one weight in a million: a rounding error must
        # not decide.
        wanted_top1 = -np.inf if max_top1_drop is None else self.dense.top1 - max_top1_drop - 1e-6
        met = [e for e in entries if e.compression >= wanted_compression * (1 - 1e-5) and e.top1 >= wanted_top1]
        if met and max_top1_drop is not None:
            sparsest = max(e.compression for e in met)
            met = [e for e in met if e.compression >= AS_SPARSE * sparsest]
        if met:
            return max(met, key=lambda e: (e.top1, e.compression))

        def shortfall(e: Entry) -> float:
            accuracy = max(wanted_top1 - e.top1, 0.0)
            return accuracy + max(np.log2(wanted_compression / e.compression) if wanted_compression else 0.0, 0.0)

        asked = [] if min_compression is None else [f"at least {min_compression:g}×"]
        asked += [] if max_top1_drop is None else [f"at most {max_top1_drop:g} points below {self.dense.top1:.2f} %"]
        raise TrailError(f"no entry has {' and '.join(asked)}; the nearest is {min(entries, key=shortfall)}")

    def restore(self, entry: Entry) -> dict[str, Any]:
        """The network of an entry: ``{"params": ..., "batch_stats": ...}``, nested dicts of numpy arrays.

        Waits until all entries are on disk.

        Raises:
          TrailError: if the network is not there, or is broken; if an entry could not be written in the background.
        """
        self.wait()
        return restore_network(self.path / str(entry.epoch) / "network")

    def save(self, entry: Entry, params: Any, batch_stats: Any) -> None:
        """Writes an entry in the background; all processes of a job take part.

        Args:
          entry: its figures; the epoch is a whole number, 0 or more.
          params: the hard-pruned parameters, which may be donated once this returns.
          batch_stats: the batch statistics.

        Raises:
          TrailError: if the directory cannot be written, or has an entry of this epoch; if the epoch is no such number,
            a figure is not a number, or the network cannot be kept; also for an earlier entry that failed in the
            background.
        """
        if self._manager is None:
            raise TrailError(
                f"the trail in {self.path} was opened to be read, or closed; open it with create=True to add to it"
            )
        try:
            epoch = operator.index(entry.epoch)
        except TypeError:
            epoch = -1
        if epoch < 0:
            raise TrailError(f"an entry is of epoch {entry.epoch!r}; accepted is a whole number, 0 or more")
        if epoch in self._manager.all_steps():
            raise TrailError(f"the trail in {self.path} has an entry of epoch {epoch} already")
        try:
            figures = json.loads(json.dumps(entry.figures(), default=lambda figure: figure.item()))
            _from_figures(figures)
        except (AttributeError, TypeError, ValueError) as error:
            raise TrailError(
                f"the entry of epoch {epoch} cannot be kept: {in_one_line(error)}; accepted are numbers, NaN for one "
                "that was not measured"
            ) from error
        metrics, network = ocp.args.JsonSave(figures), ocp.args.StandardSave(plain_network(params, batch_stats))
        with writing(self.path):
            # Without force one of an epoch before the latest, which was lost, would be passed over.
            self._manager.save(epoch, args=ocp.args.Composite(network=network, metrics=metrics), force=True)

    def wait(self) -> None:
        """Returns when all entries are on disk."""
        if self._manager is not None:
            with writing(self.path):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory. The trail can still be read."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _entry(self, epoch: int) -> Entry:
        if epoch not in self._read:
            try:
                metrics = (self.path / str(epoch) / "metrics" / "metrics").read_text()
                self._read[epoch] = _from_figures(json.loads(metrics))
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise TrailError(
                    f"entry {epoch} of {self.path} cannot be read: {in_one_line(error)}; the others can be once "
                    f"{self.path / str(epoch)} is removed"
                ) from error
        return self._read[epoch]


def _from_figures(figures: dict[str, Any]) -> Entry:
    """The entry of ``Entry.figures`` as JSON has them.

    Raises:
      TypeError: if a figure is not a number, or is missing.
      AttributeError: if they are no table.
    """
    entry = Entry(**{name: figure for name, figure in figures.items() if name != "gap"})
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if field.name in ("densities", "thresholds"):
            good = isinstance(value, dict) and all(isinstance(figure, int | float) for figure in value.values())
        else:
            good = isinstance(value, int | float) or (value is None and field.default is None)
        if not good:
            raise TypeError(f"its {field.name} is {value!r:.40}")
    return entry


def pareto(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Those of the entries that no other beats in both compression and top-1, by rising compression."""
    front: list[Entry] = []
    for entry in sorted((e for e in entries if e.measured), key=lambda e: (-e.compression, -e.top1)):
        if not front or entry.top1 > front[-1].top1:
            front.append(entry)
    return tuple(reversed(front))
