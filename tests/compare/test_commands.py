"""A target asked for on the command line, the harness, and what the comparison makes of its figures."""

import collections
import dataclasses
import itertools
import json
import shlex
import shutil
import sys

import jax
import numpy as np
import pytest
import tyro
from flax import traverse_util

import ltp_jax as ltp
from experiments import compare, compare_report
from experiments import run as runs
from experiments.config import ConfigError, LtpConfig, TrainConfig, parse, write_json
from experiments.data import digits
from experiments.digits import DigitsConfig
from experiments.harness import Harness, hold_out
from experiments.run import weights_optimizer
from ltp_jax import models
from ltp_jax.pruner import dense
from ltp_jax.trail import Trail, save_network
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


def kept_network(tmp_path, harness, seed=0):
    """A copy of the harness that finds the dense network of the other one, and the network's path."""
    harness.dense_network(seed)
    shutil.copytree(harness.workdir, tmp_path, dirs_exist_ok=True)
    return Harness(harness.dataset, harness.arch, tmp_path, harness.pretrain), next(tmp_path.glob(f"*/dense_{seed}"))


def test_a_dense_network_that_was_trained_in_another_way_is_refused(tmp_path, harness):
    copy, path = kept_network(tmp_path, harness)
    longer = dataclasses.replace(harness.pretrain, epochs=2, batch_size=64)
    other = Harness(harness.dataset, "digits", tmp_path, longer)
    with pytest.raises(ConfigError, match=r"dense_0 was .*: epochs was 1, is 2; batch_size was 128, is 64. Remove it"):
        other.dense_network(0)
    # One of before has no record: it is taken for what it should be, and is that from then on.
    path.with_suffix(".json").unlink()
    copy.dense_network(0)
    with pytest.raises(ConfigError, match="epochs was 1, is 2"):
        other.dense_network(0)
    path.with_suffix(".json").write_text("[1")
    with pytest.raises(ConfigError, match=r"dense_0.json is no record of a training .* remove it and .*dense_0,"):
        copy.dense_network(0)


@pytest.mark.parametrize(("weight", "said"), [(1.0, "a temperature of 0.0"), (np.nan, "a temperature of nan")])
def test_a_dense_network_that_cannot_be_pruned_is_refused(tmp_path, harness, weight, said):
    copy, path = kept_network(tmp_path, harness)
    network = copy.dense_network(0)
    kernel = next(iter(copy.plan.paths))
    flat = {name: np.full_like(w, weight) if name == f"params/{kernel}" else w for name, w in ltp.named_leaves(network)}
    broken = traverse_util.unflatten_dict(flat, sep="/")
    save_network(path, broken["params"], broken["batch_stats"])
    with pytest.raises(ConfigError, match=f"seed 0 cannot be pruned: {kernel} has {said}.*; remove .*dense_0, and it"):
        copy.dense_network(0)


def test_a_dense_network_that_diverged_is_refused_and_not_kept(tmp_path, harness):
    wild = dataclasses.replace(harness.pretrain, learning_rate=1e30)
    with pytest.raises(ConfigError, match=r"cannot be pruned: .* nan: .*; it has to be trained in another way"):
        Harness(harness.dataset, "digits", tmp_path, wild).dense_network(0)
    assert not list(tmp_path.glob("*/*"))


def test_hold_out_takes_the_last_training_images():
    data = digits()
    held = hold_out(data, 100)
    assert (held.train_size, held.eval_size) == (data.train_size - 100, 100)
    np.testing.assert_array_equal(held.eval_images, data.train_images[-100:])
    np.testing.assert_array_equal(held.train_labels, data.train_labels[:-100])


