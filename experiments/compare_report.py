"""The table and the pictures of a comparison, made from its cells on disk."""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.compare_cells import OWN, Cell, read_cells, select, with_setting_of
from experiments.components import network_plan, network_uses
from experiments.options import ConfigError
from experiments.record import write_whole
from experiments.report import save_picture
from ltp_jax import models
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
MARKERS = dict(zip(LABELS, "oDsv^X", strict=True))
SETTINGS = {"": "", "ltp": " (setting of LTP)", "gmp_global": " (setting of magnitude)"}
"""Whose setting a method runs with, if not its own."""
DASHES = dict(zip(SETTINGS, ("-", "--", ":"), strict=True))
SIDE_BY_SIDE = (*OWN, "gmp_global", "str")
"""The methods whose densities are shown layer by layer."""


def write(cells: Sequence[Cell], folder: Path, docs: Path) -> list[Path]:
    """Writes the table of runs to their folder and their pictures to the documentation, as far as there are any.

    Returns:
      The files.

    Raises:
      ConfigError: if runs that differ in more than the seed would be taken for one figure.
    """
    check_settings(cells)
    table = folder / "table.md"
    write_whole(table, markdown(cells))
    pruned = [cell for cell in cells if cell["compression"] is not None]
    own_settings = select(pruned, origin="")
    pictures = {
        docs / f"compare_{folder.name}.png": (draw_accuracy, pruned),
        docs / f"density_{folder.name}.png": (draw_densities, [c for c in own_settings if c["method"] in SIDE_BY_SIDE]),
        docs / f"plan_{folder.name}.png": (draw_plan, [c for c in own_settings if c["method"] in OWN]),
    }
    drawn = {path: (draw, shown) for path, (draw, shown) in pictures.items() if shown}
    for path, (draw, shown) in drawn.items():
        save_picture(draw(shown), path)
    return [table, *drawn]


def check_settings(cells: Iterable[Cell]) -> None:
    """Raises ConfigError if runs of one method and compression have different settings."""
    first: dict[Any, Cell] = {}
    for cell in cells:
        other = first.setdefault((cell["method"], cell["origin"], cell["compression"]), cell)
        for name in ("trial", "epochs_trained"):
            if cell[name] != other[name]:
                raise ConfigError(
                    f"{cell['method']} at {cell['compression']}× has runs of different settings: {name} of seed "
                    f"{other['seed']} is {other[name]}, of seed {cell['seed']} {cell[name]}. `compare run` with all of "
                    "these seeds runs those anew that are not of the chosen setting"
                )


def read_compared(folder: Path) -> list[Cell]:
    """The runs of a folder and of those beside it of methods with the setting of another, the ``origin`` of each told.

    It is empty where a method runs with its own setting.
    """
    return [
        cell | {"origin": "" if cell["method"] == origin else origin}
        for origin in SETTINGS
        for cell in read_cells(with_setting_of(origin, folder) if origin else folder)
    ]


def label(method: str, origin: str = "") -> str:
    """What tables and pictures call a method, with its own setting or that of another."""
    return LABELS.get(method, "dense") + SETTINGS[origin]


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
    lines += unpruned_rows(cells, "top1", "Trained on as long as the others, without pruning")
    if fitted := [cell for cell in cells if "train_top1" in cell]:
        lines += ["", "Training images:", "", *accuracy_rows(fitted, "train_top1")]
        if unpruned := unpruned_rows(fitted, "train_top1", "Without pruning"):
            lines += ["", *unpruned]
    return "\n".join(lines) + "\n"


def unpruned_rows(cells: Sequence[Cell], figure: str, words: str) -> list[str]:
    """A line for each setting with which the control has run."""
    return [
        f"{words}{whose}: {spread([cell[figure] for cell in found])}."
        for origin, whose in SETTINGS.items()
        if (found := select(cells, method="dense", origin=origin))
    ]


