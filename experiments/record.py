"""What a working directory tells of its run: the options that it began with, and whether it is still being written."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from experiments.config import Config
from experiments.ending import RunError
from experiments.options import ConfigError

log = logging.getLogger("experiments")


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


OF_A_PROCESS = ("workdir", "data_dir", "tensorboard", "workers", "max_unreadable", "dry_run_timeout")
"""Options that say where things lie for a process, and how it does its part."""


CHECKPOINTS = ("pretrain", "trail", "resume")
"""The folders of a run that have its checkpoints by number."""
FOLDERS = (*CHECKPOINTS, "dense", "report")
"""These and two more: no other run may have one of them as its working directory."""


def of_a_job(config: Config) -> dict[str, Any]:
    """The options that all processes of a job have to have, by their names."""
    return {
        name: value
        for name, value in flatten_dict(to_json(config), sep=".").items()
        if name not in OF_A_PROCESS and not name.startswith("distributed.")
    }


def record(
    config: Config,
    *,
    images: Mapping[str, int],
    weights: str | None = None,
    pretrains: bool = True,
    write: bool = True,
) -> None:
    """Writes the configuration to the working directory, or checks that it is the one that is there.

    A run goes on only with the options that it began with; where data lie, what is shown, how many processes and
    devices share the work, when it gives up, and what has no meaning for it may change. Where nothing of a run was
    saved yet, everything may.

    Args:
      config: the options.
      images: how many the dataset has, and of how many classes: epochs and plans are counted in them.
      weights: digest of the weights that the run was given to begin from, if it was. They may have moved.
      pretrains: whether the run trains its dense network; if not, how it would has no meaning.
      write: whether this process writes the file, as one of a job does; all of them check it.

    Raises:
      ConfigError: if the directory holds a run with other options or images, naming them, or one without a record of
        them, or something of somebody else's where a run would write; if it is a folder of another run.
    """
    if config.workdir.name in FOLDERS and _is_record(config.workdir.parent / "config.json"):
        raise ConfigError(f"--workdir is {config.workdir}, where another run keeps what is its own; choose another")
    path = config.workdir / "config.json"
    new = to_json(config) | {"images": dict(images)} | ({"weights": weights} if weights else {})
    if _was_begun(config):
        try:
            old = json.loads(path.read_text())
            if not isinstance(old, dict):
                raise ValueError("it is no table")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{config.workdir} holds what a run saved, but no record of its options can be read there ({error}); "
                "choose another --workdir"
            ) from error
        free = {*OF_A_PROCESS, "mesh.fsdp", *(f"ltp.{name}" for name in config.ltp.idle)}
        if weights and old.get("weights") == weights:
            free.update(("pretrained", "dense"))
        if not pretrains:
            free.update(f"pretrain.{name}" for name in new["pretrain"])
        changed = [
            f"its images, {key.removeprefix('images.')}: {how}"
            if key.startswith("images.")
            else f"--{key.replace('_', '-')} {how}"
            for key, how in differences(flatten_dict(old, sep="."), flatten_dict(new, sep=".")).items()
            if key not in free and key != "weights" and not key.startswith("distributed.")
        ]
        if weights and "pretrained" not in free:
            changed.append(f"--{'dense' if config.dense else 'pretrained'} has other weights now")
        if changed:
            raise ConfigError(
                f"{config.workdir} holds a run with other options or data: {'; '.join(changed)}. "
                "Choose another --workdir, or the same options and data to go on with that run"
            )
    elif taken := _of_somebody_else(config):
        raise ConfigError(f"{taken} is there already, and not of a run; choose another --workdir")
    if write:
        write_json(path, new)


def _was_begun(config: Config) -> bool:
    """Whether a run has saved anything that another one would go on from."""
    folders = (config.workdir / name for name in CHECKPOINTS)
    return config.own_dense.is_dir() or any(any(folder.glob("[0-9]*")) for folder in folders)


def _of_somebody_else(config: Config) -> Path | None:
    """What is where a run would write its dense network, its record or its figures, and is not of a run."""
    if config.own_dense.is_file():
        return config.own_dense
    path = config.workdir / "config.json"
    if _is_record(path):
        return None
    return next((taken for taken in (path, config.workdir / "metrics.jsonl") if taken.exists()), None)


def _is_record(path: Path) -> bool:
    """Whether there is the record of a run. It is written as a whole: what cannot be read as one is something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"arch", "ltp"} <= found.keys()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What each value that is not the same was and is, by its name."""
    return {
        name: f"was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a record, and the folder it lies in; the file is there as a whole or not at all."""
    write_whole(path, json.dumps(values, indent=1) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, and the folder it lies in; the file is there as a whole or as it was. Text becomes UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same one
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # it has none on a full disk, or that of a file that nobody knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keeps other runs out of a directory, which is made if it is not there, until this is left or the process ends.

    Raises:
      RunError: if another run is in it. Where the file system has no locks, nobody is kept out.
      ConfigError: if it is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(
            f"--workdir is {directory}, which is a file; accepted is a directory, or a name for a new one"
        )
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another run is writing to {directory}; wait for its end, or choose another --workdir"
            ) from error
        except OSError as error:
            log.debug("%s cannot be locked: %s", directory, error)
        yield
    finally:
        os.close(handle)
