"""Checkpoints on disk, which are Orbax's: single networks, and the states that a run resumes from.

Nothing else here knows how Orbax is set up, and what it raises becomes one ``TrailError``.
"""

import contextlib
import errno
import glob
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from ltp_jax.trees import named_leaves

T = TypeVar("T")
log = logging.getLogger(__name__)


class TrailError(Exception):
    """A trail, a state or a network that cannot be read or written, or a request that a trail cannot meet."""


def holds_network(path: Path) -> bool:
    """Whether a directory is a network that ``save_network`` wrote, or that of an entry; it may be damaged."""
    return (path / "_METADATA").exists()


def save_network(path: str | Path, params: Any, batch_stats: Any) -> None:
    """Writes one network, in the form that entries of a trail have; returns when it is on disk.

    Args:
      path: the directory that it becomes. It is not there yet, or empty.
      params: the parameters.
      batch_stats: the batch statistics.

    Raises:
      TrailError: if something is there already, or the directory cannot be written, or the network cannot be kept.
    """
    path = checkpoint_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise TrailError(f"{path} is there already; remove it, or name another directory")
    network = plain_network(params, batch_stats)
    with writing(path), ocp.StandardCheckpointer(async_options=_directories_first()) as checkpointer:
        checkpointer.save(path, network, force=True)  # or Orbax would refuse an empty directory


def restore_network(path: str | Path) -> dict[str, Any]:
    """Reads a network: ``{"params": ..., "batch_stats": ...}``, nested dicts of numpy arrays.

    Raises:
      TrailError: if there is none, or it is broken.
    """
    path = checkpoint_path(path)
    if not path.is_dir():
        raise TrailError(f"there is no network in {path}")
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise ValueError("it is damaged, or was not written by this project")
            tree = metadata.tree
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    except Exception as error:  # Orbax raises what its parts raise
        raise TrailError(f"the network in {path} cannot be read: {in_one_line(error)}") from error


READ, BROKEN, UNREACHED = range(3)
"""What came of reading a state; of a job, the greatest that one of its processes has."""


class Resume:
    """The latest two training states of a run, apart from its trail.

    Args:
      path: the directory, made if it is not there. It is of these states alone: the third removes the first.

    Raises:
      TrailError: if it holds what a trail, or somebody else, has numbered; or it cannot be written to.
    """

    def __init__(self, path: str | Path):
        self.path = checkpoint_path(path)
        for step in ocp.utils.checkpoint_steps(self.path) if self.path.is_dir() else ():
            if not (self.path / str(step) / "state").is_dir():
                raise TrailError(
                    f"{self.path / str(step)} is no state to resume from, and would be removed in time; give states "
                    "a directory of their own"
                )
        self._manager = checkpoint_manager(self.path, max_to_keep=2)
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
        with writing(self.path):
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)
        self._latest = step

    def restore(self, abstract_state: T) -> T | None:
        """The latest state that all processes of the job can read, or None if none was saved.

        Later ones, which are damaged, are removed.

        Args:
          abstract_state: ``jax.ShapeDtypeStruct`` leaves with the shardings wanted, which need not be those it was
            saved with.

        Raises:
          TrailError: if states are there and none can be read as such a state; or if one could not be read for a reason
            that may pass. It stays as it is then.
        """
        self.wait()
        failure, broken = None, set()
        while (step := _most(max({*self.steps} - broken, default=-1))) >= 0:
            state, error = self._read(step, abstract_state)
            verdict = _most(READ if error is None else UNREACHED if _may_pass(error) else BROKEN)
            if verdict == READ:
                self._latest = step
                # They would stand in the way of the same steps, and be kept in place of a good one.
                with writing(self.path):
                    for later in broken:
                        self._manager.delete(later)
                return state
            said = "another process of this job says so" if error is None else in_one_line(error)
            if verdict == UNREACHED:
                raise TrailError(
                    f"the state of step {step} in {self.path} could not be read ({said}); it stays as it is. Start "
                    f"again once this is mended, or has passed; without {self.path / str(step)} it goes on from the "
                    "state before"
                ) from error
            log.warning("the state of step %d in %s cannot be read: %s", step, self.path, said)
            failure = failure or said
            broken.add(step)
        if failure is not None:
            raise TrailError(
                f"no state in {self.path} can be read as one of this run ({failure}); "
                "remove that directory to start over"
            )
        return None

    def _read(self, step: int, abstract_state: T) -> tuple[T | None, Exception | None]:
        """A state, or why this process cannot read it. No other process is waited for: it may have no such trouble."""
        try:
            with ocp.Checkpointer(
                ocp.StandardCheckpointHandler(multiprocessing_options=_alone()), multiprocessing_options=_alone()
            ) as checkpointer:
                args = ocp.args.StandardRestore(abstract_state)
                return checkpointer.restore(self.path / str(step) / "state", args=args), None
        except Exception as error:  # Orbax raises what its parts raise
            return None, error

    def wait(self) -> None:
        """Returns when all states are on disk."""
        with writing(self.path):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self.wait()
        self._manager.close()


