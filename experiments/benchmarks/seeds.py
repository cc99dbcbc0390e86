"""Runs an experiment with several seeds and keeps the figures of their trails, and the means of the last networks.

    python -m experiments.benchmarks.seeds
    python -m experiments.benchmarks.seeds --experiment=fashion_mnist --options=--data-dir=/data/tfds

What goes to the experiment itself is given by `--options`, word by word.
"""

import dataclasses
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.ending import START_AGAIN, Preempted, RunError, run_command
from experiments.options import (
    read_options,
    require,
    require_checkpoint_path,
    require_local,
    require_seeds,
    require_writable,
)
from experiments.record import write_json
from ltp_jax.trail import Entry, Trail

PROG = "python -m experiments.benchmarks.seeds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
    """Several seeds of one experiment."""

    experiment: Literal["digits", "fashion_mnist", "cifar10"] = "digits"
    """The experiment to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Their seeds: of initialisation, data order, augmentation and dropout."""
    workdir: Path = Path("runs/seeds")
    """Where the runs write; a finished one is not run again."""
    out: Path | None = None
    """The JSON file to write; EXPERIMENT.json in --workdir if not given."""
    options: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A word for the experiment's own command line, as in --options=--ltp.leak=0.3; may be given several times."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_local(self, "out")
        require_checkpoint_path("--workdir", self.workdir)
        require_seeds("--seeds", self.seeds)
        for word in self.options:
            own = word.partition("=")[0] in ("--seed", "--workdir", "--help", "-h")
            require(not own, "--options", word, "an option of the experiment but --seed and --workdir, which this sets")


def ended(command: list[str]) -> int:
    """The exit code of a command. A request to stop is handed on to it, and it has the time to save."""
    with subprocess.Popen(command) as process:  # which is waited for, whatever ends this
        try:
            return process.wait()
        except Preempted:
            process.terminate()
            raise


def main() -> None:
    config = read_options(Seeds, prog=PROG, description=__doc__)
    out = config.out or config.workdir / f"{config.experiment}.json"
    require_writable("--out", out)
    runs = []
    for seed in config.seeds:
        workdir = config.workdir / f"{config.experiment}-{seed}"
        words = [*config.options, "--seed", str(seed), "--workdir", str(workdir)]
        code = ended([sys.executable, "-m", f"experiments.{config.experiment}", *words])
        if code == START_AGAIN:
            raise Preempted(f"the run with seed {seed} was stopped; the same command goes on from there")
        if code:
            raise RunError(f"the run with seed {seed} ended with code {code}; its message stands above")
        runs.append({"seed": seed} | figures(Trail(workdir).entries))
    mean = {name: statistics.mean(run["last"][name] for run in runs) for name in ("compression", "top1", "drop")} | {
        "largest_gap": max(run["largest_gap"] for run in runs)
    }
    command = " ".join([PROG, *map(shlex.quote, sys.argv[1:])])
    write_json(out, {"command": command, "mean": mean, "runs": runs})
    for run in runs:
        print(f"seed {run['seed']}: {run['last']['compression']:.2f}×, {run['last']['drop']:+.2f} points below dense")
    spread = f" ± {statistics.stdev(run['last']['drop'] for run in runs):.2f}" if len(runs) > 1 else ""
    print(f"mean: {mean['compression']:.2f}×, {mean['drop']:+.2f}{spread} points below dense; written to {out}")


def figures(entries: Sequence[Entry]) -> dict[str, Any]:
    """What is kept of a finished trail: its last network, the largest hardening gap on the way, and all entries."""
    dense, last = entries[0], entries[-1]
    rows = [entry.figures() for entry in entries]
    return {
        "last": {"compression": last.compression, "top1": last.top1, "drop": dense.top1 - last.top1},
        "largest_gap": max(abs(row["gap"]) for row in rows),
        "entries": rows,
    }


if __name__ == "__main__":
    run_command(main)
