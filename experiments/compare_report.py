"""The table and the pictures of a comparison, made from its cells on disk."""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.compare_cells import OWN, Cell, read_cells, select
from ltp_jax.target import planned_density

LABELS = {
    "ltp": "LTP",
    "ltp_leak": "LTP with a leak",
    "gmp_global": "gradual magnitude, global",
    "gmp_uniform": "gradual magnitude, uniform",
    "one_shot": "one-shot magnitude, global",
    "str": "STR",
}
COLOURS = dict(zip(LABELS, ("tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:gray", "tab:green"), strict=True))
SIDE_BY_SIDE = (*OWN, "gmp_global", "str")
"""The methods whose densities are shown layer by layer."""


def write(folder: Path, docs: Path) -> list[Path]:
    """Writes the table to the folder and the pictures to the documentation, as far as there is something to show.

    Returns:
      The files.
    """
    cells = read_cells(folder)
    docs.mkdir(parents=True, exist_ok=True)
    table = folder / "table.md"
    table.write_text(markdown(cells))
    pruned = [cell for cell in cells if cell["compression"] is not None]
    pictures = {
        docs / f"compare_{folder.name}.png": (draw_accuracy, pruned),
        docs / f"density_{folder.name}.png": (draw_densities, [c for c in pruned if c["method"] in SIDE_BY_SIDE]),
        docs / f"plan_{folder.name}.png": (draw_plan, [c for c in pruned if c["method"] in OWN]),
    }
    drawn = {path: (draw, shown) for path, (draw, shown) in pictures.items() if shown}
    for path, (draw, shown) in drawn.items():
        draw(shown, path)
    return [table, *drawn]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, of the sample, in two decimals."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def counted_spread(values: Sequence[float]) -> str:
    """The same, with their number in brackets."""
    return f"{spread(values)} ({len(values)})"


def near(cell: Cell) -> bool:
    """Whether a run came within a factor of 1.5 of its compression; farther off it is no match for another method."""
    return abs(math.log(cell["achieved"] / cell["compression"])) < math.log(1.5)


def dense_top1(cells: Iterable[Cell]) -> dict[int, set[float]]:
    """Top-1 of the network that each seed starts from; one that was trained more than once may have several."""
    found: dict[int, set[float]] = {}
    for cell in cells:
        found.setdefault(cell["seed"], set()).add(cell["dense_top1"])
    return found


def compressions(cells: Iterable[Cell]) -> list[float]:
    return sorted({cell["compression"] for cell in cells if cell["compression"] is not None})


def markdown(cells: Sequence[Cell]) -> str:
    """Top-1 of every method at every compression: mean ± standard deviation over seeds, and their number.

    The same of training images follows, of the runs that tell it.
    """
    lines = accuracy_rows(cells, "top1")
    first = dense_top1(cells)
    means = [statistics.fmean(accuracies) for accuracies in first.values()]
    lines += ["", f"Dense network that all start from: {counted_spread(means)}."]
    if again := {seed: max(t) - min(t) for seed, t in first.items() if len(t) > 1}:
        # Rounding differs between processors and numbers of threads, and with it what a seed leads to.
        seeds = ", ".join(map(str, sorted(again)))
        lines.append(f"Not the same for all methods with seed {seeds}: up to {max(again.values()):.2f} apart.")
    if more := select(cells, method="dense"):
        lines.append(f"Trained on as long as the others, without pruning: {spread([c['top1'] for c in more])}.")
    if fitted := [cell for cell in cells if "train_top1" in cell]:
        lines += ["", "Training images:", "", *accuracy_rows(fitted, "train_top1")]
        if more := select(fitted, method="dense"):
            lines += ["", f"Without pruning: {spread([c['train_top1'] for c in more])}."]
    return "\n".join(lines) + "\n"


def accuracy_rows(cells: Sequence[Cell], figure: str) -> list[str]:
    """A table of a figure of all methods by compression, and what ours are ahead by of the best others."""
    wanted = compressions(cells)
    lines = [
        "| method | " + " | ".join(f"{c:g}×" for c in wanted) + " |",
        "|---|" + "---|" * len(wanted),
    ]
    for method, label in LABELS.items():
        row = []
        for compression in wanted:
            found = select(cells, method=method, compression=compression)
            if not found:
                row.append("–")
                continue
            text = counted_spread([cell[figure] for cell in found])
            achieved = [cell["achieved"] for cell in found]
            if max(abs(a / compression - 1) for a in achieved) > 0.01:
                text += f" at {min(achieved):.1f}–{max(achieved):.1f}×"
            row.append(text)
        if any(text != "–" for text in row):
            lines.append(f"| {label} | " + " | ".join(row) + " |")
    for own, rival in itertools.product(OWN, ("gmp_global", "str")):
        row = []
        for compression in wanted:
            ours, theirs = (
                {
                    cell["seed"]: cell[figure]
                    for cell in select(cells, method=method, compression=compression)
                    if near(cell)
                }
                for method in (own, rival)
            )
            differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            row.append(counted_spread(differences) if differences else "–")
        if any(text != "–" for text in row):
            lines.append(f"| {LABELS[own]} less {LABELS[rival]}, seed by seed | " + " | ".join(row) + " |")
    return lines


