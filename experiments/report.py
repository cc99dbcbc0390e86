"""The report of a run: figures and a table made from its trail."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.markup import escape
from rich.table import Table

from experiments.record import write_json, write_whole
from ltp_jax.trail import Entry, Trail, pareto


def write(trail: Trail, directory: Path, title: str) -> dict[str, Path]:
    """Writes the figures and the table of a trail.

    Returns:
      The files: ``accuracy``, ``density`` and ``thresholds`` (PNG), ``table`` (Markdown), and ``figures``, the
      entries as JSON.
    """
    entries = trail.entries
    figures = {
        "accuracy": draw_accuracy(entries, title),
        "density": draw_layers(
            entries,
            [{path: 100 * density for path, density in e.densities.items()} for e in entries],
            f"{title}: density per layer",
            "kept weights of the layer, %",
        ),
        "thresholds": draw_layers(
            entries[1:],
            # Fixed masks have next to no threshold; the lines end where they are fixed.
            [{path: tau**0.5 if tau > 1e-20 else math.nan for path, tau in e.thresholds.items()} for e in entries[1:]],
            f"{title}: thresholds while they are learned",
            "smallest |w| that is kept, √τ",
        ),
    }
    paths = {name: directory / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        save_picture(figure, paths[name])
    paths["table"] = directory / "trail.md"
    write_whole(paths["table"], markdown(entries, title))
    paths["figures"] = directory / "trail.json"
    write_json(paths["figures"], {"title": title, "entries": [entry.figures() for entry in entries]})
    return paths


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, and the folder it lies in; the file is there as a whole or as it was."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def markdown(entries: Sequence[Entry], title: str) -> str:
    """The trail as a Markdown table, with the figures beside it."""
    front = {entry.epoch for entry in pareto(entries)}
    dense = entries[0].top1
    lines = [
        f"# {title}",
        "",
        "Held-out accuracy of the hard-pruned networks, and by how much their prunable weights and the",
        "multiply-accumulates (MACs) of those became fewer. The gap is what top-1 loses when soft masks become hard;",
        "an entry is on the Pareto front (*) when it is more accurate than all that are as sparse or sparser.",
        "",
        "| epoch | compression | density | MACs | top-1 % | below dense | top-5 % | loss | gap | |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|:-:|",
    ]
    lines += [
        f"| {e.epoch} | {e.compression:.2f}× | {e.density:.2%} | {_macs(e)} | {e.top1:.2f} | {dense - e.top1:+.2f} "
        f"| {e.top5:.2f} | {e.loss:.4f} | {e.gap:+.2f} | {'*' if e.epoch in front else ''} |"
        for e in entries
    ]
    lines += ["", *(f"![{name}]({name}.png)" for name in ("accuracy", "density", "thresholds")), ""]
    return "\n".join(lines)


def terminal_table(trail: Trail, width: int) -> Table:
    """The trail for a terminal of so many columns; networks that no other beats in compression and accuracy are marked.

    All figures fit into 80 columns; a narrower terminal gets the most important ones.
    """
    front = {entry.epoch for entry in pareto(trail.entries)}
    dense = trail.dense.top1
    rows = [
        {
            "epoch": f"{'* ' if e.epoch in front else ''}{e.epoch}",
            "compression": f"{e.compression:.2f}×",
            "MACs": _macs(e),
            "top-1 %": f"{e.top1:.2f}",
            "top-5 %": f"{e.top5:.2f}",
            "loss": f"{e.loss:.4f}",
            "gap": f"{e.gap:+.2f}",
            "drop": f"{dense - e.top1:+.2f}",
        }
        for e in trail.entries
    ]
    shown = list(rows[0]) if width >= 80 else ["epoch", "compression", "top-1 %", "drop"]
    table = Table(
        title=f"the trail in {escape(str(trail.path))} (* more accurate than all that are as sparse or sparser)",
        caption="gap: points of top-1 lost when soft masks become hard; drop: points of top-1 below the dense network",
    )
    for name in shown:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _macs(entry: Entry) -> str:
    return "–" if entry.macs_compression is None else f"{entry.macs_compression:.2f}×"


def draw_accuracy(entries: Sequence[Entry], title: str) -> Figure:
    """Top-1 against compression: every entry, the best with as much or more, and the dense network's level."""
    figure, axes = _figure()
    dense = entries[0].top1
    front = pareto(entries)
    axes.axhline(dense, color="0.4", linestyle="--", linewidth=1, label=f"dense, {dense:.2f} %")
    axes.axhline(dense - 1, color="0.7", linestyle=":", linewidth=1, label="one point below")
    points = axes.scatter(
        [e.compression for e in entries],
        [e.top1 for e in entries],
        c=[e.epoch for e in entries],
        cmap="viridis",
        s=22,
        zorder=3,
    )
    axes.plot(
        [min(e.compression for e in entries), *(e.compression for e in front)],
        [front[0].top1, *(e.top1 for e in front)],
        color="tab:red",
        linewidth=1.2,
        drawstyle="steps-pre",  # between two entries there is no network: who asks for as much gets the sparser one
        label="best with this compression or more",
    )
    figure.colorbar(points, ax=axes, label="epoch", ticks=MaxNLocator(integer=True, min_n_ticks=1))
    _compression_axis(axes, max(e.compression for e in entries))
    # A network that has not recovered yet may be far below; it must not flatten the rest of the picture.
    floor = min(e.top1 for e in entries)
    if 0 < sum(e.top1 < dense - 12 for e in entries) < len(entries) - 1:
        floor = dense - 12
    margin = 0.08 * (max(e.top1 for e in entries) - floor) + 0.05
    if below := sum(e.top1 < floor - margin for e in entries):
        axes.set_xlabel(
            f"{axes.get_xlabel()}; not shown: {below} more than {dense - floor + margin:.0f} points below dense"
        )
    axes.set_ylim(floor - margin, max(e.top1 for e in entries) + margin)
    axes.set_ylabel("evaluation top-1, %")
    axes.set_title(title)
    axes.legend(loc="best", fontsize=8)
    return figure


def draw_layers(entries: Sequence[Entry], values: Sequence[dict[str, float]], title: str, label: str) -> Figure:
    """One line per layer over the epochs, coloured by their order."""
    figure, axes = _figure()
    layers = list(values[0]) if values else []
    for i, layer in enumerate(layers):
        color = colormaps["plasma"](0.9 * i / max(len(layers) - 1, 1))
        axes.plot([e.epoch for e in entries], [v[layer] for v in values], ".-", color=color, linewidth=1.2, label=layer)
    if shown := [v for row in values for v in row.values() if v > 0]:
        axes.set_yscale("log")
        if (ratio := max(shown) / min(shown)) < 30:  # powers of ten are too few ticks
            axes.yaxis.set_major_locator(
                MaxNLocator(steps=[1, 2, 5, 10]) if ratio < 3 else LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
            )
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if entries:
        axes.set_xlim(entries[0].epoch - 0.5, entries[-1].epoch + 0.5)  # room for whole numbers, if it is one
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.set_title(title)
    if len(layers) <= 12:
        axes.legend(fontsize=7, loc="best")
    else:
        axes.text(
            1.01,
            0.5,
            f"{len(layers)} layers,\nfirst dark,\nlast bright",
            transform=axes.transAxes,
            fontsize=8,
            va="center",
        )
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def _compression_axis(axes: Axes, highest: float) -> None:
    axes.set_xscale("log", base=2)
    if highest < 12:  # powers of two are too few ticks
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("compression: prunable weights / weights kept")
