"""How a command ends: exit codes, what a user is told of an error, and nobody who waits for a process that is gone."""

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import jax

from experiments.data.dataset import DataError
from experiments.options import ConfigError
from ltp_jax.checkpoints import TrailError

log = logging.getLogger("experiments")

START_AGAIN = os.EX_TEMPFAIL
"""The exit code, 75, of a run that the same command goes on with. Schedulers that retry can be told to look for it."""


CONFIG_ERROR = 2
"""The exit code of a command whose options cannot be carried out."""

BROKEN_CONNECTION = re.compile(
    r"Gloo .*failed|(closed|reset) by (remote )?peer|remote process exited|Broken pipe|Socket closed|heartbeat",
    re.IGNORECASE,
)
"""How collectives of the CPU (gloo) and of GPUs (NCCL), and JAX's coordination, tell of a partner that is gone."""

OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Out of memory", re.IGNORECASE)
"""How a device, or the system behind it, tells that an array does not fit."""


class RunError(Exception):
    """A run that cannot go on. The message says why and what to do."""


class Preempted(BaseException):
    """The run was asked to stop, and nothing that it saved is lost.

    Like KeyboardInterrupt it is no error, which ``except Exception`` would take for one.
    """


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process: a user's mistake becomes one message on stderr and a non-zero exit.

    A command that was asked to stop, or lost one of its processes, exits with ``START_AGAIN``. Where JAX itself notices
    the loss, between two programs, it aborts the process, with a message and a stack dump of its own.
    """
    sys.unraisablehook = _unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "×" shows "?"
    logging.raiseExceptions = False  # of a log that cannot be written, as on a full disk, it would dump the stack
    try:
        with stops_when_asked(), nobody_waits():
            main()
        code = 0
    except Preempted as notice:
        if log.handlers:
            log.info("%s", notice)
        else:  # asked before the log has begun, or of a command that has none
            print(notice, file=sys.stderr)
        if jax.distributed.is_initialized():
            sys.exit(START_AGAIN)  # together: the first process must not leave while others are still saving
        end_at_once(START_AGAIN)
    except (ConfigError, DataError, TrailError, RunError, OSError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not out_of_memory(error):
            raise
        message, code = explain(error)
        print(f"error: {message}", file=sys.stderr)
        log.debug("stopped", exc_info=True)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        end_at_once(130)
    sys.exit(code)


def _unraisable(unraisable: Any) -> None:
    """Prints what no one could catch, but for what is left of Orbax's reads and writes behind one that has failed.

    A request to stop that came in a callback, such as that of JAX at a garbage collection, is made again.
    """
    request = {KeyboardInterrupt: signal.SIGINT, Preempted: signal.SIGTERM}.get(unraisable.exc_type)
    if request is not None:
        threading.Timer(0.05, os.kill, (os.getpid(), request)).start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def explain(error: Exception) -> tuple[str, int]:
    """What to tell the user of an error, and the exit code of the process."""
    if isinstance(error, ConfigError):
        return str(error), CONFIG_ERROR
    if (said := lost_process(error)) is not None:
        return (
            "another process of this job is gone; start all of them again with the same command, and the run goes on "
            f"from the last saved state ({said})",
            START_AGAIN,
        )
    if isinstance(error, OSError):
        said = f"{error.filename or 'the system'}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            said += "; what was saved before is whole: make room, or allow it to write, and give the same command again"
        return said, 1
    if isinstance(error, DataError | TrailError | RunError):
        return str(error), 1
    if out_of_memory(error):
        said = str(error).partition("\n")[0]
        return (
            "the memory of the device does not suffice; what was saved before is whole. Smaller batches need less, of "
            f"training and of the training before it, and more devices share them ({said[-200:]})",
            1,
        )
    return f"{type(error).__name__}: {error}", 1


@contextlib.contextmanager
def stops_when_asked() -> Iterator[None]:
    """Takes SIGTERM as a request to end at once, by ``Preempted``, wherever ``preemption_notice`` does not take it."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Preempted("asked to stop: what was saved is whole, and the same command goes on from there")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def nobody_waits() -> Iterator[None]:
    """Ends this process at once if the body fails in a job of several: cleaning up would wait for the others.

    They notice, by their broken connections or at the latest by missing heartbeats, and end as well.
    """
    try:
        yield
    except Exception as error:
        if not has_others():
            raise
        message, code = explain(error)
        if log.handlers:  # before the log has begun, it would come to the terminal with its stack
            log.error("stopped: %s", message, exc_info=True)
        print(f"error: process {jax.process_index()} of {jax.process_count()}: {message}", file=sys.stderr)
        end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """Ends the process without tearing down what devices and threads are still at work on."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_process(error: BaseException | None) -> str | None:
    """What an error, or its cause, says of another process of the job that is gone; None if it is no such error.

    An error that comes again whenever the job is started, as one of the compiler does, must not be taken for one.
    """
    if error is None or not has_others():
        return None
    said = str(error).partition("\n")[0]
    # The statuses of a partner that does not answer, or gave up.
    unanswered = said.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"))
    if isinstance(error, jax.errors.JaxRuntimeError) and (unanswered or BROKEN_CONNECTION.search(str(error))):
        return said
    return lost_process(error.__cause__)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that an array does not fit into the memory of a device."""
    return isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def require_device() -> None:
    """Raises RunError if JAX has no device to compute on, which otherwise it says wherever it needs one first."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, for a platform that has no plugin
        said = str(error).partition("\n")[0] or f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')}"
        raise RunError(
            f"JAX finds no device to compute on: {said}. End the process that holds it, install jax[tpu] or "
            "jax[cuda13], or set JAX_PLATFORMS=cpu"
        ) from error


def has_others() -> bool:
    """Whether this process is one of a job of several."""
    # Before the processes have joined, asking for their number would start a backend.
    return jax.distributed.is_initialized() and jax.process_count() > 1
