"""Many processes as one job: how they find each other, stop together, and do not wait for one that is lost."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from experiments.config import ConfigError, DistributedConfig

log = logging.getLogger("experiments")

START_AGAIN = os.EX_TEMPFAIL
"""The exit code, 75, of a run that the same command goes on with. Schedulers that retry can be told to look for it."""


class Preempted(Exception):
    """The run was asked to stop, and has saved its state."""


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes of the job, before anything else touches a device.

    Without options the cluster's environment decides: Cloud TPU, Slurm, Kubernetes and Open MPI, as JAX detects them.
    Where there is none, the process is a job of its own. A second call does nothing.

    Raises:
      ConfigError: if the options are not complete, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    options = (config.coordinator_address, config.num_processes, config.process_id)
    explicit = any(option is not None for option in options)
    if explicit and None in options:
        raise ConfigError(
            "--distributed.coordinator-address, --distributed.num-processes and --distributed.process-id are accepted "
            "all together, or none of them where the cluster's environment says them"
        )
    try:
        jax.distributed.initialize(
            *options,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            cluster_detection_method="deactivate" if explicit else None,
        )
    except ValueError as error:
        # What JAX says where it detects no cluster. Any other error is of a cluster whose processes must not go on as
        # if each were alone.
        if explicit or "coordinator_address should be defined" not in str(error):
            raise ConfigError(f"the processes of this job cannot find each other: {error}") from error
    except RuntimeError as error:
        raise ConfigError(f"the processes of this job cannot reach each other: {error}") from error


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


@contextlib.contextmanager
def nobody_waits(explain: Callable[[Exception], tuple[str, int]]) -> Iterator[None]:
    """Ends this process at once if the body fails in a job of several: cleaning up would wait for the others.

    They notice, by their broken connections or at the latest by missing heartbeats, and end as well.

    Args:
      explain: the message and the exit code for an error.
    """
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        if not _has_others():
            raise
        message, code = explain(error)
        log.error("stopped: %s", message, exc_info=True)
        print(f"error: process {jax.process_index()} of {jax.process_count()}: {message}", file=sys.stderr)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_lost_process(error: BaseException | None) -> bool:
    """Whether an error is what a process sees when another one of its job is gone."""
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and _has_others()
        and not str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"))
    )


def _has_others() -> bool:
    # Before the processes have joined, asking for their number would start a backend.
    return jax.distributed.is_initialized() and jax.process_count() > 1
