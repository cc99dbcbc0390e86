"""One process that is stopped at any moment ends in the bits of the run that nobody disturbed."""

import random
import signal
from pathlib import Path

import pytest
from pod_jobs import START_AGAIN, Jobs, assert_all_done, assert_trail_is_whole, codes, final_bits


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert_all_done(jobs(workdir))
    assert_trail_is_whole(workdir)
    return workdir


def test_ten_random_moments(jobs, undisturbed, tmp_path):
    """One run is stopped ten times, by SIGTERM and by SIGKILL in turn, anywhere from its first batch to its saves."""
    moments = random.Random(0)
    workdir = tmp_path / "run"
    for i in range(10):
        number = signal.SIGKILL if i % 2 else signal.SIGTERM
        moment = {
            "LTP_SIGNAL": str(int(number)),
            "LTP_BATCH": str(moments.randint(1, 9)),
            "LTP_DELAY": f"{moments.choice((0.0, moments.uniform(0, 0.5))):.3f}",
        }
        ended = jobs(workdir, signals={0: moment})
        assert ended[0].code in (0, START_AGAIN, -signal.SIGKILL), ended[0].stderr[-3000:]
    assert_all_done(jobs(workdir))
    assert_trail_is_whole(workdir)
    assert final_bits(workdir) == final_bits(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_while_an_entry_is_written(jobs, undisturbed, tmp_path, number):
    workdir = tmp_path / "run"
    moment = {"LTP_SIGNAL": str(int(number)), "LTP_WHILE_SAVING": "1"}
    ended = jobs(workdir, f"--dense={undisturbed / 'dense'}", signals={0: moment})
    assert codes(ended) == [START_AGAIN if number == signal.SIGTERM else -signal.SIGKILL], ended[0].stderr
    assert_all_done(jobs(workdir, f"--dense={undisturbed / 'dense'}"))
    (workdir / "dense").symlink_to(undisturbed / "dense")
    assert_trail_is_whole(workdir)
    assert final_bits(workdir) == final_bits(undisturbed)
