"""The trail of a run on disk: every epoch's pruned network with its figures, and the state to resume from.

Checkpoints are Orbax's. An entry of the trail is a directory ``<epoch>`` that holds ``network``, the hard-pruned
``params`` and ``batch_stats`` as ordinary dense arrays, and ``metrics``, JSON.
"""

import dataclasses
import glob
import json
import logging
import operator
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from ltp_jax.selection import named_leaves
from ltp_jax.transform import Summary, each_layer

T = TypeVar("T")
log = logging.getLogger(__name__)


class TrailError(Exception):
    """A trail or a resume state that cannot be read or written, or a request that it cannot meet."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The figures of one network of the trail. The dense network is entry 0.

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
        summary = jax.device_get(summary)
        tensors, kept = summary.tensors.items(), summary.count_kept()
        return cls(
            compression=summary.weights / max(kept, 1) if summary.weights else 1.0,
            density=kept / max(summary.weights, 1),
            densities={layer: int(n) / t.weights for path, t in tensors for layer, n in each_layer(path, t.kept)},
            thresholds={layer: float(tau) for path, t in tensors for layer, tau in each_layer(path, t.threshold)},
            **figures,
        )

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
        path = _absolute(path)
        if (path / "trail").is_dir():
            path = path / "trail"
        if not path.is_dir() and not create:
            raise TrailError(f"there is no trail in {path}")
        self.path = path
        self._read: dict[int, Entry] = {}
        if create and path.is_dir():
            for epoch in ocp.utils.checkpoint_steps(path):
                self._entry(epoch)  # of one that it cannot read Orbax would not say which
        self._manager = _manager(path, max_to_keep=None) if create else None

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs that have an entry, those that are still being written included."""
        steps = ocp.utils.checkpoint_steps(self.path) if self._manager is None else self._manager.all_steps()
        return tuple(sorted(steps))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The figures of all entries, by epoch."""
        self.wait()
        return tuple(self._entry(epoch) for epoch in self.epochs)

    @property
    def dense(self) -> Entry:
        """The network before pruning."""
        if not (entries := self.entries) or entries[0].epoch != 0:
            raise TrailError(f"the trail in {self.path} lacks the dense network, entry 0")
        return entries[0]

    def pareto(self) -> tuple[Entry, ...]:
        """The entries that no other beats in both compression and top-1, by rising compression."""
        return pareto(self.entries)

    def pick(self, *, min_compression: float | None = None, max_top1_drop: float | None = None) -> Entry:
        """The entry that meets the request best.

        Args:
          min_compression: ask for at least this compression.
          max_top1_drop: ask for a top-1 of at most so many points below the dense network's.

        Returns:
          Of the entries that meet the request, the sparsest if a drop was allowed, else the most accurate.

        Raises:
          TrailError: if none does, naming the nearest; or if nothing is asked for.
        """
        if min_compression is None and max_top1_drop is None:
            raise TrailError("ask for min_compression, max_top1_drop, or both")
        entries = self.entries
        if not entries:
            raise TrailError(f"the trail in {self.path} has no entry yet")
        wanted_compression = 0.0 if min_compression is None else min_compression
        # Accuracies are counts of images in percent, targets are met to one weight in a million: a rounding error must
        # not decide.
        wanted_top1 = -np.inf if max_top1_drop is None else self.dense.top1 - max_top1_drop - 1e-6
        met = [e for e in entries if e.compression >= wanted_compression * (1 - 1e-5) and e.top1 >= wanted_top1]
        if met and max_top1_drop is not None:
            return max(met, key=lambda e: (e.compression, e.top1))
        if met:
            return max(met, key=lambda e: (e.top1, e.compression))

        def shortfall(e: Entry) -> float:
            accuracy = max(wanted_top1 - e.top1, 0.0)
            return accuracy + max(np.log2(wanted_compression / e.compression) if wanted_compression else 0.0, 0.0)

        asked = [] if min_compression is None else [f"at least {min_compression:g}×"]
        asked += [] if max_top1_drop is None else [f"at most {max_top1_drop:g} points below {self.dense.top1:.2f} %"]
        raise TrailError(f"no entry has {' and '.join(asked)}; the nearest is {min(entries, key=shortfall)}")

    def restore(self, entry: Entry) -> dict[str, Any]:
        """The network of an entry: ``{"params": ..., "batch_stats": ...}``, nested dicts of numpy arrays."""
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
            or the network cannot be kept; also for an earlier entry that failed in the background.
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
        figures = json.loads(json.dumps(entry.figures(), default=lambda figure: figure.item()))
        metrics, network = ocp.args.JsonSave(figures), ocp.args.StandardSave(_plain(params, batch_stats))
        with _writing(self.path):
            # Without force one of an epoch before the latest, which was lost, would be passed over.
            self._manager.save(epoch, args=ocp.args.Composite(network=network, metrics=metrics), force=True)

    def wait(self) -> None:
        """Returns when all entries are on disk."""
        if self._manager is not None:
            with _writing(self.path):
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
                metrics = json.loads((self.path / str(epoch) / "metrics" / "metrics").read_text())
                metrics.pop("gap")
                self._read[epoch] = Entry(**metrics)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise TrailError(
                    f"entry {epoch} of {self.path} cannot be read: {_in_one_line(error)}; the others can be once "
                    f"{self.path / str(epoch)} is removed, and this one can be saved anew"
                ) from error
        return self._read[epoch]


def pareto(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Those of the entries that no other beats in both compression and top-1, by rising compression."""
    front: list[Entry] = []
    for entry in sorted((e for e in entries if e.top1 == e.top1), key=lambda e: (-e.compression, -e.top1)):
        if not front or entry.top1 > front[-1].top1:
            front.append(entry)
    return tuple(reversed(front))