def plain_network(params: Any, batch_stats: Any) -> dict[str, Any]:
    """A network as nested dicts of arrays, without the boxes of NNX variables and of Linen metadata.

    Random streams of an NNX network are left out: they are no part of it, and a key would come back as mere numbers.
    Raises TrailError for a tensor without elements, and where two tensors would be one.
    """

    def plain(tree: Any) -> Any:
        if isinstance(tree, nnx.State):
            return nnx.to_pure_dict(nnx.filter_state(tree, nnx.Not(nnx.RngState)))
        return tree

    def is_state(tree: Any) -> bool:
        return isinstance(tree, nnx.State)

    network = nn.meta.unbox(jax.tree.map(plain, {"params": params, "batch_stats": batch_stats}, is_leaf=is_state))
    leaves = list(named_leaves(network))
    if empty := [path for path, leaf in leaves if np.size(leaf) == 0]:
        raise TrailError(f"{empty[0]} has no elements, and Orbax keeps no such tensor; leave it out of the network")
    names = Counter(path.replace("/", ".") for path, _ in leaves)  # as Orbax has them
    if again := [name for name, count in names.items() if count > 1]:
        raise TrailError(f"two tensors would both be {again[0]} on disk; give one of them a name without dots")
    return network


def checkpoint_path(path: str | Path) -> Path:
    """Where checkpoints can lie, as an absolute path; ``~`` is the home directory.

    Raises:
      TrailError: for an address, and for a pattern.
    """
    if is_address(path):
        raise TrailError(f"{path} is no path of a file system; accepted is one, such as that of a mounted bucket")
    path = Path(path).expanduser().absolute()
    if path != Path(glob.escape(str(path))):
        # Orbax would write there, and look for it among the paths that the pattern fits.
        raise TrailError(f"{path} is a pattern to Orbax; accepted is a path without *, ? and [")
    return path


def is_address(path: str | Path) -> bool:
    """Whether this is the address of a bucket. As a path ``gs://bucket/run`` is a folder ``gs:`` in the current one."""
    return re.match("[a-z][a-z0-9]+:/", str(path)) is not None


def checkpoint_manager(path: Path, max_to_keep: int | None) -> ocp.CheckpointManager:
    """Numbered checkpoints in a directory, which is made if it is not there.

    Raises:
      TrailError: if it cannot be written to.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        create=True,
        cleanup_tmp_directories=True,
        async_options=_directories_first(),
        # Trail and resume state are written at the same time, and their barriers must not be taken for each other's.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=path.name),
    )
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass  # Orbax would wait for minutes before it says that nothing can be written there
        return _Manager(path, options=options)


def _directories_first() -> ocp.options.AsyncOptions:
    """Makes directories before the rest goes on in the background: where one cannot be made there, Orbax leaves threads
    that wait for it minutes beyond the end of a script."""
    return ocp.options.AsyncOptions(create_directories_asynchronously=False)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Has each process of a job read for itself."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


def _most(value: int) -> int:
    """The greatest of the values that the processes of the job have."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def _may_pass(error: BaseException | None) -> bool:
    """Whether the file system or the device is to blame for what Orbax raised while it read, and not what it read."""
    while error is not None:
        # TensorStore's are mere ValueErrors, with the number of the file system's error among what they say.
        if isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError) or "os_error_code=" in str(error):
            return True
        error = error.__cause__
    return False


class _Manager(ocp.CheckpointManager):
    """Saves when it is told to and at no other time.

    Orbax would ask JAX whether the job is being preempted, and give the number of the checkpoint for the step that was
    come to. The processes agree on when to stop by the steps that they tell: epochs would mislead them.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what Orbax raises while it writes into one TrailError."""
    try:
        yield
    except Exception as error:
        # The names of the files that Orbax was at come first, however long.
        plain = (said for code in (errno.ENOSPC, errno.EDQUOT) if (said := os.strerror(code)) in str(error))
        raise TrailError(
            f"cannot write to {path}: {next(plain, in_one_line(error))}; what was saved before is whole, and the same "
            "command goes on from there once this is mended; if need be, make room or allow it to write"
        ) from error


def in_one_line(error: BaseException) -> str:
    """The first line of a message, and what it announces."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    # Where a line only announces what is the matter, the next one says it.
    for line in filter(None, map(str.strip, others)):
        if not first.endswith(":"):
            break
        first += f" {line}"
    return first[:300]
