"""What each part of LTP is worth: the paper's claims, and ideas for the way to a target, one change at a time.

python -m experiments.ablation run     # each variant and seed a file; goes on where it stopped
python -m experiments.ablation report  # the table and the picture of what is there

All on LeNet-300-100 with batch normalisation and Fashion-MNIST, judged on training images that are held out.
"""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ltp_jax as ltp
from experiments.baselines import gradual_magnitude
from experiments.compare import HELD_OUT, NETWORKS
from experiments.compare_report import read_cells, spread, write_cell
from experiments.config import ConfigError, TrainConfig
from experiments.console import run_command
from experiments.harness import Harness, Run, hold_out
from ltp_jax.pruner import Pruner, learned_thresholds
from ltp_jax.target import target_density

ARCH = "lenet_300_100"
COMPRESSION = 64.0  # of the variants that have a target


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What to run."""

    command: tyro.conf.Positional[Literal["run", "report"]]
    """What to do."""
    variants: tuple[str, ...] = ()
    """Which variants; all of them if nothing is said."""
    seeds: tuple[int, ...] = (0,)
    """Of the dense network and the order of the data."""
    data_dir: str | None = None
    """Where TFDS finds its datasets; its own default if nothing is said."""
    workdir: Path = Path("runs/compare")
    """Where dense networks are kept; that of the comparison."""
    results: Path = Path("experiments/results/compare/ablation_lenet_300_100")
    """Where the figures are kept, a file for each run."""
    pictures: Path = Path("docs")
    """Where the picture of a report goes."""


Make = Callable[[ltp.Plan, int], Pruner]
"""``(plan, training steps) -> pruner``."""


def penalised(penalty: float, **options: Any) -> Make:
    """LTP to a penalty: a ramp over the first half of the run, then frozen thresholds, Adam for them."""

    def make(plan: ltp.Plan, steps: int) -> Pruner:
        learn_steps = steps // 2
        ramp = optax.linear_schedule(0.0, penalty, learn_steps)
        return learned_thresholds(plan, ramp, optax.adam(6 / learn_steps), learn_steps=learn_steps, **options)

    return make


def norm_penalised(penalty: float, order: int) -> Make:
    """The same with an L1 or L2 penalty on the pruned weights in place of L0.

    It is in units of each layer's spread: of normally distributed weights one counts 1.3 by L1 and 2.8 by L2.
    """

    def make(plan: ltp.Plan, steps: int) -> Pruner:
        pruner = penalised(0.0)(plan, steps)
        ramp = optax.linear_schedule(0.0, penalty, steps // 2)

        def norms(params: Any) -> dict[str, jax.Array]:
            leaves = dict(ltp.named_leaves(params))
            return {path: jnp.sum(jnp.abs(leaves[path]) ** order) for path in plan.paths}

        def soften(params, thresholds, state, step):
            pruned, _ = pruner.soften(params, thresholds, state, step)
            # The spread of the trained weights, Var(|w|) = T / t0, makes layers of all scales count alike.
            scales = {path: (t / 1e-3) ** (order / 2) for path, t in state.prune.temperatures.items()}
            total = sum((norm / scales[path] for path, norm in norms(pruned).items()), start=jnp.zeros(()))
            return pruned, ramp(step) * total / plan.prunable

        return pruner._replace(soften=soften)

    return make


def targeted(
    *,
    prune: float = 0.4,
    select: float = 0.75,
    t0: float = 1e-2,
    optimizer: optax.GradientTransformation | None = None,
) -> Make:
    """LTP to a target: the shares of the run that it prunes and selects in, and the offsets' optimizer."""

    def make(plan: ltp.Plan, steps: int) -> Pruner:
        return target_density(
            plan,
            1 / COMPRESSION,
            prune_steps=round(prune * steps),
            select_steps=round(select * steps),
            t0=t0,
            optimizer=optimizer,
        )

    return make


def magnitude(prune: float) -> Make:
    """Global magnitude pruning with a cubic schedule."""
    return lambda plan, steps: gradual_magnitude(plan, 1 / COMPRESSION, prune_steps=round(prune * steps), every=20)


def straight_through(make: Make, until: float) -> Make:
    """For a share of the run, pruned weights get the gradient of dense ones, so that they may come back."""

    def made(plan: ltp.Plan, steps: int) -> Pruner:
        pruner = make(plan, steps)

        def soften(params, thresholds, state, step):
            dense = jnp.where(step < until * steps, 1.0, 0.0)
            fixed = jax.lax.stop_gradient(params)
            pruned, penalty = pruner.soften(
                jax.tree.map(lambda w, f: w * (1 - dense) + f * dense, params, fixed), thresholds, state, step
            )
            return jax.tree.map(lambda v, w, f: v + dense * (w - f), pruned, params, fixed), penalty

        return pruner._replace(soften=soften)

    return made


