"""What each part of LTP is worth: the paper's claims, and ideas for the way to a target, one change at a time.

$ python -m experiments.ablation run     # each variant and seed a file; goes on where it stopped
$ python -m experiments.ablation report  # the table and the picture of what is there

All on LeNet-300-100 with batch normalisation and Fashion-MNIST, judged on training images that are held out.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from matplotlib.figure import Figure

from experiments.ablation_variants import VARIANTS, Job, Variant
from experiments.compare_cells import is_count, is_number, is_positive, is_rows, is_text, read_cell, read_cells
from experiments.compare_networks import HELD_OUT, NETWORKS
from experiments.compare_report import spread
from experiments.components import kernel_decay, weights_optimizer
from experiments.config import TrainConfig
from experiments.ending import run_command
from experiments.harness import Harness, Network, Run, hold_out, what_is_left
from experiments.options import (
    ConfigError,
    read_options,
    require_checkpoint_path,
    require_local,
    require_seeds,
    require_writable,
)
from experiments.record import write_json, write_whole
from experiments.report import save_picture
from ltp_jax.pruner import Pruner

ARCH = "lenet_300_100"
EPOCHS = 10
FIELDS = {
    "variant": is_text,
    "seed": is_count,
    "compression": is_positive,
    "top1": is_number,
    "epochs": is_rows("compression", "top1", "soft_top1"),
}
"""What a run of the ablation tells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What to run."""

    command: tyro.conf.Positional[Literal["run", "report"]]
    """What to do."""
    variants: tuple[str, ...] = ()
    """Which variants, by the names in the tables of docs/ablation.md, each in quotation marks; all if not given."""
    seeds: tuple[int, ...] = (0,)
    """Of the dense network and the order of the data."""
    data_dir: Path | None = None
    """Where TFDS finds its datasets; its own default if not given."""
    workdir: Path = Path("runs/compare")
    """Where dense networks are kept; that of the comparison."""
    results: Path = Path("experiments/results/compare/ablation_lenet_300_100")
    """Where the figures are kept, a file for each run."""
    pictures: Path = Path("docs")
    """Where the picture of a report goes."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_local(self, "data_dir", "results", "pictures")
        require_checkpoint_path("--workdir", self.workdir)
        if unknown := [variant for variant in self.variants if variant not in VARIANTS]:
            raise ConfigError(f"--variants has {unknown[0]!r}; accepted are {', '.join(map(repr, VARIANTS))}")
        require_seeds("--seeds", self.seeds)
        if self.command == "report" and (self.variants or self.seeds != AblationConfig.seeds):
            raise ConfigError("--variants and --seeds go with run; report shows all runs that are there")


def file_name(variant: str, seed: int) -> str:
    """The file of a run."""
    return "".join(c if c.isalnum() else "_" for c in variant) + f"_{seed}.json"


