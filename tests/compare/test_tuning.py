"""The settings of every method, which of them tuning chooses, and the search for a decay of STR."""

import collections
import dataclasses
import itertools
import shlex
import sys
import typing

import numpy as np
import pytest
import tyro

from experiments import compare, compare_cells, compare_networks
from experiments import compare_settings as settings
from experiments.options import ConfigError
from experiments.record import write_json


def tuned(method, trial, **figures):
    """A run of tuning: on LeNet-300-100, if nothing else is said."""
    about = {"method": method, "trial": dataclasses.asdict(trial), "epochs_trained": 10}
    place = {"network": "lenet_300_100", "dataset": "data", "compression": None, "seed": 0}
    result = {"achieved": 1.0, "top1": 80.0, "dense_top1": 90.0, "densities": {}}
    cell = place | about | result | figures
    return {"epochs": [{"compression": cell["achieved"]}] * cell["epochs_trained"]} | cell


def test_tuning_chooses_the_best_mean():
    slow, fast = settings.Trial(learning_rate=0.1), settings.Trial(learning_rate=0.2)
    cells = [tuned("one_shot", t, top1=top1) for t, top1 in ((slow, 80), (slow, 90), (fast, 86), (fast, 85))]
    assert settings.chosen("one_shot", cells, (32,)) == fast


def test_tuning_chooses_by_all_its_compressions(tune):
    # Three points better at 32×, and four worse at 128×; STR is between its decays if they lie around both.
    slow, fast = settings.Trial(learning_rate=0.1), settings.Trial(learning_rate=0.2)
    rows = ((slow, 32, 90), (slow, 128, 80), (fast, 32, 87), (fast, 128, 84))
    cells = [tuned("one_shot", t, compression=c, top1=top1) for t, c, top1 in rows]
    assert settings.chosen("one_shot", cells, (32, 128)) == fast
    cells = [str_cell(0.1, 1e-3, 16, 90), str_cell(0.1, 4e-3, 64, 89)]
    assert settings.chosen("str", cells, (32, 128)) == slow
    cells += [str_cell(0.2, 1e-3, 16, 88), str_cell(0.2, 4e-3, 256, 80)]
    assert settings.chosen("str", cells, (32, 128)) == fast
    # LeNet-300-100 has both, LeNet-5 has one; a network of which nothing is pruned is at none of them.
    methods = ("ltp", "dense")
    for arch, expected in (("lenet_300_100", 30), ("lenet5", 15)):
        config, ran = tune(lambda *_: 80.0, arch=arch, methods=methods, tuning_seeds=(0,))
        counts = collections.Counter(method for method, *_ in ran)
        assert (counts["dense"], counts["ltp"]) == (15, expected)
        assert len(compare.tuning(config, methods)) == 15 + expected


def test_equally_good_settings_are_told_apart_by_their_place():
    # 9,026 and 9,044 of 10,000 images are as many as 9,056 and 9,014, but not so in float32.
    slow, fast = settings.Trial(learning_rate=0.1), settings.Trial(learning_rate=0.2)
    right = ((slow, 9026), (slow, 9044), (fast, 9056), (fast, 9014))
    cells = [tuned("one_shot", t, top1=100 * float(np.float32(n) / np.float32(10_000))) for t, n in right]
    assert sum(cell["top1"] for cell in cells[:2]) < sum(cell["top1"] for cell in cells[2:])
    assert settings.chosen("one_shot", cells, (32,)) == slow


METHODS = typing.get_args(compare.Method)
TRAIN_5 = compare_networks.NETWORKS["lenet5"].train


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """Tuning with runs that cost nothing: ``tune(top1, **options)`` with ``top1(place, trial)``; what it ran."""
    ran = []

    def fill(harness, train, cells, method, compression, trial):
        for path, seed in cells:
            place = int(path.name.split("trial")[1].split("_")[0])
            if compare.stored(path, trial, train) is None:
                ran.append((method, place, seed, trial))
                figures = {"achieved": 6e3 * trial.weight_decay or 1.0, "top1": tune.top1(place, trial)}
                about = {"seed": seed, "epochs_trained": train.epochs, "compression": compression}
                write_json(path, tuned(method, trial, **about) | figures)

    def tune(top1, **options):
        tune.top1 = top1
        config = compare.CompareConfig(command="tune", results=tmp_path, **options)
        ran.clear()
        compare.tune(config, None)
        return config, ran

    monkeypatch.setattr(compare, "fill", fill)
    return tune


