"""Many processes as one job: how they find each other, agree on what they do, and stop together."""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.config import DistributedConfig
from experiments.ending import CONFIG_ERROR, has_others, require_device
from experiments.options import ConfigError

START_SLACK = 60
"""Seconds that JAX may still take for joining the processes after this project's patience with them has ended."""

SHARED_WITHIN = 10
"""Seconds in which what one host writes to a file system that they share has to be seen by the others."""


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes of the job, before anything else touches a device.

    Without options the cluster's environment decides: Cloud TPU, Slurm, Kubernetes and Open MPI, as JAX detects them.
    Where there is none, the process is a job of its own. A second call does nothing. Then a device is looked for.

    If the others do not come in time, this ends the process with a message and the exit code of a ConfigError. JAX has
    no error for that, nor for two processes of the same id: it aborts the process, with a stack dump on stderr.

    Raises:
      ConfigError: if the options are not complete, or JAX cannot join the processes as they say.
      RunError: if there is no device.
    """
    if not jax.distributed.is_initialized():
        _join(config)
    require_device()


def _join(config: DistributedConfig) -> None:
    options = (config.coordinator_address, config.num_processes, config.process_id)
    explicit = any(option is not None for option in options)
    if explicit and None in options:
        raise ConfigError(
            "--distributed.coordinator-address, --distributed.num-processes and --distributed.process-id are accepted "
            "all together, or none of them where the cluster's environment says them"
        )

    def join() -> None:
        jax.distributed.initialize(
            *options,
            initialization_timeout=config.initialization_timeout + START_SLACK,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            cluster_detection_method="deactivate" if explicit else None,
        )

    try:
        came = _ends_within(config.initialization_timeout, join)
    except ValueError as error:
        # What JAX says where it detects no cluster. Any other error is of a cluster whose processes must not go on as
        # if each were alone.
        if not explicit and "coordinator_address should be defined" in str(error):
            return
        raise ConfigError(f"the processes of this job cannot find each other: {error}") from error
    except RuntimeError as error:
        raise ConfigError(f"the processes of this job cannot reach each other: {error}") from error
    if not came:
        where = config.coordinator_address or "the address that the cluster's environment says"
        print(
            f"error: the processes of this job cannot reach each other: not all of them came to {where} within "
            f"{config.initialization_timeout} s. Start all of them, with the same address and number and each with an "
            "id of its own, and see that the first one can be reached there; --distributed.initialization-timeout "
            "gives them more time",
            file=sys.stderr,
            flush=True,
        )
        os._exit(CONFIG_ERROR)  # cleaning up would wait for the others


def _ends_within(seconds: float, action: Callable[[], None]) -> bool:
    """Whether an action ends in time. It has a thread of its own, so that this one hears signals meanwhile."""
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            action()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    return not thread.is_alive()


def check_shared(workdir: Path) -> None:
    """Makes sure that all processes of the job see one working directory, which the first one has made.

    Raises:
      ConfigError: in every process, if one of them does not see what the first one writes there.
    """
    if not has_others():
        return
    first = jax.process_index() == 0
    token = secrets.randbits(32)
    if first:  # before the others look for it: a file system may remember for long what was not there
        (workdir / f".job-{token}").touch()
    mark = workdir / f".job-{int(multihost_utils.broadcast_one_to_all(np.uint32(token)))}"
    with contextlib.suppress(OSError):
        workdir.mkdir(parents=True, exist_ok=True)  # or else it may remember that of the directory
    deadline = time.monotonic() + SHARED_WITHIN
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.asarray(seen))).tolist()
    if first:
        mark.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"--workdir is {workdir}, which is not the same directory for process {', '.join(map(str, blind))} as for "
            "process 0; accepted is one on a file system that all hosts share"
        )


def check_same(options: Mapping[str, Any]) -> None:
    """Makes sure that all processes of the job were given the same options, data and weights.

    Raises:
      ConfigError: in every process, if one of them has others than the first one.
    """
    if not has_others():
        return
    marks = multihost_utils.process_allgather(np.uint32(zlib.crc32(json.dumps(options, sort_keys=True).encode())))
    if others := np.flatnonzero(marks != marks[0]).tolist():
        raise ConfigError(
            f"process {', '.join(map(str, others))} has other options, another number of images or other weights than "
            "process 0; accepted is one command for all processes of a job, and the same files for it on every host"
        )


def check_first(refusal: Exception | None) -> None:
    """Makes sure that the first process of the job can begin; the others would wait for it, and take it for lost.

    Args:
      refusal: why it cannot; None in the others.

    Raises:
      Exception: the refusal in the first process, a ConfigError with its message in the others.
    """
    if has_others():
        message = np.zeros(2048, np.uint8)
        said = str(refusal or "").encode()[: message.size]
        message[: len(said)] = list(said)
        told = bytes(multihost_utils.broadcast_one_to_all(message)).rstrip(b"\0").decode(errors="replace")
        if told and refusal is None:
            raise ConfigError(f"process 0 cannot begin: {told}")
    if refusal is not None:
        raise refusal


def sharers_of_cores() -> int:
    """How many processes of the job have the cores of this one, itself included; one that is bound has its own."""
    if not has_others():
        return 1
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "all"
    mark = np.uint32(zlib.crc32(f"{socket.gethostname()} {cores}".encode()))
    return int(np.count_nonzero(multihost_utils.process_allgather(mark) == mark))


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[], bool]]:
    """Takes SIGTERM, which a preempted machine gets, as a request to stop after a step.

    Yields a function to be called by every process after each of its steps. It returns True once any process got the
    signal, and after the same step in all of them.
    """
    if jax.distributed.is_initialized():
        calls, reached = 0, False

        def agreed() -> bool:
            # The processes agree on a number that none of them has come to yet, and JAX says True at just that one.
            # Steps would not do: they begin anew in each stage of a run.
            nonlocal calls, reached
            calls += 1
            reached = reached or multihost_utils.reached_preemption_sync_point(calls)
            return reached

        yield agreed
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may ask for signals
        return
    requested = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: requested.set())
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)