def test_cells_are_kept_and_not_run_again(tmp_path, harness, monkeypatch):
    trial = compare.Trial(learning_rate=0.05, prune=0.5, select=0.75)
    cells = [(tmp_path / "ltp_8_0.json", 0)]
    compare.fill(harness, TRAIN, cells, "ltp", 8, trial)
    cell = json.loads(cells[0][0].read_text())
    assert cell["achieved"] == pytest.approx(8, rel=0.01)
    assert cell["trial"] == dataclasses.asdict(trial)
    assert len(cell["epochs"]) == TRAIN.epochs
    monkeypatch.setattr(compare, "run_cell", lambda *args: pytest.fail("was run again"))
    compare.fill(harness, TRAIN, cells, "ltp", 8, trial)
    # With another setting it is another run.
    other = dataclasses.replace(trial, prune=0.25)
    monkeypatch.setattr(compare, "run_cell", lambda *args: {"achieved": 7.0, "top1": 50.0})
    compare.fill(harness, TRAIN, cells, "ltp", 8, other)
    again = json.loads(cells[0][0].read_text())
    assert (again["trial"], again["achieved"]) == (dataclasses.asdict(other), 7.0)
    # And so it is after another number of epochs.
    write_json(cells[0][0], cell)
    compare.fill(harness, dataclasses.replace(TRAIN, epochs=4), cells, "ltp", 8, trial)
    assert json.loads(cells[0][0].read_text())["achieved"] == 7.0


def tuned(method, trial, **figures):
    """A run of tuning: on LeNet-300-100, if nothing else is said."""
    about = {"method": method, "trial": dataclasses.asdict(trial), "epochs_trained": 10}
    return dict.fromkeys(compare_report.KEYS) | about | figures


def test_tuning_chooses_the_best_mean():
    slow, fast = compare.Trial(learning_rate=0.1), compare.Trial(learning_rate=0.2)
    cells = [tuned("one_shot", t, top1=top1) for t, top1 in ((slow, 80), (slow, 90), (fast, 86), (fast, 85))]
    assert compare.chosen("one_shot", cells, (32,)) == fast