def test_tuning_tries_nine_settings_and_six_around_the_best(tune):
    nine = settings.trials("gmp_global", TRAIN_5, 32)
    options = {"arch": "lenet5", "methods": ("gmp_global",), "tuning_seeds": (3,)}
    config, ran = tune(lambda place, trial: 90.0 if place == 5 else 80.0, **options)
    assert [trial for *_, trial in ran[:9]] == nine
    # The sixth has a decay of 1e-3. The rate of LeNet-5 is 0.02: half of it, and twice, with each share again.
    assert ran[9:] == [
        ("gmp_global", place, 3, settings.Trial(learning_rate=rate, prune=share, weight_decay=1e-3))
        for place, (rate, share) in enumerate(itertools.product((0.01, 0.04), (0.2, 0.5, 0.8)), 9)
    ]
    assert tune(lambda *_: pytest.fail("was run again"), **options)[1] == []
    # All of them may be chosen.
    assert [cell["trial"] for cell in compare.tuning(config, ("gmp_global",))] == [
        dataclasses.asdict(trial) for trial in (*nine, *settings.further_trials("gmp_global", TRAIN_5, nine[5], 32))
    ]
    # If another of the nine is the best, the six are others.
    write_json(
        compare.tuning_file(config, "gmp_global", settings.Setting(32, 0, nine[0]), 3),
        tuned("gmp_global", nine[0], epochs_trained=5, top1=91.0),
    )
    with pytest.raises(ConfigError, match="6 runs of the tuning on lenet5 are missing"):
        compare.tuning(config, ("gmp_global",))
    assert [place for _, place, _, _ in tune(lambda *_: 80.0, **options)[1]] == list(range(9, 15))


def test_every_method_has_the_same_number_of_trials():
    for setup in compare_networks.NETWORKS.values():
        for method in METHODS:
            for compression in setup.tuning_compressions:
                nine = settings.trials(method, setup.train, compression)
                for best in nine:
                    further = settings.further_trials(method, setup.train, best, compression)
                    assert len({*nine, *further}) == settings.TRIALS == 15


@pytest.mark.parametrize(
    ("method", "best", "expected"),
    [
        # (rate, prune, select, initial, decay); the network's own rate is 0.02, and it has 5 epochs.
        *(
            (method, {}, [(rate, 0, 0, 0, decay) for decay in (0, 1e-3, 2e-3) for rate in (0.005, 0.08)])
            for method in ("dense", "one_shot")
        ),
        *(
            (method, {}, [(rate, share, 0, 0, 7e-3) for rate in (0.01, 0.04) for share in (0.2, 0.5, 0.8)])
            for method in ("gmp_uniform", "gmp_global")
        ),
        *(
            (
                method,
                {"leak": 0.1, "select": 0.75},
                [(r, p, s, 0, 7e-3) for r in (0.01, 0.04) for p, s in ((0.4, 0.75), (0.6, 0.75), (0.8, 0.9))],
            )
            for method in ("ltp", "ltp_leak")
        ),
        (
            "str",
            {"initial": -5.0, "learning_rate": 0.05},
            [(0.05, 0, 0, -4, 2 * 0.9 * p / 0.05) for p in (1.2e-4, 2e-4, 3e-4)]
            + [(0.05, 0, 0, -8, 2 * 1.9 * p / 0.05) for p in (1.2e-4, 2e-4, 3e-4)],
        ),
    ],
)
def test_further_trials(method, best, expected):
    best = settings.Trial(**({"learning_rate": 0.02, "weight_decay": 7e-3} | best))
    found = settings.further_trials(method, TRAIN_5, best, 32)
    rows = [(t.learning_rate, t.prune, t.select, t.initial, t.weight_decay) for t in found]
    np.testing.assert_allclose(rows, expected)
    assert {t.leak for t in found} == {best.leak}