def prepare(harness: Harness, variant: Variant, network: Network) -> tuple[Run, Pruner]:
    """A variant's training and pruner, for a dense network."""
    train = TrainConfig(
        epochs=EPOCHS,
        batch_size=128,
        learning_rate=variant.learning_rate,
        weight_decay=variant.weight_decay,
        label_smoothing=variant.label_smoothing,
    )
    steps = train.steps(harness.dataset.train_size)
    pruner = variant.make(Job(harness.plan, steps, network, harness.dataset.train_images))
    schedule = None if variant.rate is None else variant.rate(train.peak_learning_rate, steps)
    optimizer = None
    if variant.decay_until < 1:
        decay = kernel_decay(
            lambda step: jnp.where(jnp.asarray(step) < variant.decay_until * steps, variant.weight_decay, 0.0)
        )
        undecayed = weights_optimizer(dataclasses.replace(train, weight_decay=0.0), steps // train.epochs, schedule)
        optimizer = optax.chain(decay, undecayed)
    elif schedule is not None:
        optimizer = weights_optimizer(train, steps // train.epochs, schedule)
    return harness.compiled(pruner, train, variant.distill, optimizer), pruner


def measure(harness: Harness, run: Run, pruner: Pruner, network: Network, seed: int) -> dict[str, Any]:
    """One run: the last hard network, the soft one that was trained, and the hardening gap after every epoch."""
    harden = jax.jit(pruner.harden)
    soften = jax.jit(lambda state: pruner.soften(state.params, state.pruning.thresholds, state.pruning, state.step)[0])
    rows = []
    for state in run(network, seed):
        hard = harden(state.params, state.pruning)
        compression, densities = what_is_left(harness.plan, hard)
        rows.append(
            {
                "compression": compression,
                "top1": harness.top1(hard, state.batch_stats),
                "soft_top1": harness.top1(soften(state), state.batch_stats),
                "densities": densities,
            }
        )
    return {"dense_top1": harness.top1(network["params"], network["batch_stats"]), "epochs": rows} | rows[-1]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs in a folder that have all their epochs."""
    return [cell for cell in read_cells(folder, FIELDS) if len(cell["epochs"]) == EPOCHS]


def markdown(cells: list[dict[str, Any]]) -> str:
    """A row for each variant: runs, compression and top-1 of the last network, and the hardening gap on the way."""
    lines = [
        "| variant | runs | compression | top-1 % | gap of the last network | largest gap |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for variant in VARIANTS:
        found = [cell for cell in cells if cell["variant"] == variant]
        if found:
            reached = sorted({f"{cell['compression']:.1f}×" for cell in found})
            gaps = [[row["soft_top1"] - row["top1"] for row in cell["epochs"]] for cell in found]
            last = statistics.fmean(gap[-1] for gap in gaps)
            largest = max((g for gap in gaps for g in gap), key=abs)
            top1 = spread([cell["top1"] for cell in found])
            lines.append(f"| {variant} | {len(found)} | {', '.join(reached)} | {top1} | {last:+.2f} | {largest:+.2f} |")
    return "\n".join(lines) + "\n"


SERIES = {
    "eq. 14, L0 on thresholds": "L0 on thresholds alone",
    "exact gradient": "exact gradient",
    "L0 on weights too": "L0 on weights too",
    "L1": "L1 in place",
    "L2": "L2 in place",
}
"""The claims as they are drawn: a label, and how the names of the variants begin."""


def draw_claims(cells: list[dict[str, Any]]) -> Figure:
    """Where runs with the paper's choices and their opposites end, and the hardening gap on the way for each T0."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    ends, gaps = figure.subplots(1, 2)
    closer = ends.inset_axes((0.08, 0.1, 0.27, 0.5))  # most of them end between 4× and 16×
    for i, (label, start) in enumerate(SERIES.items()):
        found = [cell for cell in cells if cell["variant"].startswith(start)]
        for axes in (ends, closer):
            axes.plot(
                [c["compression"] for c in found], [c["top1"] for c in found], "os^Dv"[i], color=f"C{i}", label=label
            )
    closer.set_xlim(4, 14)
    closer.set_ylim(84.5, 91)
    closer.set_xticks([5, 10], ["5×", "10×"], fontsize=8)
    closer.tick_params(axis="y", labelsize=8)
    closer.grid(alpha=0.3)
    ends.indicate_inset_zoom(closer)
    ends.set_xscale("log")
    ends.set_xlabel("compression at the end")
    ends.set_ylabel("top-1 on held-out images, %")
    ends.set_title("the paper's choices and their opposites")
    temperatures = {1e-4: "T0 0.0001", 1e-3: "L0 on thresholds alone, eq. 14", 1e-2: "T0 0.01", 1e-1: "T0 0.1"}
    for t0, start in temperatures.items():
        found = [cell for cell in cells if cell["variant"] == f"{start}, penalty 10"]
        rows = list(zip(*[[r["soft_top1"] - r["top1"] for r in cell["epochs"]] for cell in found], strict=True))
        gaps.plot(range(1, len(rows) + 1), [max(row, key=abs) for row in rows], ".-", label=f"T0 = {t0:g}")
    gaps.axhline(0, color="black", linewidth=0.8)
    gaps.set_xlabel("epoch")
    gaps.set_ylabel("soft less hard network, points of top-1")
    gaps.set_title("hardening gap, the larger of two seeds")
    for axes in (ends, gaps):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    config = read_options(AblationConfig, prog="python -m experiments.ablation", description=__doc__)
    if config.command == "report":
        cells = read_runs(config.results)
        if not cells:
            raise ConfigError(
                f"there are no runs in {config.results}: python -m experiments.ablation run --results={config.results}"
            )
        table, picture = config.results / "table.md", config.pictures / "ablation_claims.png"
        require_writable("--pictures", picture)
        write_whole(table, markdown(cells))
        print(table)
        save_picture(draw_claims(cells), picture)
        print(picture)
        return

    def is_there(path: Path) -> bool:
        return path.exists() and len(read_cell(path, FIELDS)["epochs"]) == EPOCHS

    require_writable("--results", config.results / "table.md")
    require_writable("--workdir", config.workdir / "dense_0.json")
    setup = NETWORKS[ARCH]
    harness = Harness(hold_out(setup.load(config.data_dir), HELD_OUT), ARCH, config.workdir, setup.pretrain)
    for variant in config.variants or VARIANTS:
        missing = [seed for seed in config.seeds if not is_there(config.results / file_name(variant, seed))]
        for seed in missing:
            network = harness.dense_network(seed)
            run, pruner = prepare(harness, VARIANTS[variant], network)
            figures = {"variant": variant, "seed": seed} | measure(harness, run, pruner, network, seed)
            write_json(config.results / file_name(variant, seed), figures)
            print(f"{variant}, seed {seed}: {figures['compression']:.2f}× at {figures['top1']:.2f} %", flush=True)


if __name__ == "__main__":
    run_command(main)