def test_tuning_chooses_by_all_its_compressions(tune):
    # Three points better at 32×, and four worse at 128×; STR is between its decays if they lie around both.
    slow, fast = compare.Trial(learning_rate=0.1), compare.Trial(learning_rate=0.2)
    rows = ((slow, 32, 90), (slow, 128, 80), (fast, 32, 87), (fast, 128, 84))
    cells = [tuned("one_shot", t, compression=c, top1=top1) for t, c, top1 in rows]
    assert compare.chosen("one_shot", cells, (32, 128)) == fast
    cells = [str_cell(0.1, 1e-3, 16, 90), str_cell(0.1, 4e-3, 64, 89)]
    assert compare.chosen("str", cells, (32, 128)) == slow
    cells += [str_cell(0.2, 1e-3, 16, 88), str_cell(0.2, 4e-3, 256, 80)]
    assert compare.chosen("str", cells, (32, 128)) == fast
    # LeNet-300-100 has both, if it is not told otherwise; a network of which nothing is pruned is at none of them.
    options = {"methods": ("ltp", "dense"), "tuning_seeds": (0,)}
    for compressions, expected in (((), 30), ((128,), 0)):
        config, ran = tune(lambda *_: 80.0, tuning_compressions=compressions, **options)
        counts = collections.Counter(method for method, *_ in ran)
        assert (counts["dense"], counts["ltp"]) == (expected // 2, expected)
        assert len(compare.tuning(config)) == (45 if expected else 30)


def test_equally_good_settings_are_told_apart_by_their_place():
    # 9,026 and 9,044 of 10,000 images are as many as 9,056 and 9,014, but not so in float32.
    slow, fast = compare.Trial(learning_rate=0.1), compare.Trial(learning_rate=0.2)
    right = ((slow, 9026), (slow, 9044), (fast, 9056), (fast, 9014))
    cells = [tuned("one_shot", t, top1=100 * float(np.float32(n) / np.float32(10_000))) for t, n in right]
    assert sum(cell["top1"] for cell in cells[:2]) < sum(cell["top1"] for cell in cells[2:])
    assert compare.chosen("one_shot", cells, (32,)) == slow


METHODS = ("dense", "one_shot", "gmp_uniform", "gmp_global", "str", "ltp", "ltp_leak")
TRAIN_5 = compare.NETWORKS["lenet5"].train


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
    nine = compare.trials("gmp_global", TRAIN_5)
    options = {"arch": "lenet5", "methods": ("gmp_global",), "tuning_seeds": (3,)}
    config, ran = tune(lambda place, trial: 90.0 if place == 5 else 80.0, **options)
    assert [trial for *_, trial in ran[:9]] == nine
    # The sixth has a decay of 1e-3. The rate of LeNet-5 is 0.02: half of it, and twice, with each share again.
    assert ran[9:] == [
        ("gmp_global", place, 3, compare.Trial(learning_rate=rate, prune=share, weight_decay=1e-3))
        for place, (rate, share) in enumerate(itertools.product((0.01, 0.04), (0.2, 0.5, 0.8)), 9)
    ]
    assert tune(lambda *_: pytest.fail("was run again"), **options)[1] == []
    # All of them may be chosen.
    assert [cell["trial"] for cell in compare.tuning(config)] == [
        dataclasses.asdict(trial) for trial in (*nine, *compare.further_trials("gmp_global", TRAIN_5, nine[5]))
    ]
    # If another of the nine is the best, the six are others.
    write_json(
        compare.tuning_file(config, "lenet5", "gmp_global", compare.Setting(32, 0, nine[0]), 3),
        tuned("gmp_global", nine[0], epochs_trained=5, top1=91.0),
    )
    with pytest.raises(ConfigError, match="6 runs of the tuning on lenet5 are missing"):
        compare.tuning(config)
    assert [place for _, place, _, _ in tune(lambda *_: 80.0, **options)[1]] == list(range(9, 15))


def test_every_method_has_the_same_number_of_trials():
    for setup in compare.NETWORKS.values():
        for method in METHODS:
            for compression in setup.tuning_compressions:
                nine = compare.trials(method, setup.train, compression)
                for best in nine:
                    further = compare.further_trials(method, setup.train, best, compression)
                    assert len({*nine, *further}) == compare.TRIALS == 15


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
    best = compare.Trial(**({"learning_rate": 0.02, "weight_decay": 7e-3} | best))
    found = compare.further_trials(method, TRAIN_5, best)
    rows = [(t.learning_rate, t.prune, t.select, t.initial, t.weight_decay) for t in found]
    np.testing.assert_allclose(rows, expected)
    assert {t.leak for t in found} == {best.leak}


def test_settings_of_another_network_are_those_at_the_same_place(tune):
    ours = compare.NETWORKS["resnet20"].train
    options = {"methods": ("gmp_global",)}
    tune(lambda place, trial: {7: 90.0, 12: 89.0}.get(place, 80.0), **options)
    config = dataclasses.replace(
        tune(lambda *_: 0.0, **options)[0], command="run", arch="resnet20", settings_of="lenet_300_100"
    )
    # The eighth of gradual magnitude pruning: half of the run, the largest decay, at the network's own rate of 0.05.
    eighth = compare.Trial(learning_rate=0.05, prune=0.5, weight_decay=2e-3)
    assert compare.trials("gmp_global", ours)[7] == eighth
    assert compare.chosen("gmp_global", compare.tuning(config), (32,)) == eighth
    # The six behind the ninth have its decay; the first with the larger rate is the best of all now.
    path = compare.tuning_file(config, "lenet_300_100", "gmp_global", compare.Setting(32, 12, eighth), 0)
    write_json(path, compare_report.read_cell(path) | {"top1": 95.0})
    thirteenth = compare.Trial(learning_rate=0.1, prune=0.2, weight_decay=2e-3)
    assert compare.chosen("gmp_global", compare.tuning(config), (32,)) == thirteenth
    # Every setting has to have been tried, for as long, or methods would not be tuned alike.
    write_json(path, compare_report.read_cell(path) | {"epochs_trained": 9})
    message = r"1 runs .* tune --arch=lenet_300_100 --results=.* --methods gmp_global --tuning-seeds 0 1"
    with pytest.raises(ConfigError, match=message):
        compare.tuning(config)
    path.unlink()
    with pytest.raises(ConfigError, match=message):
        compare.tuning(config)
    with pytest.raises(ConfigError, match=r"30 runs of the tuning on resnet20 are missing: .* tune --arch=resnet20"):
        compare.tuning(dataclasses.replace(config, settings_of=None))


@pytest.mark.parametrize("words", [[], ["--arch=lenet5", "--epochs=30", "--tuning-seeds", "2", "3"]])
def test_what_to_do_when_runs_are_missing_makes_them(tmp_path, monkeypatch, words):
    """The commands of both messages are about the very files that are missed."""

    def advice(error):
        prefix = "python -m experiments.compare "
        return tyro.cli(compare.CompareConfig, args=shlex.split(str(error.value).split(prefix)[1]))

    words = [*words, f"--results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["compare", "report", *words])
    with pytest.raises(ConfigError, match="no runs in") as error:
        compare.main()
    config, advised = tyro.cli(compare.CompareConfig, args=["run", *words]), advice(error)
    assert advised.command == "run"
    assert compare.folder(advised, advised.arch) == compare.folder(config, config.arch)
    with pytest.raises(ConfigError, match="are missing") as error:
        compare.tuning(config)
    advised = advice(error)
    assert advised.command == "tune"
    assert (advised.tuning_seeds, advised.methods) == (config.tuning_seeds, config.methods)
    assert compare.judged(advised) == compare.judged(config)
    assert compare.folder(advised, advised.arch, held_out=True) == compare.folder(config, config.arch, held_out=True)


def test_settings_of_str_of_another_network(tune):
    # At a rate of 0.05, and from s of −8, it is best. ResNet-20 has 3 epochs for 10: its decays are 10/3 as large.
    def top1(place, trial):
        return 50 + 10 * (trial.learning_rate == 0.05) + 10 * (trial.initial == -8.0)

    config = dataclasses.replace(
        tune(top1, methods=("str",))[0], command="run", arch="resnet20", settings_of="lenet_300_100"
    )
    cells = compare.tuning(config)
    assert compare.chosen("str", cells, (32,)) == compare.Trial(learning_rate=0.05, initial=-8.0)
    decays = {cell["trial"]["weight_decay"] for cell in cells if cell["trial"]["initial"] == -8.0}
    products = (1.2e-4, 2e-4, 2.5e-4, 3e-4, 3.5e-4, 4.5e-4)
    assert sorted(decays) == pytest.approx([p * 1.9 * (10 / 3) / 0.05 for p in products])


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
    with pytest.raises(ConfigError, match=r"30 runs .* are missing: .* --epochs=30 .* --tuning-compressions 32 128"):
        compare.tuning(config)
    # The ninth setting prunes until 80 % of the run with a decay of 2e-3, whatever its length.
    tune(lambda place, trial: 80.0 + (place == 8), epochs=30, **options)
    ran = []
    monkeypatch.setattr(compare, "fill", lambda harness, *args: ran.append(args))
    compare.grid(config, None)
    train = dataclasses.replace(compare.NETWORKS["lenet_300_100"].train, epochs=30)
    path = config.results / "fashion_mnist_lenet_300_100_30_epochs" / "gmp_global_8_4.json"
    ninth = compare.Trial(learning_rate=0.1, prune=0.8, weight_decay=2e-3)
    assert ran == [(train, [(path, 4)], "gmp_global", 8, ninth)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"seeds": ()}, "--seeds is empty"),
        ({"epochs": 0}, "--epochs is 0; accepted is 1 or more"),
        ({"methods": ()}, "--methods is empty"),
        ({"compressions": (0.5,)}, "--compressions has 0.5; accepted is a finite number, more than 1"),
        ({"compressions": (8, np.inf)}, "--compressions has inf; accepted is a finite number"),
        ({"compressions": (np.nan,)}, "--compressions has nan; accepted is a finite number"),
        ({"tuning_seeds": ()}, "--tuning-seeds is empty"),
        ({"tuning_seeds": (-1,)}, "--tuning-seeds has -1"),
    ],
)
def test_impossible_grids_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        compare.CompareConfig(command="run", **words).check()


