"""A target asked for on the command line, the harness, and what the comparison makes of its figures."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltp_jax as ltp
from experiments import ablation, ablation_variants, compare, compare_report
from experiments import run as runs
from experiments.config import ConfigError, LtpConfig, TrainConfig, parse
from experiments.data import digits
from experiments.digits import DigitsConfig
from experiments.harness import Harness, hold_out
from experiments.run import weights_optimizer
from ltp_jax import models
from ltp_jax.pruner import dense
from ltp_jax.target import target_density
from ltp_jax.trail import Trail
from ltp_jax.training import create_state, cross_entropy, make_train_step

TRAIN = TrainConfig(epochs=3, batch_size=128, learning_rate=0.05)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    pretrain = TrainConfig(epochs=1, batch_size=128, learning_rate=0.05)
    return Harness(digits(), "digits", tmp_path_factory.mktemp("harness"), pretrain)


def digits_run(workdir, harness, ltp_config):
    """A short run of the experiment from the harness's dense network; its last entry."""
    harness.dense_network(0)
    config = DigitsConfig(
        workdir=workdir,
        dense=next(harness.workdir.glob("*/dense_0")),
        pretrain=harness.pretrain,
        train=TRAIN,
        ltp=ltp_config,
    )
    config.check()
    runs.run(config, models.create("digits", num_classes=10), digits())
    return Trail(workdir).entries[-1], Trail(workdir)


def test_the_command_meets_a_target_compression(tmp_path, harness):
    last, trail = digits_run(tmp_path, harness, LtpConfig(target_compression=16))
    assert last.compression == pytest.approx(16, rel=0.01)
    kernels = [w for path, w in ltp.named_leaves(trail.restore(last)["params"]) if path.endswith("kernel")]
    left = sum(np.count_nonzero(w) for w in kernels) / sum(w.size for w in kernels)
    assert left == pytest.approx(1 / 16, rel=0.01)


def test_a_target_of_multiply_accumulates_weighs_weights_by_their_uses(tmp_path, harness):
    last, trail = digits_run(tmp_path, harness, LtpConfig(target_macs=10))
    # Positions of the output of each convolution: images of 8×8, and a pool behind the second.
    uses = {"block1/conv": 64, "block2/conv": 64, "block3/conv": 16, "dense": 1, "head": 1}
    kernels = {path.removesuffix("/kernel"): w for path, w in ltp.named_leaves(trail.restore(last)["params"])}
    total = sum(n * kernels[name].size for name, n in uses.items())
    left = sum(n * np.count_nonzero(kernels[name]) for name, n in uses.items())
    assert total / left == pytest.approx(10, rel=0.01)
    assert last.macs_compression == pytest.approx(total / left)
    assert last.compression != pytest.approx(10, rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ltp.target-compression=16", "--ltp.target-density=0.1"], "exclude each other"),
        (["--ltp.target-compression=16", "--ltp.leak=2"], "--ltp.leak is 2.0; accepted is 0 to 1"),
        (["--ltp.penalty=16", "--ltp.leak=0.1"], "--ltp.leak goes with a target"),
        (["--ltp.target-compression=1"], "target-compression is 1.0; accepted is more than 1"),
        (
            ["--ltp.target-density=1.5"],
            "target-density is 1.5; accepted is more than 0, less than 1",
        ),
        (["--ltp.target-macs=0.5"], "target-macs is 0.5; accepted is more than 1"),
        (["--ltp.target-compression=4", "--ltp.exact-gradient"], "not with a target"),
        (
            ["--ltp.target-compression=4", "--ltp.prune=0.8"],
            "prune is 0.8; accepted is more than 0, at most --ltp.select",
        ),
    ],
)
def test_targets_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse({"digits": DigitsConfig()}, "", words)


def test_a_target_below_one_weight_a_tensor_is_refused(tmp_path, harness):
    with pytest.raises(ConfigError, match="fewer than one weight to each"):
        digits_run(tmp_path, harness, LtpConfig(target_compression=1e6))


def test_the_harness_takes_the_steps_of_an_ordinary_loop(harness):
    network, seed, train = harness.dense_network(0), 3, dataclasses.replace(TRAIN, epochs=1)
    steps = harness.steps(train)
    (state,) = harness.compiled(dense(), train)(network, seed)
    optimizer = weights_optimizer(train, steps)
    step = jax.jit(make_train_step(harness.apply, optimizer, dense(), cross_entropy()))
    expected = create_state(network["params"], network["batch_stats"], optimizer, dense(), jax.random.key(seed))
    for batch in itertools.islice(harness.dataset.train(train.batch_size, seed=seed), steps):
        expected = step(expected, {"image": batch["image"], "label": batch["label"]})
    assert int(state.step) == steps
    for (path, w), (_, v) in zip(ltp.named_leaves(state.params), ltp.named_leaves(expected.params), strict=True):
        # A compiler may add up in another order in a loop; other batches would be far beyond this.
        np.testing.assert_allclose(w, v, atol=2e-3, err_msg=path)