def test_every_setting_has_to_have_been_tried_for_as_long(tune):
    # Or methods would not be tuned alike.
    config, _ = tune(lambda place, trial: {7: 90.0, 12: 89.0}.get(place, 80.0), methods=("gmp_global",))
    eighth = settings.Trial(learning_rate=0.1, prune=0.5, weight_decay=2e-3)
    assert settings.chosen("gmp_global", compare.tuning(config, ("gmp_global",)), (32, 128)) == eighth
    # The six behind the ninth have its decay; the first with the larger rate is the best of all now.
    for compression in (32, 128):
        path = compare.tuning_file(config, "gmp_global", settings.Setting(compression, 12, eighth), 0)
        write_json(path, compare_cells.read_cell(path) | {"top1": 95.0})
    thirteenth = settings.Trial(learning_rate=0.2, prune=0.2, weight_decay=2e-3)
    assert settings.chosen("gmp_global", compare.tuning(config, ("gmp_global",)), (32, 128)) == thirteenth
    cell = compare_cells.read_cell(path)
    write_json(path, cell | {"epochs_trained": 9, "epochs": cell["epochs"][:9]})
    message = r"1 runs .* tune --arch=lenet_300_100 --results=.* --methods gmp_global --tuning-seeds 0 1"
    with pytest.raises(ConfigError, match=message):
        compare.tuning(config, ("gmp_global",))
    path.unlink()
    with pytest.raises(ConfigError, match=message):
        compare.tuning(config, ("gmp_global",))


def test_methods_run_with_the_setting_of_another(tune, monkeypatch):
    config, _ = tune(lambda place, trial: 80.0 + (place == 7), methods=("gmp_global",), tuning_seeds=(0,))
    ran = []
    monkeypatch.setattr(compare, "fill", lambda harness, train, cells, *what: ran.append((cells, *what)))
    methods = ("one_shot", "ltp_leak")
    config = dataclasses.replace(
        config, command="run", methods=methods, setting_of="gmp_global", compressions=(8,), seeds=(4,)
    )
    compare.grid(config, None)
    eighth = settings.Trial(learning_rate=0.1, prune=0.5, weight_decay=2e-3)
    runs = config.results / "setting_of_gmp_global_fashion_mnist_lenet_300_100"
    assert ran == [
        ([(runs / "one_shot_8_4.json", 4)], "one_shot", 8, eighth),
        (
            [(runs / "ltp_leak_8_4.json", 4)],
            "ltp_leak",
            8,
            dataclasses.replace(eighth, select=0.75, leak=settings.LEAK),
        ),
    ]
    # A longer run borrows it, too: it needs no tuning of its own length.
    ran.clear()
    longer = dataclasses.replace(config, epochs=30, methods=("one_shot",))
    compare.grid(longer, None)
    file = config.results / "setting_of_gmp_global_fashion_mnist_lenet_300_100_30_epochs" / "one_shot_8_4.json"
    assert ran == [([(file, 4)], "one_shot", 8, eighth)]
    with pytest.raises(ConfigError, match=r"30 runs .* --methods ltp "):
        compare.grid(dataclasses.replace(config, setting_of="ltp"), None)
    with pytest.raises(ConfigError, match=r"has str, which needs a decay for each compression; --setting-of has none"):
        dataclasses.replace(config, methods=("str",)).check()