def accuracy_rows(cells: Sequence[Cell], figure: str) -> list[str]:
    """A table of a figure of all methods by compression, and what ours are ahead by of the best others."""
    wanted = compressions(cells)
    lines = [
        "| method | " + " | ".join(f"{c:g}×" for c in wanted) + " |",
        "|---|" + "---|" * len(wanted),
    ]
    for method, origin in itertools.product(LABELS, SETTINGS):
        row = []
        for compression in wanted:
            found = select(cells, method=method, origin=origin, compression=compression)
            if not found:
                row.append("–")
                continue
            text = counted_spread([cell[figure] for cell in found])
            achieved = [cell["achieved"] for cell in found]
            if max(abs(a / compression - 1) for a in achieved) > 0.01:
                text += f" at {min(achieved):.1f}–{max(achieved):.1f}×"
            row.append(text)
        if any(text != "–" for text in row):
            lines.append(f"| {label(method, origin)} | " + " | ".join(row) + " |")
    for own, origin, rival in itertools.product(OWN, SETTINGS, ("gmp_global", "str")):
        row = []
        for compression in wanted:
            ours, theirs = (
                {
                    cell["seed"]: cell[figure]
                    for cell in select(cells, method=method, origin=whose, compression=compression)
                    if near(cell)
                }
                for method, whose in ((own, origin), (rival, ""))
            )
            differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            row.append(counted_spread(differences) if differences else "–")
        if any(text != "–" for text in row):
            lines.append(f"| {label(own, origin)} less {label(rival)}, seed by seed | " + " | ".join(row) + " |")
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
            named = f"{label(method)} | {trial['learning_rate']:g}"
            lines.append(f"| {named} | {decay} | {prune} | {initial} | {reached:.1f}× | {top1} |")
    return "\n".join(lines) + "\n"


def where(cells: Sequence[Cell]) -> str:
    """What the runs have in common, for a title."""
    return f"{cells[0]['network']} on {cells[0]['dataset']}, {cells[0]['epochs_trained']} epochs"