def test_help_tells_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/compare.py", "--help"])
    with pytest.raises(SystemExit):
        compare.main()
    assert capsys.readouterr().out.startswith("usage: python -m experiments.compare ")


def test_compression_that_a_method_cannot_meet_is_refused(tmp_path, harness):
    trial = compare.Trial(learning_rate=0.05, prune=0.5, select=0.75)
    with pytest.raises(ConfigError, match="--compressions has 300000, which ltp cannot meet"):
        compare.fill(harness, TRAIN, [(tmp_path / "ltp.json", 0)], "ltp", 300_000, trial)


def str_cell(rate, decay, compression, top1):
    trial = compare.Trial(learning_rate=rate, weight_decay=decay)
    return tuned("str", trial, achieved=compression, top1=top1)


def test_the_rate_of_str_is_the_best_at_the_compression_of_tuning():
    # At 32×, halfway between 16× and 64×, the first has 85 % and the second 86 %, though the first has the best run.
    cells = [str_cell(0.1, 1e-3, 16, 90), str_cell(0.1, 4e-3, 64, 80)]
    cells += [str_cell(0.2, 1e-3, 16, 87), str_cell(0.2, 4e-3, 64, 85)]
    assert compare.chosen("str", cells, (32,)) == compare.Trial(learning_rate=0.2)


