"""Runs an experiment with several seeds and keeps the figures of their trails.

    python -m experiments.benchmarks.seeds
    python -m experiments.benchmarks.seeds --experiment=fashion_mnist --options=--data-dir=/data/tfds

What goes to the experiment itself is given by `--options`, word by word.
"""

import dataclasses
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal

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
from ltp_jax.checkpoints import TrailError
from ltp_jax.trail import Trail

PROG = "python -m experiments.benchmarks.seeds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
    """Several seeds of one experiment."""

    experiment: Literal["digits", "fashion_mnist", "cifar10"] = "digits"
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Their seeds: of initialisation, data order, augmentation and dropout."""
    workdir: Path = Path("runs/seeds")
    """Where the runs write; a finished one is not run again."""
    out: Path | None = None
    """The JSON file to write; EXPERIMENT.json in --workdir if nothing is said."""
    max_top1_drop: float = 1.0
    """The entry of each trail that is told of: the sparsest at most so many points below its dense network."""
    options: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A word for the experiment's own command line, as in --options=--ltp.leak=0.3; may be given several times."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_local(self, "out")
        require_checkpoint_path("--workdir", self.workdir)
        require_seeds("--seeds", self.seeds)
        require(self.max_top1_drop >= 0, "--max-top1-drop", self.max_top1_drop, "0 or more")


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
        words = [*config.options, "--seed", str(seed), "--workdir", str(workdir)]  # the last of an option counts
        code = ended([sys.executable, "-m", f"experiments.{config.experiment}", *words])
        if code == START_AGAIN:
            raise Preempted(f"the run with seed {seed} was stopped; the same command goes on from there")
        if code:
            raise RunError(f"the run with seed {seed} ended with code {code}; its message stands above")
        trail = Trail(workdir)
        runs.append({"seed": seed, "entries": [entry.figures() for entry in trail.entries]})
        try:
            entry, dense = trail.pick(max_top1_drop=config.max_top1_drop), trail.dense
        except TrailError as error:
            raise RunError(str(error)) from error
        runs[-1]["picked"] = {
            "epoch": entry.epoch,
            "compression": entry.compression,
            "top1": entry.top1,
            "drop": dense.top1 - entry.top1,
        }
        runs[-1]["largest_gap"] = max(abs(e["gap"]) for e in runs[-1]["entries"])
    picked = [run["picked"] for run in runs]
    mean = {name: statistics.mean(p[name] for p in picked) for name in ("compression", "top1", "drop")} | {
        "largest_gap": max(run["largest_gap"] for run in runs)
    }
    command = " ".join([PROG, *map(shlex.quote, sys.argv[1:])])
    write_json(out, {"command": command, "mean": mean, "runs": runs})
    for run, p in zip(runs, picked, strict=True):
        print(f"seed {run['seed']}: {p['compression']:.2f}x, {p['drop']:+.2f} points below dense, epoch {p['epoch']}")
    print(f"mean: {mean['compression']:.2f}x, {mean['drop']:+.2f} points below dense; written to {out}")


if __name__ == "__main__":
    run_command(main)