class Resume:
    """The latest two training states of a run, apart from its trail.

    Args:
      path: the directory, made if it is not there. It is of these states alone: the third removes the first.

    Raises:
      TrailError: if it holds what a trail, or somebody else, has numbered; or it cannot be written to.
    """

    def __init__(self, path: str | Path):
        self.path = _absolute(path)
        for step in ocp.utils.checkpoint_steps(self.path) if self.path.is_dir() else ():
            if not (self.path / str(step) / "state").is_dir():
                raise TrailError(
                    f"{self.path / str(step)} is no state to resume from, and would be removed in time; give states "
                    "a directory of their own"
                )
        self._manager = _manager(self.path, max_to_keep=2)
        self._latest: int | None = None  # of this run: saved by it, or restored

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a state, those that are still being written included."""
        return tuple(sorted(self._manager.all_steps()))

    def save(self, step: int, state: Any) -> None:
        """Writes a state in the background; that of a step that was just saved or restored is there already.

        Raises:
          TrailError: if the directory has a state of this step or a later one by another run, which would be restored
            in its place; as ``Trail.save`` if it cannot be written.
        """
        if step == self._latest:
            return
        if later := [there for there in self.steps if there >= step]:
            raise TrailError(
                f"{self.path} has a state of step {max(later)} already, which would be restored in place of this one "
                f"of step {step}; go on from that one, remove the directory, or name another"
            )
        with _writing(self.path):
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)
        self._latest = step

    def restore(self, abstract_state: T) -> T | None:
        """The latest state that can be read, or None if none was saved. Later ones, which cannot, are removed.

        Args:
          abstract_state: ``jax.ShapeDtypeStruct`` leaves with the shardings wanted, which need not be those it was
            saved with.

        Raises:
          TrailError: if states are there and none can be read as such a state.
        """
        self.wait()
        failure, broken = None, []
        for step in reversed(self.steps):
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
                state = self._manager.restore(step, args=args)["state"]
            except Exception as error:  # Orbax raises what its parts raise
                log.warning("the state of step %d in %s cannot be read: %s", step, self.path, _in_one_line(error))
                failure = failure or error
                broken.append(step)
                continue
            self._latest = step
            # They would stand in the way of the same steps, and be kept in place of a good one.
            with _writing(self.path):
                for step in broken:
                    self._manager.delete(step)
            return state
        if failure is not None:
            raise TrailError(
                f"no state in {self.path} can be read as one of this run ({_in_one_line(failure)}); "
                "remove that directory to start over"
            ) from failure
        return None

    def wait(self) -> None:
        """Returns when all states are on disk."""
        with _writing(self.path):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self.wait()
        self._manager.close()


def holds_network(path: Path) -> bool:
    """Whether a directory is a network that ``save_network`` wrote, or that of an entry; it may be damaged."""
    return (path / "_METADATA").exists()


def save_network(path: str | Path, params: Any, batch_stats: Any) -> None:
    """Writes one network, in the form that entries of a trail have; returns when it is on disk.

    Args:
      path: the directory that it becomes; a network that is there is replaced.
      params: the parameters.
      batch_stats: the batch statistics.

    Raises:
      TrailError: if the directory holds anything else, cannot be written, or the network cannot be kept.
    """
    path = _absolute(path)
    if path.is_dir() and any(path.iterdir()) and not holds_network(path):
        raise TrailError(
            f"{path} holds other things than a network, which would be lost; name a directory for it alone"
        )
    with _writing(path), ocp.StandardCheckpointer(async_options=_directories_first()) as checkpointer:
        checkpointer.save(path, _plain(params, batch_stats), force=True)


def _plain(params: Any, batch_stats: Any) -> dict[str, Any]:
    """A network as nested dicts of arrays, without the boxes of NNX variables and of Linen metadata.

    Random streams of an NNX network are left out: they are no part of it, and a key would come back as mere numbers.
    Raises TrailError where two tensors would be one.
    """

    def plain(tree: Any) -> Any:
        if isinstance(tree, nnx.State):
            return nnx.to_pure_dict(nnx.filter_state(tree, nnx.Not(nnx.RngState)))
        return tree

    def is_state(tree: Any) -> bool:
        return isinstance(tree, nnx.State)

    network = nn.meta.unbox(jax.tree.map(plain, {"params": params, "batch_stats": batch_stats}, is_leaf=is_state))
    names = Counter(path.replace("/", ".") for path, _ in named_leaves(network))  # as Orbax has them
    if again := [name for name, count in names.items() if count > 1]:
        raise TrailError(f"two tensors would both be {again[0]} on disk; give one of them a name without dots")
    return network


def restore_network(path: str | Path) -> dict[str, Any]:
    """Reads a network: ``{"params": ..., "batch_stats": ...}``, nested dicts of numpy arrays.

    Raises:
      TrailError: if there is none, or it is broken.
    """
    path = _absolute(path)
    if not path.is_dir():
        raise TrailError(f"there is no network in {path}")
    try:
        # Each process of a job reads for itself.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise ValueError("it is damaged, or was not written by this project")
            tree = metadata.tree
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    except Exception as error:  # Orbax raises what its parts raise
        raise TrailError(f"the network in {path} cannot be read: {_in_one_line(error)}") from error


def _absolute(path: str | Path) -> Path:
    """Raises TrailError for an address, which as a path is a folder of that name in the current one, and a pattern."""
    if re.match("[a-z][a-z0-9]+:/", str(path)):
        raise TrailError(f"{path} is no path of a file system; accepted is one, such as that of a mounted bucket")
    path = Path(path).expanduser().absolute()
    if path != Path(glob.escape(str(path))):
        # Orbax would write there, and look for it among the paths that the pattern fits.
        raise TrailError(f"{path} is a pattern to Orbax; accepted is a path without *, ? and [")
    return path


def _manager(path: Path, max_to_keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        create=True,
        cleanup_tmp_directories=True,
        async_options=_directories_first(),
        # Trail and resume state are written at the same time, and their barriers must not be taken for each other's.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=path.name),
    )
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass  # Orbax would wait for minutes before it says that nothing can be written there
        return _Manager(path, options=options)


def _directories_first() -> ocp.options.AsyncOptions:
    """Makes directories before the rest goes on in the background: where one cannot be made there, Orbax leaves threads
    that wait for it minutes beyond the end of a script."""
    return ocp.options.AsyncOptions(create_directories_asynchronously=False)


class _Manager(ocp.CheckpointManager):
    """Saves when it is told to and at no other time.

    Orbax would ask JAX whether the job is being preempted, and give the number of the checkpoint for the step that was
    come to. The processes agree on when to stop by the steps that they tell: epochs would mislead them.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _writing:
    """Turns what Orbax raises while it writes into one TrailError."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception):
            raise TrailError(
                f"cannot write to {self._path}: {_in_one_line(error)}; what was saved before is whole, and the same "
                "command goes on from there once this is mended; if need be, make room or allow it to write"
            ) from error


def _in_one_line(error: BaseException) -> str:
    """The first line of a message, and what it announces."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    # Where a line only announces what is the matter, the next one says it.
    for line in filter(None, map(str.strip, others)):
        if not first.endswith(":"):
            break
        first += f" {line}"
    return first[:300]
