"""One process that is stopped at any moment ends in the bits of the run that nobody disturbed."""

import random
import signal
from pathlib import Path

import pytest
from pod_jobs import Jobs, assert_all_done, assert_trail_is_whole, codes, final_bits, metrics

from experiments.ending import START_AGAIN


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert_all_done(jobs(workdir))
    assert_trail_is_whole(workdir)
    return workdir


def test_random_moments(jobs, undisturbed, tmp_path):
    """A run of 36 steps is stopped five times, within seven each, anywhere from its first batch to its saves."""
    moments = random.Random(0)
    workdir = tmp_path / "run"
    for i in range(5):
        number = signal.SIGKILL if i % 2 else signal.SIGTERM
        moment = {
            "LTP_SIGNAL": str(int(number)),
            "LTP_BATCH": str(moments.randint(1, 5)),
            "LTP_DELAY": f"{moments.choice((0.0, moments.uniform(0, 0.2))):.3f}",
            "LTP_SLOWLY": "0.1",
        }
        ended = jobs(workdir, signals={0: moment})
        assert codes(ended) == [-number if number == signal.SIGKILL else START_AGAIN], ended[0].stderr[-3000:]
    assert_all_done(jobs(workdir))
    assert_trail_is_whole(workdir)
    assert final_bits(workdir) == final_bits(undisturbed)


def test_while_an_entry_is_written(jobs, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    moment = {"LTP_SIGNAL": str(int(signal.SIGKILL)), "LTP_WHILE_SAVING": "1"}
    ended = jobs(workdir, f"--dense={undisturbed / 'dense'}", signals={0: moment})
    assert codes(ended) == [-signal.SIGKILL], ended[0].stderr
    assert_all_done(jobs(workdir, f"--dense={undisturbed / 'dense'}"))
    (workdir / "dense").symlink_to(undisturbed / "dense")
    assert_trail_is_whole(workdir)
    assert final_bits(workdir) == final_bits(undisturbed)


def test_between_the_state_of_an_epoch_and_its_entry(jobs, undisturbed, tmp_path):
    """No step of the epoch is done again, and the entry is made from the state."""
    workdir = tmp_path / "run"
    moment = {"LTP_SIGNAL": str(int(signal.SIGKILL)), "LTP_BEFORE_ENTRY": "1"}
    ended = jobs(workdir, f"--dense={undisturbed / 'dense'}", signals={0: moment})
    assert codes(ended) == [-signal.SIGKILL], ended[0].stderr
    assert (workdir / "resume" / "9").is_dir()
    assert [path.name for path in (workdir / "trail").iterdir()] == ["0"]
    again = jobs(workdir, f"--dense={undisturbed / 'dense'}")
    assert_all_done(again)
    assert "prune: goes on from step 9" in again[0].stdout
    (workdir / "dense").symlink_to(undisturbed / "dense")
    assert_trail_is_whole(workdir)
    assert final_bits(workdir) == final_bits(undisturbed)
    pruning = [[row for row in metrics(path) if row["stage"] == "prune"] for path in (workdir, undisturbed)]
    assert pruning[0] == pruning[1]
