"""What every command does with its options: which values are accepted, and what is said of others."""

import dataclasses
import errno
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro

from ltp_jax.checkpoints import TrailError, checkpoint_path, is_address

T = TypeVar("T")

FLOAT32 = np.finfo(np.float32)


class ConfigError(Exception):
    """Options that cannot be carried out. The message says which, and what is accepted."""


def require(condition: bool, flag: str, value: Any, accepted: str) -> None:
    """Raises ConfigError if an option's value is not accepted, or a number that float32 makes infinite or zero."""
    if isinstance(value, float) and not abs(value) <= float(FLOAT32.max):
        raise ConfigError(f"{flag} is {value}; accepted is {accepted}, and finite in float32")
    if isinstance(value, float) and 0 < abs(value) < float(FLOAT32.tiny):
        raise ConfigError(f"{flag} is {value}, which is zero in float32; accepted is {accepted}")
    if not condition:
        raise ConfigError(f"{flag} is {value}; accepted is {accepted}")


def require_seeds(option: str, seeds: Sequence[int]) -> None:
    """Raises ConfigError if there are none, or one of them is impossible or there twice."""
    require_any(option, seeds)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ConfigError(f"{option} has {seed}; accepted is 0 to 4294967295")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{option} has one of them twice; accepted is each once")


def require_any(flag: str, values: Sequence[Any]) -> None:
    """Raises ConfigError if an option that takes several values has none."""
    if not values:
        raise ConfigError(f"{flag} is empty; accepted is one or more")


def require_compressions(flag: str, values: Sequence[float]) -> None:
    """Raises ConfigError for the first value that is no compression."""
    for value in values:
        if not 1 < value < math.inf:
            raise ConfigError(f"{flag} has {value:g}; accepted is a finite number, more than 1")


def require_local(options: Any, *names: str) -> None:
    """Raises ConfigError if one of these options names a bucket, and not a path of this machine."""
    accepted = "a path of this machine, such as one in a bucket that is mounted"
    for name in names:
        path = getattr(options, name)
        require(not is_address(path), f"--{name.replace('_', '-')}", path, accepted)


def require_checkpoint_path(flag: str, path: Path) -> None:
    """Raises ConfigError if there can be no checkpoints in a path, or below it."""
    try:
        checkpoint_path(path)
    except TrailError as error:
        raise ConfigError(f"{flag}: {error}") from error


def require_writable(flag: str, path: Path) -> None:
    """Raises ConfigError if a file cannot be written, before the work whose result it is to hold. Makes its folder."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path.parent} is a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} is {path}, which cannot be written: {error.strerror or error}") from error


def read_options(kind: type[T], *, prog: str, args: Sequence[str] | None = None, **settings: Any) -> T:
    """The options that a command line asks for: an instance of ``kind``, checked, with ``~`` as the home directory.

    Args:
      kind: a dataclass with a method ``check``, or a union of such.
      prog: the command.
      args: its words; those of this process if not given.
      **settings: what else ``tyro.cli`` takes.

    Raises:
      ConfigError: for an impossible value.
      SystemExit: after ``--help``, or an unknown option or value, with the accepted ones on stderr.
    """
    args = sys.argv[1:] if args is None else args
    # As of a variable of the shell that is not set, behind "=" or as a word of its own.
    for before, word in itertools.pairwise(("", *args)):
        if not word or (word.startswith("--") and word.endswith("=")):
            raise ConfigError(f"{word or before or 'the first word'} has no value")
    # Comments of the source are no help text: tyro would show them where an option has none.
    marks = (tyro.conf.HelptextFromCommentsOff,)
    options: Any = tyro.cli(kind, prog=prog, args=args, config=marks, **settings)
    try:
        # Not every shell does this behind the "=" of an option.
        paths = {name: value.expanduser() for name, value in vars(options).items() if isinstance(value, Path)}
    except RuntimeError as error:
        raise ConfigError(f"a path that begins with ~ has no meaning here: {error}") from error
    options = dataclasses.replace(options, **paths)
    options.check()
    return options