def draw_accuracy(cells: Sequence[Cell]) -> Figure:
    """Top-1 against the compression that was reached; bars are standard deviations over seeds."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    dense = statistics.fmean(map(statistics.fmean, dense_top1(cells).values()))
    # The best methods fill the picture; others may leave it where they fail, and their labels say how far.
    best = [cell["top1"] for cell in cells if cell["method"] in (*OWN, "gmp_global")] or [c["top1"] for c in cells]
    lowest = min(*best, dense) - 0.6
    for method, origin in itertools.product(LABELS, SETTINGS):
        same = select(cells, method=method, origin=origin)
        groups = [select(same, compression=compression) for compression in compressions(same)]
        if groups:
            means = [statistics.fmean([cell["top1"] for cell in group]) for group in groups]
            notes = ["one seed"] if all(len(group) == 1 for group in groups) else []
            notes += [
                f"{m:.1f} % at {g[0]['compression']:g}×" for g, m in zip(groups, means, strict=True) if m < lowest
            ]
            axes.errorbar(
                [statistics.geometric_mean([cell["achieved"] for cell in group]) for group in groups],
                means,
                yerr=[statistics.stdev([c["top1"] for c in group]) if len(group) > 1 else 0 for group in groups],
                label=label(method, origin) + (f" ({', '.join(notes)})" if notes else ""),
                color=COLOURS[method],
                linestyle=DASHES[origin],
                linewidth=1.2,
                marker=MARKERS[method],
                markersize=5,
                elinewidth=0.8,
                capsize=3,
            )
    axes.axhline(dense, color="black", linewidth=0.8, label="dense")
    wanted = compressions(cells)
    axes.set_xscale("log", base=2)
    axes.set_xticks(wanted, [f"{c:g}×" for c in wanted])
    axes.minorticks_off()
    axes.set_ylim(lowest, max(dense, *(cell["top1"] for cell in cells)) + 0.4)
    axes.set_xlabel("compression: prunable weights over those kept")
    axes.set_ylabel("top-1 on test images, %")
    axes.set_title(f"{where(cells)}: mean and standard deviation over seeds", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, handlelength=3)
    return figure


def in_order_of_use(network: str) -> list[str]:
    """The tensors that are pruned of a network, in the order in which it uses them."""
    module, spec = models.create(network), models.spec(network)
    shape = (spec.input_size, spec.input_size, spec.channels)
    return list(network_uses(module, shape, network_plan(module, shape)))


def draw_densities(cells: Sequence[Cell]) -> Figure:
    """Density per layer of the methods of ``SIDE_BY_SIDE``, a panel for each compression."""
    wanted = compressions(cells)
    shown = [method for method in SIDE_BY_SIDE if select(cells, method=method)]
    width = 0.6 / len(shown)
    layers = [layer for layer in in_order_of_use(cells[0]["network"]) if layer in cells[0]["densities"]]
    deep = len(layers) > 8
    rows, columns = (len(wanted), 1) if deep else (1, len(wanted))
    figure = Figure(figsize=(9, 2.2 * rows + 1.6) if deep else (2 * columns, 3.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, compression in zip(panels, wanted, strict=True):
        missed = []
        for i, method in enumerate(shown):
            found = select(cells, method=method, compression=compression)
            if not found:
                continue
            means = [100 * statistics.fmean([cell["densities"][layer] for cell in found]) for layer in layers]
            places = [position + width * (i - (len(shown) - 1) / 2) for position in range(len(layers))]
            achieved = statistics.geometric_mean([cell["achieved"] for cell in found])
            axes.plot(places, means, "o", markersize=4, color=COLOURS[method], label=LABELS[method])
            if f"{achieved:.1f}" != f"{compression:.1f}":
                missed.append(f"{LABELS[method]} {achieved:.1f}×")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(
            range(len(layers)), [layer.removesuffix("/kernel") for layer in layers], rotation=30, ha="right"
        )
        title = f"{compression:g}×"
        axes.set_title(f"{title} ({', '.join(missed)})" if missed else title, fontsize=9)
        axes.grid(axis="y", which="both", alpha=0.3)
    figure.supylabel("kept weights of the layer, %", fontsize=10)
    dots = {label: dot for axes in panels for dot, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(dots.values()), list(dots), loc="outside lower center", ncols=len(shown))
    figure.suptitle(f"{where(cells)}: where the weights are left, mean over seeds")
    return figure


def draw_plan(cells: Sequence[Cell]) -> Figure:
    """Density after every epoch of runs of LTP, of each compression and seed, the plan, and how far off it they are."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes, off = figure.subplots(1, 2)
    wanted = compressions(cells)
    for i, compression in enumerate(wanted):
        group = select(cells, compression=compression)
        epochs = group[0]["epochs_trained"]
        ends = range(1, epochs + 1)
        # Settings differ in when the descent ends, and so do the plans.
        for share in {cell["trial"]["prune"] for cell in group}:
            plan = planned_density(1 / compression, steps=1)  # of the share of the descent that is behind
            times = np.linspace(0, epochs, 201)
            axes.plot(times, 100 * np.asarray(plan(times / (share * epochs))), color=f"C{i}", alpha=0.5)
            planned = 100 * np.asarray(plan(np.asarray(ends) / (share * epochs)))
            for cell in group:
                if cell["trial"]["prune"] == share:
                    densities = np.asarray([100 / epoch["compression"] for epoch in cell["epochs"]])
                    axes.plot(ends, densities, ".", color=f"C{i}")
                    beside = np.asarray(ends) + 0.12 * (i - (len(wanted) - 1) / 2)  # or they lie on one another
                    off.plot(beside, 100 * (densities / planned - 1), ".", color=f"C{i}", alpha=0.6)
        axes.plot([], [], ".-", color=f"C{i}", label=f"{compression:g}×")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("kept weights, %")
    axes.set_title("density (dots, every seed) and plan (lines)", fontsize=10)
    axes.legend()
    off.axhline(0, color="black", linewidth=0.8)
    off.set_ylabel("density less plan, % of the plan")
    off.set_title("how far off", fontsize=10)
    for panel in (axes, off):
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    figure.suptitle(where(cells))
    return figure