def test_distillation_takes_the_labels_of_the_network_it_starts_from(harness, tmp_path):
    network, train = harness.dense_network(0), dataclasses.replace(TRAIN, epochs=1)
    wrong = dataclasses.replace(harness.dataset, train_labels=np.zeros_like(harness.dataset.train_labels))
    misled = Harness(wrong, "digits", tmp_path, harness.pretrain)
    (right,), (same,) = (h.compiled(dense(), train, distill=1.0)(network, 0) for h in (harness, misled))
    jax.tree.map(np.testing.assert_array_equal, right.params, same.params)
    # What is learned are the network's own probabilities, whose entropy no loss can be below.
    total, entropies = jax.device_get(right.totals), []
    for batch in itertools.islice(harness.dataset.train(train.batch_size, seed=0), harness.steps(train)):
        logits, _ = harness.apply(network["params"], network["batch_stats"], batch["image"], train=False, key=None)
        entropies.append(-np.mean(np.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1)))
    assert total["loss"] / total["examples"] > np.mean(entropies)


def test_the_dense_network_is_trained_once(harness):
    first, again = harness.dense_network(0), harness.dense_network(0)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_hold_out_takes_the_last_training_images():
    data = digits()
    held = hold_out(data, 100)
    assert (held.train_size, held.eval_size) == (data.train_size - 100, 100)
    np.testing.assert_array_equal(held.eval_images, data.train_images[-100:])
    np.testing.assert_array_equal(held.train_labels, data.train_labels[:-100])


def test_cells_are_kept_and_not_run_again(tmp_path, harness, monkeypatch):
    monkeypatch.setitem(compare.NETWORKS, "digits", compare.Setup(digits, harness.pretrain, TRAIN))
    trial = compare.Trial(learning_rate=0.05, prune=0.5, select=0.75)
    cells = [(tmp_path / "ltp_8_0.json", 0)]
    compare.fill(harness, cells, "ltp", 8, trial)
    cell = json.loads(cells[0][0].read_text())
    assert cell["achieved"] == pytest.approx(8, rel=0.01)
    assert cell["trial"] == dataclasses.asdict(trial)
    assert len(cell["epochs"]) == TRAIN.epochs
    monkeypatch.setattr(compare, "run_cell", lambda *args: pytest.fail("was run again"))
    compare.fill(harness, cells, "ltp", 8, trial)
    # With another setting it is another run.
    other = dataclasses.replace(trial, prune=0.25)
    monkeypatch.setattr(compare, "run_cell", lambda *args: {"achieved": 7.0, "top1": 50.0})
    compare.fill(harness, cells, "ltp", 8, other)
    again = json.loads(cells[0][0].read_text())
    assert (again["trial"], again["achieved"]) == (dataclasses.asdict(other), 7.0)


def tuned(method, trial, **figures):
    return {"method": method, "trial": dataclasses.asdict(trial)} | figures


def test_tuning_chooses_the_best_mean():
    slow, fast = compare.Trial(learning_rate=0.1), compare.Trial(learning_rate=0.2)
    cells = [tuned("one_shot", t, top1=top1) for t, top1 in ((slow, 80), (slow, 90), (fast, 86), (fast, 85))]
    assert compare.chosen("one_shot", cells, 32) == fast