def test_the_rate_of_str_is_judged_by_the_means_over_seeds():
    # The first has 90 % at 31.5× and 80 % at 126×: 89.9 at 32×. Seeds of 31.5×, 3 % apart, have no line of their own.
    cells = [str_cell(0.1, 1e-3, 31, 91), str_cell(0.1, 1e-3, 31.5**2 / 31, 89), str_cell(0.1, 4e-3, 126, 80)]
    assert compare.chosen("str", [*cells, str_cell(0.2, 1e-3, 32, 89.8)], (32,)).learning_rate == 0.1
    assert compare.chosen("str", [*cells, str_cell(0.2, 1e-3, 32, 90.0)], (32,)).learning_rate == 0.2


def test_str_is_judged_between_its_decays():
    # Beyond 8× the first would have 91 % at 32×, for all that was measured of it.
    cells = [str_cell(0.1, 1e-3, 2, 91), str_cell(0.1, 4e-3, 8, 91)]
    assert compare.chosen("str", cells, (32,)).learning_rate == 0.1
    cells += [str_cell(0.2, 1e-3, 16, 90), str_cell(0.2, 4e-3, 64, 89)]
    assert compare.chosen("str", cells, (32,)).learning_rate == 0.2


def test_a_figure_is_read_off_the_line_between_the_nearest_on_either_side():
    # 128× is nearer to two that are sparser, on a steeper slope, than to 32×: halfway from 32× to 512×, in logarithms.
    points = [(512, 84.0), (32, 90.0), (1024, 70.0), (8, 91.0)]
    assert compare.at(128, points) == pytest.approx(87)
    assert compare.at(2048, points) == pytest.approx(56)  # beyond them all
    assert compare.at(32, points) == pytest.approx(90)
    assert compare.at(33, [(32, 90.0), (32.3, 91.0)]) == 91.0  # less than 2 % apart they have no line


def test_the_decay_of_str_is_interpolated():
    # Compression 4 at 1e-4 and 16 at 4e-4: halfway between them, in logarithms, lies 8 at 2e-4, and beyond 32 at 8e-4.
    trial = compare.Trial(learning_rate=0.1)
    cells = [str_cell(0.1, 1e-4, 4, 80), str_cell(0.1, 4e-4, 16, 80), str_cell(0.2, 1e-4, 8, 80)]
    for compression, decay in ((8, 2e-4), (32, 8e-4)):
        found = compare.decay_for(compression, trial, [], cells)
        assert found == compare.Trial(learning_rate=0.1, weight_decay=pytest.approx(decay))

    # Seeds of one decay count together, however far apart they are: the geometric mean of 3.9 and 4.1026 is 4.
    seeds = [str_cell(0.1, 1e-4, 3.9, 80), str_cell(0.1, 1e-4, 16 / 3.9, 80), *cells[1:]]
    assert compare.decay_for(8, trial, [], seeds).weight_decay == pytest.approx(2e-4)

    # One run of the grid moves that line: 8 at 1e-4, so 32 at 4e-4. Two, 8 at 1e-4 and 16 at 1.1e-4, are another line.
    own = [str_cell(0.1, 1e-4, 8, 80), str_cell(0.1, 1.1e-4, 16, 80)]
    assert compare.decay_for(32, trial, own[:1], cells).weight_decay == pytest.approx(4e-4)
    assert compare.decay_for(32, trial, own, cells).weight_decay == pytest.approx(1.21e-4)
    # Two within 2 % have no line of their own: the nearer one moves that of tuning.
    own = [str_cell(0.1, 1e-4, 8, 80), str_cell(0.1, 1.1e-4, 7.9, 80)]
    assert compare.decay_for(32, trial, own, cells).weight_decay == pytest.approx(4e-4)


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
        train, trial = compare.NETWORKS["lenet_300_100"].train, compare.Trial(learning_rate=0.1)
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
    assert compare_report.read_cell(tmp_path / "str_16_0.json")["compression"] == 16
    assert compare_report.read_cell(tmp_path / "str_16_0.json")["achieved"] == pytest.approx(16)