def annealed(make: Make, end: float, until: float) -> Make:
    """The temperature falls geometrically to a share ``end`` of itself within a share ``until`` of the run."""

    def made(plan: ltp.Plan, steps: int) -> Pruner:
        pruner = make(plan, steps)

        def soften(params, thresholds, state, step):
            factor = jnp.float32(end) ** jnp.clip(step / (until * steps), 0, 1)
            temperatures = {path: t * factor for path, t in state.prune.temperatures.items()}
            cooled = state.replace(prune=state.prune.replace(temperatures=temperatures))
            return pruner.soften(params, thresholds, cooled, step)

        return pruner._replace(soften=soften)

    return made


def starting(make: Make, offsets: Callable[[ltp.Plan, Any], dict[str, jax.Array]]) -> Make:
    """Offsets begin at other values than those of LAMP: ``offsets(plan, params)`` by path."""

    def made(plan: ltp.Plan, steps: int) -> Pruner:
        pruner = make(plan, steps)

        def init(params: Any) -> Any:
            state = pruner.init(params)
            # A scale that leaves as many weights as the pruner's own.
            moved = offsets(plan, params)
            weights = dict(ltp.named_leaves(params))
            sizes = jnp.concatenate([jnp.abs(weights[path]).ravel() / jnp.exp(moved[path]) for path in plan.paths])
            whole = jnp.concatenate(
                [jnp.abs(weights[path]).ravel() / jnp.exp(state.offsets[path]) for path in plan.paths]
            )
            share = jnp.mean(whole > jnp.exp(state.log_scale))
            return state.replace(offsets=moved, log_scale=jnp.log(jnp.quantile(sizes, 1 - share)))

        return pruner._replace(init=init)

    return made


def at_zero(plan: ltp.Plan, params: Any) -> dict[str, jax.Array]:
    """The weights of all layers are compared as they are."""
    del params
    return dict.fromkeys(plan.paths, jnp.zeros((), jnp.float32))


def at_spread(plan: ltp.Plan, params: Any) -> dict[str, jax.Array]:
    """The weights of all layers are compared in units of the spread of their layer."""
    leaves = dict(ltp.named_leaves(params))
    return {path: jnp.log(jnp.std(jnp.abs(leaves[path]))) for path in plan.paths}


class Variant(NamedTuple):
    """How to make a pruner, and how the weights are trained with it."""

    make: Make
    learning_rate: float = 0.1
    weight_decay: float = 1e-3
    distill: float = 0.0


PENALTIES = (10.0, 40.0)
CLAIMS: dict[str, Make] = {
    **{f"L0 on thresholds alone, eq. 14, penalty {p:g}": penalised(p) for p in PENALTIES},
    **{f"exact gradient of the mask, penalty {p:g}": penalised(p, exact_gradient=True) for p in PENALTIES},
    **{f"L0 on weights too, penalty {p:g}": penalised(p, l0_to_weights=True) for p in PENALTIES},
    **{f"L1 in place of L0, penalty {p:g}": norm_penalised(p, 1) for p in PENALTIES},
    **{f"L2 in place of L0, penalty {p:g}": norm_penalised(p, 2) for p in PENALTIES},
    **{f"T0 {t0:g}, penalty 10": penalised(10.0, t0=t0) for t0 in (1e-4, 1e-2, 1e-1)},
}
"""The paper's choices and their opposites, to a penalty, without weight decay."""
IDEAS: dict[str, Variant] = {
    "target": Variant(targeted()),
    "target, no weight decay": Variant(targeted(), weight_decay=0.0),
    "target, weight decay 5e-4": Variant(targeted(), weight_decay=5e-4),
    "target, weight decay 2e-3": Variant(targeted(), weight_decay=2e-3),
    "target, rate 0.05": Variant(targeted(), learning_rate=0.05),
    "target, rate 0.2": Variant(targeted(), learning_rate=0.2),
    "target, pruned within 20 %": Variant(targeted(prune=0.2)),
    "target, pruned within 80 %, selects until 90 %": Variant(targeted(prune=0.8, select=0.9)),
    "target, selects until 40 %": Variant(targeted(select=0.4)),
    "target, selects until 90 %": Variant(targeted(select=0.9)),
    "target, offsets begin at zero": Variant(starting(targeted(), at_zero)),
    "target, offsets begin at the spreads": Variant(starting(targeted(), at_spread)),
    "target, one threshold for all layers": Variant(starting(targeted(optimizer=optax.sgd(0.0)), at_zero)),
    "target, offsets stay where they begin": Variant(targeted(optimizer=optax.sgd(0.0))),
    "target, offsets by Adam at 1e-3": Variant(targeted(optimizer=optax.adam(1e-3))),
    "target, offsets by Adam at 3e-3": Variant(targeted(optimizer=optax.adam(3e-3))),
    "target, offsets by Adam at 1e-3, no momentum": Variant(targeted(optimizer=optax.adam(1e-3, b1=0.0))),
    "target, T0 1e-3": Variant(targeted(t0=1e-3)),
    "target, T0 5e-2": Variant(targeted(t0=5e-2)),
    "target, T0 falls from 5e-2 to 1e-3": Variant(annealed(targeted(t0=5e-2), 0.02, 0.75)),
    "target, dense gradients until 40 %": Variant(straight_through(targeted(), 0.4)),
    "target, distilled from the dense network, half": Variant(targeted(), distill=0.5),
    "magnitude, pruned within 50 %": Variant(magnitude(0.5)),
    "magnitude, pruned within 50 %, distilled, half": Variant(magnitude(0.5), distill=0.5),
}
"""Ideas for the way to 64×, each a change of the first."""
VARIANTS = {name: Variant(make, 0.05, 0.0) for name, make in CLAIMS.items()} | IDEAS
"""All that can be run."""


