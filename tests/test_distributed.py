"""How a process is told of the others of its job: options, requests to stop, and errors that mean a lost one."""

import signal

import jax
import pytest

from experiments import distributed
from experiments.config import DistributedConfig
from experiments.ending import START_AGAIN, explain, lost_process, run_command
from experiments.options import ConfigError
from ltp_jax.checkpoints import TrailError
from tests.commands import run_python


@pytest.mark.parametrize("missing", ["coordinator_address", "num_processes", "process_id"])
def test_options_that_lack_one_are_refused(missing):
    options = {"coordinator_address": "127.0.0.1:1", "num_processes": 2, "process_id": 0}
    del options[missing]
    with pytest.raises(ConfigError, match="are accepted all together, or none of them"):
        distributed.initialize(DistributedConfig(**options))


LOST = [
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed.",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: before_save::0",
    "ABORTED: Barrier failed because service is shutting down.",
    "CANCELLED: Cancelled by the coordination service.",
    "INTERNAL: Error dispatching computation: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
    "Connection closed by peer [127.0.0.1]:20895",
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:581] Read error: Connection reset by "
    "peer",
    "INTERNAL: NCCL operation async_err failed: remote process exited or there was a network error",
    "INTERNAL: NCCL operation ncclAllReduce failed: unhandled system error. Last NCCL warning(error) log entry (may be "
    "unrelated) 'socketProgress: Connection closed by remote peer host<47861>'.",
]
COMES_AGAIN = [
    "INTERNAL: RET_CHECK failure (xla/service/spmd/spmd_partitioner.cc:1) while compiling",
    "INTERNAL: NCCL operation ncclAllReduce failed: invalid usage",
    "UNIMPLEMENTED: no such instruction on this backend",
    "FAILED_PRECONDITION: the executable is for other devices",
    "INVALID_ARGUMENT: wrong shape",
]


@pytest.fixture
def others(monkeypatch):
    """The process is one of two."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("said", LOST)
def test_lost_process_is_told_by_what_broken_connections_say(said):
    error = jax.errors.JaxRuntimeError(said)
    caused = TrailError("cannot write")
    caused.__cause__ = error
    for failure in (error, caused):
        message, code = explain(failure)
        assert code == START_AGAIN
        assert message.startswith("another process of this job is gone; start all of them again")
        assert message.endswith(f"({said.splitlines()[0]})")


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("said", COMES_AGAIN)
def test_error_that_comes_again_is_no_lost_process(said):
    assert explain(jax.errors.JaxRuntimeError(said)) == (f"JaxRuntimeError: {said}", 1)


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Out of memory allocating 83037878096 bytes.",
        "INTERNAL: Error dispatching computation: Out of memory allocating 28373055312 bytes.",
    ],
)
def test_too_little_memory_is_one_message(said, capsys):
    def main():
        raise jax.errors.JaxRuntimeError(said)

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the memory of the device does not suffice; what was saved before is whole. Smaller")
    assert told.endswith(f"({said})\n")


@pytest.mark.usefixtures("others")
def test_too_little_memory_is_no_lost_process():
    message, code = explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert (message.startswith("the memory of the device does not suffice"), code) == (True, 1)


def test_another_fault_of_the_device_shows_where_it_came_from():
    def main():
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel that fails")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel that fails"):
        run_command(main)


def test_process_that_is_alone_has_none_to_lose():
    assert lost_process(jax.errors.JaxRuntimeError(LOST[0])) is None


def test_request_to_stop_a_command_is_a_message_and_start_again():
    code = (
        "import os, signal, time\n"
        "from experiments.ending import run_command\n"
        "def main():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "run_command(main)\n"
    )
    done = run_python("-c", code, timeout=300)
    assert done.returncode == START_AGAIN
    assert done.stderr == "asked to stop: what was saved is whole, and the same command goes on from there\n"


def test_requests_to_stop_are_no_longer_taken_behind_a_command():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: None)
    assert stop.value.code == 0
    assert signal.getsignal(signal.SIGTERM) == before
