"""One job of many processes: the same numbers as one process, whatever the number, also across an interruption."""

import signal
import sys
from pathlib import Path

import pytest
from pod_jobs import Jobs, assert_all_done, assert_same_numbers, assert_trail_is_whole, codes, free_port

from experiments.ending import START_AGAIN
from experiments.run import only_writer

SHARERS = """
import os, sys
from experiments.config import DistributedConfig
from experiments.distributed import initialize, sharers_of_cores

address, processes, process = (word.partition("=")[2] for word in sys.argv[1:])
initialize(DistributedConfig(
    coordinator_address=address, num_processes=int(processes), process_id=int(process)
))
os.sched_getaffinity = lambda pid: {0, 1} if process in "02" else {2, 3}
print("sharers", sharers_of_cores())
"""

APART = """
import sys
from experiments import digits, distributed
from experiments.ending import run_command

distributed.SHARED_WITHIN = 1
folder, *words = sys.argv[1:]
sys.argv = ["digits.py", f"--workdir={folder}/{words[-1][-1]}", *words]
run_command(digits.main)
"""

DIFFERENT = """
import sys
from experiments import digits
from experiments.ending import run_command

folder, *words = sys.argv[1:]
sys.argv = ["digits.py", f"--workdir={folder}", f"--train.epochs={2 + int(words[-1][-1])}", *words]
run_command(digits.main)
"""

# Two states of an array that two processes share. Then a state that process 1 cannot read is tried, and one that is not
# whole, of which only process 1 needs what is missing.
RESUME = """
import shutil, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from experiments.config import DistributedConfig
from experiments.distributed import initialize
from ltp_jax.checkpoints import Resume, TrailError

folder, address, processes, process = sys.argv[1], *(word.partition("=")[2] for word in sys.argv[2:])
initialize(DistributedConfig(
    coordinator_address=address, num_processes=int(processes), process_id=int(process)
))
split = jax.NamedSharding(jax.make_mesh((2,), ("d",)), jax.P("d"))
make = jax.jit(lambda step: {"w": step + jnp.arange(100_000.0)}, out_shardings=split)
resume = Resume(folder)
for step in (1, 2):
    resume.save(step, make(step))
resume.wait()
abstract = {"w": jax.ShapeDtypeStruct((100_000,), jnp.float32, sharding=split)}

class Blind(Resume):
    def _read(self, step, abstract_state):
        return (None, OSError("Stale file handle")) if process == "1" else super()._read(step, abstract_state)

try:
    Blind(folder).restore(abstract)
except TrailError as error:
    print(error)
print(resume.steps)
if process == "1":
    shutil.rmtree(Path(folder) / "2" / "state" / "ocdbt.process_1")
print(resume.restore(abstract)["w"].addressable_data(0)[0] % 50_000, resume.steps)
resume.close()
"""

SIGTERM, SIGKILL = str(int(signal.SIGTERM)), str(int(signal.SIGKILL))


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs, tmp_path_factory) -> Path:
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert_all_done(jobs(workdir, devices=4))
    assert_trail_is_whole(workdir)
    return workdir


def test_number_of_processes_changes_nothing(jobs, undisturbed, tmp_path):
    """Four processes of one device. Two of two devices come to these numbers in tests below."""
    workdir = tmp_path / "run"
    ended = jobs(workdir, processes=4)
    assert_all_done(ended)
    assert_trail_is_whole(workdir)
    assert_same_numbers(workdir, undisturbed)
    # The first process speaks; the others write to their own files.
    assert "epoch 3:" in ended[0].stdout
    for i in range(1, 4):
        assert "epoch" not in ended[i].stdout
        assert "epoch 3:" in (workdir / f"log-{i}.txt").read_text()


@pytest.mark.parametrize("process", [0, 1])
def test_partner_that_never_comes_is_one_message(jobs, tmp_path, process):
    words = (
        f"--distributed.coordinator-address=127.0.0.1:{free_port()}",
        "--distributed.num-processes=2",
        f"--distributed.process-id={process}",
        "--distributed.initialization-timeout=2",
    )
    ended = jobs(tmp_path / "run", *words)
    assert codes(ended) == [2], ended[0].stderr
    assert ended[0].stderr.startswith("error: the processes of this job cannot reach each other: not all of them came")
    assert ended[0].stderr.count("\n") == 1


def test_hosts_that_do_not_share_the_directory_are_one_message(jobs, tmp_path):
    """Each process has one of its own, by the last digit of its words."""
    ended = jobs.start([sys.executable, "-c", APART, str(tmp_path)], 2, 1, {})
    for i, process in enumerate(ended):
        assert process.code == 2, process.stderr
        assert process.stderr == (
            f"error: process {i} of 2: --workdir is {tmp_path / str(i)}, which is not the same directory for process 1 "
            "as for process 0; accepted is one on a file system that all hosts share\n"
        )
    assert not any(path for path in tmp_path.rglob("*") if path.is_file())