def tuning_markdown(cells: Sequence[Cell]) -> str:
    """A row for every setting that was tried: mean ± standard deviation over seeds, and their number."""
    lines = [
        "| method | learning rate | weight decay | pruned within | first s | compression | top-1 % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for method in (*LABELS, "dense"):
        groups: dict[str, list[Cell]] = {}
        for cell in select(cells, method=method):
            groups.setdefault(json.dumps([cell["trial"], cell["compression"]]), []).append(cell)
        for group in groups.values():
            trial = group[0]["trial"]
            prune = f"{100 * trial['prune']:g} %" if trial["prune"] else "–"
            initial = f"{trial['initial']:g}" if trial["initial"] else "–"
            decay = f"{trial['weight_decay']:.3g}" if trial["weight_decay"] else "the network's"
            reached = statistics.geometric_mean([cell["achieved"] for cell in group])
            top1 = counted_spread([cell["top1"] for cell in group])
            rate, label = f"{trial['learning_rate']:g}", LABELS.get(method, "dense")
            lines.append(f"| {label} | {rate} | {decay} | {prune} | {initial} | {reached:.1f}× | {top1} |")
    return "\n".join(lines) + "\n"


def draw_accuracy(cells: Sequence[Cell], path: Path) -> None:
    """Top-1 against the compression that was reached; bars are standard deviations over seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, label in LABELS.items():
        groups = [found for c in compressions(cells) if (found := select(cells, method=method, compression=c))]
        if groups:
            axes.errorbar(
                [statistics.geometric_mean([cell["achieved"] for cell in group]) for group in groups],
                [statistics.fmean([cell["top1"] for cell in group]) for group in groups],
                yerr=[statistics.stdev([c["top1"] for c in group]) if len(group) > 1 else 0 for group in groups],
                label=label,
                color=COLOURS[method],
                marker="o",
                capsize=3,
            )
    dense = statistics.fmean(map(statistics.fmean, dense_top1(cells).values()))
    axes.axhline(dense, color="black", linestyle=":", label="dense")
    wanted = compressions(cells)
    axes.set_xscale("log", base=2)
    axes.set_xticks(wanted, [f"{c:g}×" for c in wanted])
    axes.minorticks_off()
    # The best methods fill the picture; others may leave it where they fail.
    best = [cell for cell in cells if cell["method"] in (*OWN, "gmp_global")] or cells
    lowest = min(math.floor(min(cell["top1"] for cell in best)) - 1.5, dense - 0.4)
    axes.set_ylim(lowest, max(dense, *(cell["top1"] for cell in cells)) + 0.4)
    axes.set_xlabel("compression: prunable weights over those kept")
    axes.set_ylabel("top-1 on test images, %")
    axes.set_title(f"{cells[0]['network']} on {cells[0]['dataset']}: mean and standard deviation over seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)


def draw_densities(cells: Sequence[Cell], path: Path) -> None:
    """Density per layer of the methods of ``SIDE_BY_SIDE``, a panel for each compression."""
    wanted = compressions(cells)
    shown = [method for method in SIDE_BY_SIDE if select(cells, method=method)]
    width = 0.81 / len(shown)
    deep = max(len(cell["densities"]) for cell in cells) > 8
    rows, columns = (len(wanted), 1) if deep else (1, len(wanted))
    figure = Figure(figsize=(9, 2.2 * rows + 1.6) if deep else (3.2 * columns, 4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, compression in zip(panels, wanted, strict=True):
        titles = []
        for i, method in enumerate(shown):
            found = select(cells, method=method, compression=compression)
            if not found:
                continue
            layers = list(found[0]["densities"])
            means = [100 * statistics.fmean([cell["densities"][layer] for cell in found]) for layer in layers]
            places = [position + width * (i - (len(shown) - 1) / 2) for position in range(len(layers))]
            achieved = statistics.geometric_mean([cell["achieved"] for cell in found])
            axes.bar(places, means, 0.92 * width, color=COLOURS[method], label=LABELS[method])
            titles.append(f"{achieved:.1f}×")
        axes.set_yscale("log")
        axes.set_xticks(
            range(len(layers)), [layer.removesuffix("/kernel") for layer in layers], rotation=30, ha="right"
        )
        axes.set_title(", ".join(titles), fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    figure.supylabel("kept weights of the layer, %", fontsize=10)
    bars = {label: bar for axes in panels for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(bars.values()), list(bars), loc="outside lower center", ncols=len(shown))
    figure.suptitle(f"{cells[0]['network']} on {cells[0]['dataset']}: where the weights are left, mean over seeds")
    save_picture(figure, path)


def draw_plan(cells: Sequence[Cell], path: Path) -> None:
    """Density after every epoch of runs of LTP, of each compression and seed, against the plan that they follow."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, compression in enumerate(compressions(cells)):
        group = select(cells, compression=compression)
        epochs = group[0]["epochs_trained"]
        # Settings differ in when the descent ends, and so do the plans.
        for share in {cell["trial"]["prune"] for cell in group}:
            plan = planned_density(1 / compression, steps=1000)
            times = [j / 200 * epochs for j in range(201)]
            axes.plot(times, [100 * float(plan(1000 * t / (share * epochs))) for t in times], color=f"C{i}", alpha=0.5)
        for cell in group:
            densities = [100 / epoch["compression"] for epoch in cell["epochs"]]
            axes.plot(range(1, epochs + 1), densities, ".", color=f"C{i}")
        axes.plot([], [], ".-", color=f"C{i}", label=f"{compression:g}×")
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("kept weights, %")
    axes.set_title(f"{cells[0]['network']} on {cells[0]['dataset']}: density (dots, every seed) and plan (lines)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG."""
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