def test_a_search_does_not_stop_at_two_tries_of_one_compression(tmp_path, searched):
    # Below a decay of 4e-4 all have 6×. Two tries have no line between them, and the slope of tuning leads on.
    search, decays = searched
    found = search(tmp_path / "str_8_0.json", 8, lambda decay: 6 + decay if decay < 4e-4 else 8.0)
    assert decays == pytest.approx([2e-4, 2.667e-4, 3.556e-4, 4.742e-4], rel=1e-3)
    assert found.weight_decay == decays[-1]


def test_a_search_does_not_go_by_runs_of_other_epochs(tmp_path, searched):
    search, decays = searched
    trial = compare.Trial(learning_rate=0.1, weight_decay=3e-4)
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
    decay = compare_report.read_cell(folder / "str_8_1.json")["trial"]["weight_decay"]
    assert ran == [(decay, [1]), (decay, [1, 2]), (decay, [0, 3]), (decay, [0])]


def test_a_search_takes_the_nearest_of_five(tmp_path, searched):
    # The network stays dense below a decay and collapses above it: no decay gives 8×, and 4 is nearer to it than 100.
    search, decays = searched
    found = search(tmp_path / "str_8_0.json", 8, lambda decay: 4 + decay if decay < 1.7e-4 else 100 + decay)
    assert len(decays) == 5
    assert compare_report.read_cell(tmp_path / "str_8_0.json")["achieved"] == pytest.approx(4, abs=0.01)
    assert found.weight_decay < 1.7e-4


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


def test_the_table_of_tuning_is_in_the_order_of_the_places(tmp_path, tune, monkeypatch):
    config, _ = tune(lambda place, trial: 80.0 + place, methods=("ltp", "gmp_global"), tuning_seeds=(0,))
    # Whether all fifteen are there or not, and with the grid that a report is of.
    missing = compare.Setting(32, 4, compare.trials("ltp", compare.NETWORKS["lenet_300_100"].train)[4])
    compare.tuning_file(config, "lenet_300_100", "ltp", missing, 0).unlink()
    write_json(tmp_path / "fashion_mnist_lenet_300_100" / "ltp_8_0.json", CELLS[0])
    words = ["compare", "report", f"--results={tmp_path}", f"--pictures={tmp_path}"]
    monkeypatch.setattr(sys, "argv", words)
    compare.main()
    lines = (tmp_path / "fashion_mnist_held_out_lenet_300_100" / "table.md").read_text().splitlines()[2:]
    places = [*range(4), *range(5, 15), *range(15)]
    expected = [80 + place for place in (*places, *range(15), *range(15))]
    assert [float(line.split("|")[-2].split()[0]) for line in lines] == expected


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
    table, *drawn = compare_report.write(folder, tmp_path / "docs")
    assert "Dense network that all start from" in table.read_text()
    assert len(drawn) == pictures
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("3", "not iterable"),
        ("{}", "it lacks network, dataset, method, compression, seed, .*achieved, top1"),
        (json.dumps({key: 1 for key in compare_report.KEYS if key != "top1"}), r"it lacks top1\)"),
    ],
)
def test_broken_record_of_a_run_is_said(tmp_path, text, message):
    (tmp_path / "ltp_8_0.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"ltp_8_0.json is no record of a run \(.*{message}.*remove it"):
        compare_report.read_cells(tmp_path)