def test_processes_with_other_options_are_one_message(jobs, tmp_path):
    """Each process has a number of epochs of its own, by the last digit of its words."""
    ended = jobs.start([sys.executable, "-c", DIFFERENT, str(tmp_path / "run")], 2, 1, {})
    for i, process in enumerate(ended):
        assert process.code == 2, process.stderr
        assert process.stderr == (
            f"error: process {i} of 2: process 1 has other options, another number of images or other weights than "
            "process 0; accepted is one command for all processes of a job, and the same files for it on every host\n"
        )


def test_what_the_first_process_refuses_is_known_to_all(jobs, tmp_path):
    with only_writer(tmp_path):
        ended = jobs(tmp_path, processes=2)
    assert codes(ended) == [1, 2]
    said = f"another run is writing to {tmp_path}; wait for its end, or choose another --workdir"
    assert [process.stderr for process in ended] == [
        f"error: process 0 of 2: {said}\n",
        f"error: process 1 of 2: process 0 cannot begin: {said}\n",
    ]
    assert not list(tmp_path.iterdir())


def test_processes_with_the_same_cores_share_them(jobs):
    ended = jobs.start([sys.executable, "-c", SHARERS], 3, 1, {})
    assert_all_done(ended)
    assert [process.stdout.splitlines()[-1] for process in ended] == ["sharers 2", "sharers 1", "sharers 2"]


def test_processes_go_on_from_the_same_state(jobs, tmp_path):
    """What one of them cannot read for now stays, and all stop; what is damaged gives way to the one before in all."""
    ended = jobs.start([sys.executable, "-c", RESUME, str(tmp_path / "resume")], 2, 1, {})
    assert_all_done(ended)
    for process, said in zip(ended, ("another process of this job says so", "Stale file handle"), strict=True):
        told = process.stdout.splitlines()[-3:]
        assert told[0].startswith(f"the state of step 2 in {tmp_path / 'resume'} could not be read ({said}); it stays")
        assert told[1:] == ["(1, 2)", "1.0 (1,)"]


def test_other_number_of_processes_goes_on(jobs, undisturbed, tmp_path):
    """Two processes stop within an epoch, one stops while an entry is being written, four come to the end.

    The first and the last split the parameters over two devices.
    """
    workdir = tmp_path / "run"
    stop = {"LTP_SIGNAL": SIGTERM, "LTP_BATCH": "13", "LTP_SLOWLY": "0.3"}
    ended = jobs(workdir, "--mesh.fsdp=2", processes=2, devices=2, signals={0: stop, 1: stop})
    assert codes(ended) == [START_AGAIN, START_AGAIN], ended[0].stderr
    assert "the same command goes on from there" in ended[0].stdout
    ended = jobs(workdir, devices=4, signals={0: {"LTP_SIGNAL": SIGTERM, "LTP_WHILE_SAVING": "1"}})
    assert codes(ended) == [START_AGAIN], ended[0].stderr
    assert_all_done(jobs(workdir, "--mesh.fsdp=2", processes=4, devices=1))
    assert_trail_is_whole(workdir)
    assert_same_numbers(workdir, undisturbed)


def test_lost_process_stops_the_others(jobs, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    kill = {"LTP_SIGNAL": SIGKILL, "LTP_BATCH": "14"}
    # Not shorter: a process of a busy machine that comes to nothing for some seconds is not lost.
    heartbeat = "--distributed.heartbeat-timeout=60"
    ended = jobs(workdir, heartbeat, processes=2, devices=2, signals={1: kill})
    assert ended[1].code == -signal.SIGKILL
    # By its broken connection the run notices it and says so. While no connection is open yet, between two programs,
    # JAX notices missing heartbeats, and ends the process with a message of its own.
    if ended[0].code == START_AGAIN:
        assert "another process of this job is gone" in ended[0].stderr
    else:
        assert ended[0].code == -signal.SIGABRT, ended[0].stderr[-3000:]
        assert "another task died" in ended[0].stderr
    # A request to one of them stops both, after the same step.
    ended = jobs(
        workdir, processes=2, devices=2, signals={1: {"LTP_SIGNAL": SIGTERM, "LTP_BATCH": "3", "LTP_SLOWLY": "0.3"}}
    )
    assert codes(ended) == [START_AGAIN, START_AGAIN], ended[0].stderr
    assert_all_done(jobs(workdir, processes=2, devices=2))
    assert_trail_is_whole(workdir)
    assert_same_numbers(workdir, undisturbed)