def test_settings_of_another_network_are_those_at_the_same_place(tmp_path):
    theirs, ours = (compare.NETWORKS[arch].train for arch in ("lenet_300_100", "resnet20"))
    config = compare.CompareConfig(
        command="run", arch="resnet20", methods=("gmp_global",), settings_of="lenet_300_100", results=tmp_path
    )
    for place, trial in enumerate(compare.trials("gmp_global", theirs)):
        for seed in config.tuning_seeds:
            path = compare.tuning_file(config, "lenet_300_100", "gmp_global", place, seed)
            compare_report.write_cell(path, tuned("gmp_global", trial, top1=90.0 if place == 7 else 80.0))
    # The eighth of gradual magnitude pruning: half of the run, the largest decay, at the network's own rate of 0.05.
    assert compare.trials("gmp_global", ours)[7] == compare.Trial(learning_rate=0.05, prune=0.5, weight_decay=2e-3)
    assert compare.chosen("gmp_global", compare.tuning(config), 32) == compare.trials("gmp_global", ours)[7]
    # Every setting has to have been tried, or methods would not be tuned alike.
    path.unlink()
    with pytest.raises(
        ConfigError, match=r"1 runs .* tune --arch=lenet_300_100 --methods gmp_global --tuning-seeds 0 1"
    ):
        compare.tuning(config)
    with pytest.raises(ConfigError, match=r"18 runs of the tuning on resnet20 are missing: .* tune --arch=resnet20"):
        compare.tuning(dataclasses.replace(config, settings_of=None))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"seeds": ()}, "--seeds is empty"),
        ({"methods": ()}, "--methods is empty"),
        ({"compressions": (0.5,)}, "--compressions has 0.5; accepted is more than 1"),
        ({"tuning_seeds": (-1,)}, "--tuning-seeds has -1"),
    ],
)
def test_impossible_grids_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        compare.CompareConfig(command="run", **words).check()


def test_compression_that_a_method_cannot_meet_is_refused(tmp_path, harness, monkeypatch):
    monkeypatch.setitem(compare.NETWORKS, "digits", compare.Setup(digits, harness.pretrain, TRAIN))
    trial = compare.Trial(learning_rate=0.05, prune=0.5, select=0.75)
    with pytest.raises(ConfigError, match="--compressions has 300000, which ltp cannot meet"):
        compare.fill(harness, [(tmp_path / "ltp.json", 0)], "ltp", 300_000, trial)


def str_cell(rate, decay, compression, top1):
    trial = compare.Trial(learning_rate=rate, weight_decay=decay)
    return tuned("str", trial, achieved=compression, top1=top1)


def test_the_rate_of_str_is_the_best_at_the_compression_of_tuning():
    # At 32×, halfway between 16× and 64×, the first has 85 % and the second 86 %, though the first has the best run.
    cells = [str_cell(0.1, 1e-3, 16, 90), str_cell(0.1, 4e-3, 64, 80)]
    cells += [str_cell(0.2, 1e-3, 16, 87), str_cell(0.2, 4e-3, 64, 85)]
    assert compare.chosen("str", cells, 32) == compare.Trial(learning_rate=0.2)


def test_the_decay_of_str_is_interpolated():
    # Compression 4 at 1e-4 and 16 at 4e-4: halfway between them, in logarithms, lies 8 at 2e-4, and beyond 32 at 8e-4.
    trial = compare.Trial(learning_rate=0.1)
    cells = [str_cell(0.1, 1e-4, 4, 80), str_cell(0.1, 4e-4, 16, 80), str_cell(0.2, 1e-4, 8, 80)]
    for compression, decay in ((8, 2e-4), (32, 8e-4)):
        found = compare.decay_for(compression, trial, [], cells)
        assert found == compare.Trial(learning_rate=0.1, weight_decay=pytest.approx(decay))

    # One run of the grid moves that line: 8 at 1e-4, so 32 at 4e-4. Two, 8 at 1e-4 and 16 at 1.1e-4, are another line.
    own = [str_cell(0.1, 1e-4, 8, 80), str_cell(0.1, 1.1e-4, 16, 80)]
    assert compare.decay_for(32, trial, own[:1], cells).weight_decay == pytest.approx(4e-4)
    assert compare.decay_for(32, trial, own, cells).weight_decay == pytest.approx(1.21e-4)


@pytest.fixture
def searched(monkeypatch):
    """Searches with runs that cost nothing: ``search(path, compression, achieved)``, and the decays that were run."""
    tuned_cells = [str_cell(0.1, 1e-4, 4, 80), str_cell(0.1, 4e-4, 16, 80)]
    decays = []

    def search(path, compression, achieved):
        def fill(harness, cells, method, compression, trial):
            decays.append(trial.weight_decay)
            cell = {"trial": dataclasses.asdict(trial), "achieved": achieved(trial.weight_decay), "seed": 0}
            compare_report.write_cell(cells[0][0], cell | {"compression": compression})

        monkeypatch.setattr(compare, "fill", fill)
        return compare.search_decay(None, path, 0, compression, compare.Trial(learning_rate=0.1), tuned_cells)

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
    assert compare_report.read_cell(tmp_path / "str_16_0.json")["compression"] == 16
    assert compare_report.read_cell(tmp_path / "str_16_0.json")["achieved"] == pytest.approx(16)