@pytest.mark.parametrize("words", [[], ["--arch=lenet5", "--augment", "--epochs=30", "--tuning-seeds", "2", "3"]])
def test_what_to_do_when_runs_are_missing_makes_them(tmp_path, monkeypatch, words):
    """The commands of both messages are about the very files that are missed."""

    def advice(error):
        prefix = "python -m experiments.compare "
        return tyro.cli(compare.CompareConfig, args=shlex.split(str(error.value).split(prefix)[1]))

    seeds = ("--tuning-seeds", "2", "3")  # of no use to a report
    words = [*words, f"--results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["compare", "report", *(w for w in words if w not in seeds)])
    with pytest.raises(ConfigError, match="no runs in") as error:
        compare.main()
    config, advised = tyro.cli(compare.CompareConfig, args=["run", *words]), advice(error)
    assert advised.command == "run"
    assert compare.folder(advised) == compare.folder(config)
    with pytest.raises(ConfigError, match="are missing") as error:
        compare.tuning(config, config.methods)
    advised = advice(error)
    assert advised.command == "tune"
    assert (advised.tuning_seeds, advised.methods) == (config.tuning_seeds, config.methods)
    assert compare.folder(advised, held_out=True) == compare.folder(config, held_out=True)


def test_a_compression_is_recorded_the_same_whether_it_is_typed_or_not(tune, monkeypatch):
    config, _ = tune(lambda *_: 80.0, methods=("gmp_global",), tuning_seeds=(0,))
    words = ["run", "--methods", "gmp_global", "--tuning-seeds", "0", f"--results={config.results}"]
    recorded = []
    monkeypatch.setattr(compare, "fill", lambda *args: recorded.append(str(args[-2])))
    for typed in ([], ["--compressions", "8", "16", "32", "64", "128"], ["--compressions", "2.5"]):
        compare.grid(tyro.cli(compare.CompareConfig, args=[*words, *typed]), None)
    assert recorded == ["8", "16", "32", "64", "128"] * 2 + ["2.5"]


def test_a_comparison_of_other_epochs_is_another_one(tune, monkeypatch):
    # In three times the steps STR's decay is 3^(−2/3) of that in ten epochs.
    options = {"methods": ("str",), "tuning_seeds": (0,)}
    _, own = tune(lambda *_: 80.0, **options)
    decays = [trial.weight_decay for *_, trial in own]
    _, ran = tune(lambda *_: 80.0, epochs=30, **options)
    assert [trial.weight_decay for *_, trial in ran] == pytest.approx([decay * 0.480750 for decay in decays])
    # What is tuned with the network's own ten is of no use.
    options = {"methods": ("gmp_global",), "tuning_seeds": (0,)}
    config, _ = tune(lambda *_: 90.0, **options)
    config = dataclasses.replace(config, command="run", epochs=30, compressions=(8,), seeds=(4,))
    with pytest.raises(ConfigError, match=r"30 runs .* are missing: .* --epochs=30 .* --tuning-seeds 0"):
        compare.tuning(config, ("gmp_global",))
    # The ninth setting prunes until 80 % of the run with a decay of 2e-3, whatever its length.
    tune(lambda place, trial: 80.0 + (place == 8), epochs=30, **options)
    ran = []
    monkeypatch.setattr(compare, "fill", lambda harness, *args: ran.append(args))
    compare.grid(config, None)
    train = dataclasses.replace(compare_networks.NETWORKS["lenet_300_100"].train, epochs=30)
    path = config.results / "fashion_mnist_lenet_300_100_30_epochs" / "gmp_global_8_4.json"
    ninth = settings.Trial(learning_rate=0.1, prune=0.8, weight_decay=2e-3)
    assert ran == [(train, [(path, 4)], "gmp_global", 8, ninth)]


def str_cell(rate, decay, compression, top1):
    trial = settings.Trial(learning_rate=rate, weight_decay=decay)
    return tuned("str", trial, achieved=compression, top1=top1)


def test_the_rate_of_str_is_the_best_at_the_compression_of_tuning():
    # At 32×, halfway between 16× and 64×, the first has 85 % and the second 86 %, though the first has the best run.
    cells = [str_cell(0.1, 1e-3, 16, 90), str_cell(0.1, 4e-3, 64, 80)]
    cells += [str_cell(0.2, 1e-3, 16, 87), str_cell(0.2, 4e-3, 64, 85)]
    assert settings.chosen("str", cells, (32,)) == settings.Trial(learning_rate=0.2)


def test_the_rate_of_str_is_judged_by_the_means_over_seeds():
    # The first has 90 % at 31.5× and 80 % at 126×: 89.9 at 32×. Seeds of 31.5×, 3 % apart, have no line of their own.
    cells = [str_cell(0.1, 1e-3, 31, 91), str_cell(0.1, 1e-3, 31.5**2 / 31, 89), str_cell(0.1, 4e-3, 126, 80)]
    assert settings.chosen("str", [*cells, str_cell(0.2, 1e-3, 32, 89.8)], (32,)).learning_rate == 0.1
    assert settings.chosen("str", [*cells, str_cell(0.2, 1e-3, 32, 90.0)], (32,)).learning_rate == 0.2


def test_str_is_judged_between_its_decays():
    # Beyond 8× the first would have 91 % at 32×, for all that was measured of it.
    cells = [str_cell(0.1, 1e-3, 2, 91), str_cell(0.1, 4e-3, 8, 91)]
    assert settings.chosen("str", cells, (32,)).learning_rate == 0.1
    cells += [str_cell(0.2, 1e-3, 16, 90), str_cell(0.2, 4e-3, 64, 89)]
    assert settings.chosen("str", cells, (32,)).learning_rate == 0.2


def test_a_figure_is_read_off_the_line_between_the_nearest_on_either_side():
    # 128× is nearer to two that are sparser, on a steeper slope, than to 16×: three fourths of the way from 16× to
    # 256×, in logarithms.
    points = [(256, 84.0), (16, 90.0), (512, 70.0), (8, 91.0)]
    assert settings.at(128, points) == pytest.approx(85.5)
    assert settings.at(1024, points) == pytest.approx(56)  # beyond them all
    assert settings.at(16, points) == pytest.approx(90)
    assert settings.at(33, [(32, 90.0), (32.3, 91.0)]) == 91.0  # less than 2 % apart they have no line


def test_the_decay_of_str_is_interpolated():
    # Compression 4 at 1e-4 and 16 at 4e-4: halfway between them, in logarithms, lies 8 at 2e-4, and beyond 32 at 8e-4.
    trial = settings.Trial(learning_rate=0.1)
    cells = [str_cell(0.1, 1e-4, 4, 80), str_cell(0.1, 4e-4, 16, 80), str_cell(0.2, 1e-4, 8, 80)]
    for compression, decay in ((8, 2e-4), (32, 8e-4)):
        found = settings.decay_for(compression, trial, [], cells)
        assert found == settings.Trial(learning_rate=0.1, weight_decay=pytest.approx(decay))

    # Seeds of one decay count together, however far apart they are: the geometric mean of 3.9 and 4.1026 is 4.
    seeds = [str_cell(0.1, 1e-4, 3.9, 80), str_cell(0.1, 1e-4, 16 / 3.9, 80), *cells[1:]]
    assert settings.decay_for(8, trial, [], seeds).weight_decay == pytest.approx(2e-4)

    # One run of the grid moves that line: 8 at 1e-4, so 32 at 4e-4. Two, 8 at 1e-4 and 16 at 1.1e-4, are another line.
    own = [str_cell(0.1, 1e-4, 8, 80), str_cell(0.1, 1.1e-4, 16, 80)]
    assert settings.decay_for(32, trial, own[:1], cells).weight_decay == pytest.approx(4e-4)
    assert settings.decay_for(32, trial, own, cells).weight_decay == pytest.approx(1.21e-4)
    # Two within 2 % have no line of their own: the nearer one moves that of tuning.
    own = [str_cell(0.1, 1e-4, 8, 80), str_cell(0.1, 1.1e-4, 7.9, 80)]
    assert settings.decay_for(32, trial, own, cells).weight_decay == pytest.approx(4e-4)


@pytest.fixture
def searched(monkeypatch):
    """Searches with runs that cost nothing: ``search(path, compression, achieved)``, and the decays that were run."""
    tuned_cells = [str_cell(0.1, 1e-4, 4, 80), str_cell(0.1, 4e-4, 16, 80)]
    decays = []

    def search(path, compression, achieved):
        def fill(harness, train, cells, method, compression, trial):
            decays.append(trial.weight_decay)
            figures = {"achieved": achieved(trial.weight_decay), "top1": 80.0}
            cell = tuned("str", trial, seed=0, compression=compression, **figures)
            write_json(cells[0][0], cell)

        monkeypatch.setattr(compare, "fill", fill)
        train, trial = compare_networks.NETWORKS["lenet_300_100"].train, settings.Trial(learning_rate=0.1)
        return compare.search_decay(None, train, path, 0, compression, trial, tuned_cells)

    return search, decays


def test_the_decay_of_str_is_searched_until_the_compression_is_near(tmp_path, searched):
    # Twice as many steps prune twice as much as in tuning: the second decay tried is half the first.
    search, decays = searched
    for _ in range(2):  # the second time it is there
        assert search(tmp_path / "str_8_0.json", 8, lambda decay: decay * 8e4).weight_decay == pytest.approx(1e-4)
        assert decays == pytest.approx([2e-4, 1e-4])
    # Both tries are of use to the next compression: the first had 16×.
    search(tmp_path / "str_16_0.json", 16, lambda decay: decay * 8e4)
    assert len(decays) == 2
    assert compare_cells.read_cell(tmp_path / "str_16_0.json")["compression"] == 16
    assert compare_cells.read_cell(tmp_path / "str_16_0.json")["achieved"] == pytest.approx(16)


def test_a_search_does_not_stop_at_two_tries_of_one_compression(tmp_path, searched):
    # Below a decay of 4e-4 all have 6×. Two tries have no line between them, and the slope of tuning leads on.
    search, decays = searched
    found = search(tmp_path / "str_8_0.json", 8, lambda decay: 6 + decay if decay < 4e-4 else 8.0)
    assert decays == pytest.approx([2e-4, 2.667e-4, 3.556e-4, 4.742e-4], rel=1e-3)
    assert found.weight_decay == decays[-1]


def test_a_search_does_not_go_by_runs_of_other_epochs(tmp_path, searched):
    search, decays = searched
    trial = settings.Trial(learning_rate=0.1, weight_decay=3e-4)
    old = tuned("str", trial, achieved=8.0, seed=0, compression=8, epochs_trained=9)
    write_json(tmp_path / "str_search" / "0.0003_0.json", old)
    assert search(tmp_path / "str_8_0.json", 8, lambda decay: decay * 4e4).weight_decay == pytest.approx(2e-4)
    assert decays == pytest.approx([2e-4])


def test_seeds_that_are_added_have_the_decay_that_the_first_one_found(tune, monkeypatch):
    config, _ = tune(lambda *_: 80.0, methods=("str",), tuning_seeds=(0,))
    folder, ran = config.results / "fashion_mnist_lenet_300_100", []

    def fill(harness, train, cells, method, compression, trial):
        ran.append((trial.weight_decay, [seed for _, seed in cells]))
        for path, seed in cells:
            write_json(path, tuned("str", trial, seed=seed, compression=compression, achieved=8.0, top1=80.0))

    monkeypatch.setattr(compare, "fill", fill)
    for seeds in ((1, 2), (0, 3), (0,)):
        compare.grid(dataclasses.replace(config, command="run", compressions=(8,), seeds=seeds), None)
    decay = compare_cells.read_cell(folder / "str_8_1.json")["trial"]["weight_decay"]
    assert ran == [(decay, [1]), (decay, [1, 2]), (decay, [0, 3]), (decay, [0])]


def test_a_search_takes_the_nearest_of_five(tmp_path, searched):
    # The network stays dense below a decay and collapses above it: no decay gives 8×, and 4 is nearer to it than 100.
    search, decays = searched
    found = search(tmp_path / "str_8_0.json", 8, lambda decay: 4 + decay if decay < 1.7e-4 else 100 + decay)
    assert len(decays) == 5
    assert compare_cells.read_cell(tmp_path / "str_8_0.json")["achieved"] == pytest.approx(4, abs=0.01)
    assert found.weight_decay < 1.7e-4


@pytest.mark.parametrize("compared", [False, True])
def test_the_table_of_tuning_is_in_the_order_of_the_places(tmp_path, tune, monkeypatch, compared):
    config, _ = tune(lambda place, trial: 80.0 + place, methods=("ltp", "gmp_global"), tuning_seeds=(0,))
    # Whether all fifteen are there or not, and a grid.
    missing = settings.Setting(32, 4, settings.trials("ltp", compare_networks.NETWORKS["lenet_300_100"].train, 32)[4])
    compare.tuning_file(config, "ltp", missing, 0).unlink()
    figures = {"compression": 8, "seed": 0, "top1": 90.0, "achieved": 8.0, "dense_top1": 91.0}
    way = {"densities": {"head/kernel": 0.1}, "epochs": [{"compression": 8.0}], "epochs_trained": 1}
    run = tuned("ltp", missing.trial, network="lenet_300_100", dataset="data", **figures, **way)
    grid = tmp_path / "fashion_mnist_lenet_300_100"
    if compared:
        write_json(grid / "ltp_8_0.json", run)
    words = ["compare", "report", f"--results={tmp_path}", f"--pictures={tmp_path}"]
    monkeypatch.setattr(sys, "argv", words)
    compare.main()
    lines = (tmp_path / "fashion_mnist_held_out_lenet_300_100" / "table.md").read_text().splitlines()[2:]
    places = [*range(4), *range(5, 15), *range(15)]
    expected = [80 + place for place in (*places, *range(15), *range(15))]
    assert [float(line.split("|")[-2].split()[0]) for line in lines] == expected
    assert (grid / "table.md").exists() == compared