def file_name(variant: str, seed: int) -> str:
    """The file of a run."""
    return "".join(c if c.isalnum() else "_" for c in variant) + f"_{seed}.json"


def measure(harness: Harness, run: Run, pruner: Pruner, seed: int) -> dict[str, Any]:
    """One run: the last hard network, the soft one that was trained, and the hardening gap after every epoch."""
    network = harness.dense_network(seed)
    harden = jax.jit(pruner.harden)
    soften = jax.jit(lambda state: pruner.soften(state.params, state.pruning.thresholds, state.pruning, state.step)[0])
    sizes = {tensor.path: tensor.size for tensor in harness.plan.tensors if tensor.prune}
    rows = []
    for state in run(network, seed):
        hard = harden(state.params, state.pruning)
        kept = {path: int(jnp.count_nonzero(w)) for path, w in ltp.named_leaves(hard) if path in sizes}
        rows.append(
            {
                "compression": sum(sizes.values()) / max(sum(kept.values()), 1),
                "top1": harness.top1(hard, state.batch_stats),
                "soft_top1": harness.top1(soften(state), state.batch_stats),
                "densities": {path: kept[path] / size for path, size in sizes.items()},
            }
        )
    return {"dense_top1": harness.top1(network["params"], network["batch_stats"]), "epochs": rows} | rows[-1]


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
            gaps = [[row["soft_top1"] - row["top1"] for row in cell["epochs"]] for cell in found if cell["soft_top1"]]
            last = f"{statistics.fmean(gap[-1] for gap in gaps):+.2f}" if gaps else "–"
            largest = f"{max((g for gap in gaps for g in gap), key=abs):+.2f}" if gaps else "–"
            top1 = spread([cell["top1"] for cell in found])
            lines.append(f"| {variant} | {len(found)} | {', '.join(reached)} | {top1} | {last} | {largest} |")
    return "\n".join(lines) + "\n"


SERIES = {
    "eq. 14, L0 on thresholds": "L0 on thresholds alone",
    "exact gradient": "exact gradient",
    "L0 on weights too": "L0 on weights too",
    "L1": "L1 in place",
    "L2": "L2 in place",
}
"""The claims as they are drawn: a label, and how the names of the variants begin."""


def draw_claims(cells: list[dict[str, Any]], path: Path) -> None:
    """Where runs with the paper's choices and their opposites end, and the hardening gap on the way for each T0."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    ends, gaps = figure.subplots(1, 2)
    for i, (label, start) in enumerate(SERIES.items()):
        found = [cell for cell in cells if cell["variant"].startswith(start)]
        ends.plot([c["compression"] for c in found], [c["top1"] for c in found], "os^Dv"[i], color=f"C{i}", label=label)
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
    gaps.set_ylabel("top-1 of the soft less that of the hard network")
    gaps.set_title("hardening gap, the larger of two seeds")
    for axes in (ends, gaps):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=120)


def main() -> None:
    config = tyro.cli(AblationConfig, description=__doc__)
    if config.command == "report":
        cells = read_cells(config.results)
        if not cells:
            raise ConfigError(f"there are no runs in {config.results}: python -m experiments.ablation run")
        (config.results / "table.md").write_text(markdown(cells))
        print(config.results / "table.md")
        draw_claims(cells, config.pictures / "ablation_claims.png")
        print(config.pictures / "ablation_claims.png")
        return
    if unknown := [variant for variant in config.variants if variant not in VARIANTS]:
        raise ConfigError(f"--variants has {unknown[0]!r}; accepted are {', '.join(map(repr, VARIANTS))}")
    setup = NETWORKS[ARCH]
    harness = Harness(hold_out(setup.load(config.data_dir), HELD_OUT), ARCH, config.workdir, setup.pretrain)
    for variant in config.variants or VARIANTS:
        missing = [seed for seed in config.seeds if not (config.results / file_name(variant, seed)).exists()]
        if not missing:
            continue
        make, rate, decay, distill = VARIANTS[variant]
        train = TrainConfig(epochs=10, batch_size=128, learning_rate=rate, weight_decay=decay)
        pruner = make(harness.plan, harness.steps(train))
        run = harness.compiled(pruner, train, distill)
        for seed in missing:
            figures = {"variant": variant, "seed": seed} | measure(harness, run, pruner, seed)
            write_cell(config.results / file_name(variant, seed), figures)
            print(f"{variant}, seed {seed}: {figures['compression']:.2f}× at {figures['top1']:.2f} %", flush=True)


if __name__ == "__main__":
    run_command(main)