def test_a_search_takes_the_nearest_of_five(tmp_path, searched):
    # The network stays dense below a decay and collapses above it: no decay gives 8×, and 4 is nearer to it than 100.
    search, decays = searched
    found = search(tmp_path / "str_8_0.json", 8, lambda decay: 4 + decay if decay < 1.7e-4 else 100 + decay)
    assert len(decays) == 5
    assert compare_report.read_cell(tmp_path / "str_8_0.json")["achieved"] == pytest.approx(4, abs=0.01)
    assert found.weight_decay < 1.7e-4


def test_every_method_has_the_same_number_of_trials():
    for setup in compare.NETWORKS.values():
        methods = ("dense", "one_shot", "gmp_uniform", "gmp_global", "str", "ltp", "ltp_no_leak")
        assert [len(set(compare.trials(method, setup.train))) for method in methods] == [9] * 7


def cell(method, compression, seed, top1, achieved):
    return {
        "network": "net",
        "dataset": "data",
        "method": method,
        "compression": compression,
        "seed": seed,
        "top1": top1,
        "achieved": achieved,
        "dense_top1": 91.0 + seed,
        "densities": {"a/kernel": 0.1, "b/kernel": 0.2},
        "trial": {"prune": 0.4},
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


def test_table_tells_of_a_seed_that_began_with_two_networks():
    other = cell("gmp_global", 16, 0, 87.0, 16.0)
    lines = compare_report.markdown([*CELLS, other | {"dense_top1": other["dense_top1"] - 0.25}]).splitlines()
    assert "Not the same for all methods with seed 0: up to 0.25 apart." in lines
    assert not any("Not the same" in line for line in compare_report.markdown(CELLS).splitlines())


def test_a_run_that_missed_its_compression_by_half_is_no_rival():
    lines = compare_report.markdown([*CELLS[:2], cell("str", 8, 0, 95.0, 4.0)]).splitlines()
    assert "| STR | 95.00 (1) at 4.0–4.0× |" in lines
    assert not any("less STR" in line for line in lines)


def test_table_of_tuning():
    trial = {"learning_rate": 0.1, "weight_decay": 1e-3, "prune": 0.4}
    other = {"learning_rate": 0.05, "weight_decay": 0.0, "prune": 0.0}
    cells = [row | {"trial": trial if row["method"] == "ltp" else other} for row in CELLS[:4]]
    lines = compare_report.tuning_markdown(cells).splitlines()
    assert lines[2:] == [
        "| LTP | 0.1 | 0.001 | 40 % | 8.0× | 90.50 ± 0.71 (2) |",
        "| gradual magnitude, global | 0.05 | the network's | – | 16.0× | 87.00 (1) |",
        "| STR | 0.05 | the network's | – | 9.0× | 88.00 (1) |",
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
            compare_report.write_cell(folder / f"{i}.json", row)
    table, *drawn = compare_report.write(folder, tmp_path / "docs")
    assert "Dense network that all start from" in table.read_text()
    assert len(drawn) == pictures
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_broken_record_of_a_run_is_said(tmp_path):
    (tmp_path / "ltp_8_0.json").write_text("{")
    with pytest.raises(ConfigError, match=r"ltp_8_0.json is no record of a run.*remove it"):
        compare_report.read_cells(tmp_path)


def test_variants_have_files_of_their_own():
    names = [ablation.file_name(variant, 0) for variant in ablation.VARIANTS]
    assert len(set(names)) == len(names)


def test_units_decide_what_is_pruned_and_leave_the_weights_as_they_are():
    # In units of 1 and 1/4 the weights 1, 2 and −3 are 1, 2 and −0.75: half a budget of four keeps 1 and 2.
    params = {"kernel": jnp.array([[1.0], [2.0], [-3.0], [0.5]])}
    units = {"kernel": jnp.array([[1.0], [1.0], [0.25], [1.0]])}
    job = ablation_variants.Job(ltp.plan(params), 10, {}, np.zeros(()))
    make = ablation_variants.in_units(
        lambda job: target_density(job.plan, 0.5, prune_steps=1, select_steps=1), lambda job: units
    )
    pruner = make(job)
    state = pruner.init(params)
    same, state = pruner.update({"kernel": jnp.float32(0)}, params, params, state, 0)
    np.testing.assert_array_equal(same["kernel"], params["kernel"])
    np.testing.assert_array_equal(pruner.harden(params, state)["kernel"], [[1.0], [2.0], [0.0], [0.0]])
