"""The tables and pictures of a comparison."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments import ablation, compare_cells, compare_report
from experiments.options import ConfigError
from experiments.record import write_json
from tests.commands import ROOT


def cell(method, compression, seed, top1, achieved):
    return {
        "network": "resnet20",
        "dataset": "data",
        "method": method,
        "origin": "",
        "compression": compression,
        "seed": seed,
        "top1": top1,
        "achieved": achieved,
        "dense_top1": 91.0 + seed,
        "densities": {"head/kernel": 0.1, "stem/conv/kernel": 0.2},
        "trial": dataclasses.asdict(compare_cells.Trial(learning_rate=0.1, prune=0.4)),
        "epochs_trained": 2,
        "epochs": [{"compression": compression / 2}, {"compression": achieved}],
    }


CELLS = [
    cell("ltp", 8, 0, 90.0, 8.0),
    cell("ltp", 8, 1, 91.0, 8.01),
    cell("str", 8, 0, 88.0, 9.0),
    cell("gmp_global", 16, 0, 87.0, 16.0),
    cell("ltp", 16, 0, 87.5, 16.0),
]


def test_table():
    lines = compare_report.markdown(CELLS).splitlines()
    assert lines[0] == "| method | 8× | 16× |"
    assert "| LTP | 90.50 ± 0.71 (2) | 87.50 (1) |" in lines
    assert "| LTP less gradual magnitude, global, seed by seed | – | 0.50 (1) |" in lines
    assert "| STR | 88.00 (1) at 9.0–9.0× | – |" in lines
    assert "| LTP less STR, seed by seed | 2.00 (1) | – |" in lines
    assert "Dense network that all start from: 91.50 ± 0.71 (2)." in lines


def test_table_of_training_images_has_the_runs_that_tell_of_them():
    assert "Training images:" not in compare_report.markdown(CELLS)
    more = cell("dense", 1, 0, 92.0, 1.0) | {"compression": None, "train_top1": 99.0}
    fitted = [CELLS[0] | {"train_top1": 96.0}, *CELLS[1:3], CELLS[3] | {"train_top1": 94.0}, more]
    fitted.append(CELLS[4] | {"train_top1": 94.75})
    text = compare_report.markdown(fitted)
    lines = text[text.index("Training images:") :].splitlines()
    assert "| LTP | 96.00 (1) | 94.75 (1) |" in lines
    assert "| LTP less gradual magnitude, global, seed by seed | – | 0.75 (1) |" in lines
    assert not any("STR" in line for line in lines)
    assert lines[-1] == "Without pruning: 99.00."


def test_table_tells_of_a_seed_that_began_with_two_networks():
    other = cell("gmp_global", 16, 0, 87.0, 16.0)
    lines = compare_report.markdown([*CELLS, other | {"dense_top1": other["dense_top1"] - 0.25}]).splitlines()
    assert "Not the same for all methods with seed 0: up to 0.25 apart." in lines
    assert not any("Not the same" in line for line in compare_report.markdown(CELLS).splitlines())


def test_a_run_that_missed_its_compression_by_half_is_no_rival():
    lines = compare_report.markdown([*CELLS[:2], cell("str", 8, 0, 95.0, 4.0)]).splitlines()
    assert "| STR | 95.00 (1) at 4.0–4.0× |" in lines
    assert not any("less STR" in line for line in lines)


def test_report_has_the_runs_with_the_setting_of_another_method(tmp_path):
    """Beside those with their own; a method that runs with its own setting, as in a longer run, is called as ever."""
    for name, rows in {
        "data_net": CELLS,
        "setting_of_ltp_data_net": [cell("ltp_leak", 16, 0, 88.5, 16.0)],
        "setting_of_gmp_global_data_net": [
            cell("gmp_global", 8, 0, 89.0, 8.0),
            cell("ltp_leak", 8, 0, 89.25, 8.0),
            cell("dense", 1, 0, 92.0, 1.0) | {"compression": None},
        ],
    }.items():
        for i, row in enumerate(rows):
            write_json(tmp_path / name / f"{i}.json", row)
    table, *_ = compare_report.write(
        compare_report.read_compared(tmp_path / "data_net"), tmp_path / "data_net", tmp_path / "docs"
    )
    lines = table.read_text().splitlines()
    assert "| gradual magnitude, global | 89.00 (1) | 87.00 (1) |" in lines
    assert "| LTP with a leak (setting of LTP) | – | 88.50 (1) |" in lines
    assert "| LTP with a leak (setting of LTP) less gradual magnitude, global, seed by seed | – | 1.50 (1) |" in lines
    assert "| LTP with a leak (setting of magnitude) | 89.25 (1) | – |" in lines
    assert "Trained on as long as the others, without pruning (setting of magnitude): 92.00." in lines


@pytest.mark.parametrize("other", [{"trial": {"learning_rate": 0.7}}, {"epochs_trained": 77}])
def test_runs_of_two_settings_are_not_taken_for_one_figure(tmp_path, other):
    mixed = [*CELLS[:1], CELLS[0] | {"seed": 1}]
    compare_report.write(mixed, tmp_path, tmp_path)
    mixed[1] |= other
    with pytest.raises(ConfigError, match=r"^ltp at 8× has runs of different settings: .* of seed 0 is .*, of seed 1"):
        compare_report.write(mixed, tmp_path, tmp_path)


def test_tables_of_the_repository_are_those_of_its_runs():
    """And every row of the documentation that tells a number of seeds stands in one of them."""
    folders = [path.parent for path in (ROOT / "experiments/results/compare").glob("*/table.md")]
    tables = set()
    for folder in folders:
        if folder.name.startswith("ablation_"):
            assert ablation.markdown(ablation.read_runs(folder)) == (folder / "table.md").read_text()
            continue
        cells = compare_report.read_compared(folder)
        write = compare_report.tuning_markdown if "_held_out_" in folder.name else compare_report.markdown
        table = (folder / "table.md").read_text()
        assert write(cells) == table, folder.name
        tables |= set(table.splitlines())
    rows = [row for row in (ROOT / "docs/comparison.md").read_text().splitlines() if re.match(r"\|.* \(\d+\)", row)]
    assert len(rows) > 30
    assert [row for row in rows if row not in tables] == []


def test_table_of_tuning():
    trials = {
        "ltp": {"learning_rate": 0.1, "weight_decay": 1e-3, "prune": 0.4, "initial": 0.0},
        "gmp_global": {"learning_rate": 0.05, "weight_decay": 0.0, "prune": 0.0, "initial": 0.0},
        "str": {"learning_rate": 0.05, "weight_decay": 4e-3, "prune": 0.0, "initial": -8.0},
    }
    cells = [row | {"trial": trials[row["method"]]} for row in CELLS[:4]]
    lines = compare_report.tuning_markdown(cells).splitlines()
    assert lines[2:] == [
        "| LTP | 0.1 | 0.001 | 40 % | – | 8.0× | 90.50 ± 0.71 (2) |",
        "| gradual magnitude, global | 0.05 | the network's | – | – | 16.0× | 87.00 (1) |",
        "| STR | 0.05 | 0.004 | – | -8 | 9.0× | 88.00 (1) |",
    ]


@pytest.mark.parametrize(
    ("methods", "pictures"),
    [
        (("ltp", "str", "gmp_global"), 3),
        (("ltp",), 3),
        (("str", "gmp_global"), 2),  # a grid that has not come to LTP yet
        (("gmp_uniform",), 1),
        (("dense",), 0),
    ],
)
def test_pictures_of_what_is_there(tmp_path, methods, pictures):
    folder = tmp_path / "data_net"
    rows = [*CELLS, cell("gmp_uniform", 8, 0, 80.0, 8.0), cell("dense", 8, 0, 91.0, 1.0) | {"compression": None}]
    for i, row in enumerate(rows):
        if row["method"] in methods:
            write_json(folder / f"{i}.json", row)
    table, *drawn = compare_report.write(compare_report.read_compared(folder), folder, tmp_path / "docs")
    assert "Dense network that all start from" in table.read_text()
    assert len(drawn) == pictures
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_of_accuracies():
    (axes,) = compare_report.draw_accuracy(CELLS).axes
    line, _, (bars,) = next(c for c in axes.containers if c.get_label() == "LTP").lines
    # The geometric mean of 8 and 8.01, and the standard deviation of 90 and 91.
    np.testing.assert_allclose(np.transpose(line.get_data(orig=False)), [(64.08**0.5, 90.5), (16, 87.5)], rtol=1e-6)
    ends = [bar[:, 1] for bar in bars.get_segments()]
    np.testing.assert_allclose(ends, [(90.5 - 0.5**0.5, 90.5 + 0.5**0.5), (87.5, 87.5)], rtol=1e-6)
    dense = next(line for line in axes.lines if line.get_label() == "dense")
    np.testing.assert_allclose(dense.get_ydata(), 91.5)


def test_picture_of_densities():
    cells = [*CELLS[:2], CELLS[1] | {"method": "gmp_global"}]
    cells[0] = cells[0] | {"densities": {"head/kernel": 0.3, "stem/conv/kernel": 0.4}}
    (axes,) = compare_report.draw_densities(cells).axes
    assert [np.round(dots.get_ydata(), 6).tolist() for dots in axes.lines] == [[30, 20], [20, 10]]
    assert axes.get_title() == "8×"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem/conv", "head"]  # in the order of their use


def test_picture_of_the_plan():
    axes, off = compare_report.draw_plan(CELLS[:2]).axes
    plan, *dots, _ = axes.lines
    # Halfway through the descent, which takes 40 % of two epochs, the plan is at (1/8)^(1 − 1/8).
    times, densities = plan.get_data()
    assert densities[list(times).index(0.4)] == pytest.approx(100 * 8 ** (-7 / 8), rel=1e-5)
    assert densities[-1] == pytest.approx(12.5)
    assert [line.get_xdata().tolist() for line in dots] == [[1, 2]] * 2
    assert [line.get_ydata().tolist() for line in dots] == [[25, 12.5], [25, pytest.approx(100 / 8.01)]]
    # The plan is at its end after the first epoch, where these two have twice as much.
    assert [line.get_ydata().tolist() for line in off.lines[:2]] == [
        [pytest.approx(100, rel=1e-5), pytest.approx(0, abs=1e-4)],
        [pytest.approx(100, rel=1e-5), pytest.approx(100 * (8 / 8.01 - 1), rel=1e-3)],
    ]


def test_a_setting_has_what_its_record_leaves_out(tmp_path):
    write_json(tmp_path / "ltp_8_0.json", CELLS[0] | {"trial": {"learning_rate": 0.1}})
    (row,) = compare_cells.read_cells(tmp_path)
    assert "| LTP | 0.1 | the network's | – | – | 8.0× |" in compare_report.tuning_markdown([row])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("3", "not iterable"),
        ("{}", "it lacks network, dataset, method, compression, seed, .*achieved, top1"),
        ("[" * 100_000, "recursion"),
        *(
            (json.dumps(CELLS[0] | {key: value}), message)
            for key, value, message in (
                ("network", ["resnet20"], r"its network is \['resnet20'\]"),
                ("compression", 0, "its compression is 0"),
                ("seed", "x", "its seed is 'x'"),
                ("achieved", None, "its achieved is None"),
                ("top1", float("nan"), "its top1 is nan"),
                ("train_top1", [], r"its train_top1 is \[\]"),
                ("densities", {"head": "x"}, "its densities is {'head': 'x'}"),
                ("trial", {"learning_rate": None}, "its trial is {'learning_rate': None}"),
                ("trial", {"learning_rate": 0.1, "rat": 1}, "unexpected keyword argument 'rat'"),
                ("trial", {}, "missing 1 required"),
                ("epochs", [{}, {}], r"its epochs is \[{}, {}\]"),
                ("epochs", [{"compression": 8}], "it has 1 of 2 epochs"),
            )
        ),
    ],
)
def test_broken_record_of_a_run_is_said(tmp_path, text, message):
    (tmp_path / "ltp_8_0.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"ltp_8_0.json is no record of a run \(.*{message}.*remove it"):
        compare_cells.read_cells(tmp_path)
