"""A target asked for on the command line, the harness, and what the comparison runs."""

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

import ltp_jax as ltp
from experiments import compare, compare_networks
from experiments import compare_settings as settings
from experiments import run as runs
from experiments.components import weights_optimizer
from experiments.config import LtpConfig, TrainConfig, parse
from experiments.data.digits import digits
from experiments.digits import DigitsConfig
from experiments.harness import Harness, augmented, hold_out
from experiments.options import ConfigError
from experiments.record import write_json
from ltp_jax import models
from ltp_jax.checkpoints import TrailError, save_network
from ltp_jax.pruner import dense
from ltp_jax.training import create_state, cross_entropy, make_train_step

TRAIN = TrainConfig(epochs=3, batch_size=128, learning_rate=0.05)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    pretrain = TrainConfig(epochs=1, batch_size=128, learning_rate=0.05)
    return Harness(digits(), "digits", tmp_path_factory.mktemp("harness"), pretrain)


def test_a_target_of_multiply_accumulates_weighs_weights_by_their_uses(tmp_path, harness):
    harness.dense_network(0)
    config = DigitsConfig(
        workdir=tmp_path,
        dense=next(harness.workdir.glob("*/dense_0")),
        pretrain=harness.pretrain,
        train=TRAIN,
        ltp=LtpConfig(target_macs=10),
    )
    trail = runs.run(config, models.create("digits", num_classes=10), digits())
    last = trail.entries[-1]
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


def test_the_harness_takes_the_steps_of_an_ordinary_loop(harness):
    network, seed, train = harness.dense_network(0), 3, dataclasses.replace(TRAIN, epochs=1)
    steps = train.steps(harness.dataset.train_size)
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
    network, train = harness.dense_network(0), dataclasses.replace(TRAIN, epochs=1, batch_size=1024)  # one step
    wrong = dataclasses.replace(harness.dataset, train_labels=np.zeros_like(harness.dataset.train_labels))
    misled = Harness(wrong, "digits", tmp_path, harness.pretrain)
    (right,), (same,) = (h.compiled(dense(), train, distill=1.0)(network, 0) for h in (harness, misled))
    jax.tree.map(np.testing.assert_array_equal, right.params, same.params)
    # What is learned are the network's own probabilities, as it is used and not as it is trained.
    images = next(harness.dataset.train(train.batch_size, seed=0))["image"]
    said, asked = (
        harness.apply(network["params"], network["batch_stats"], images, train=training, key=jax.random.key(0))[0]
        for training in (False, True)
    )
    expected = -float(np.mean(np.sum(jax.nn.softmax(said) * jax.nn.log_softmax(asked), -1)))
    assert float(right.totals["loss"] / right.totals["examples"]) == pytest.approx(expected, rel=1e-4)


def test_accuracies_are_shares_of_the_images(harness, monkeypatch):
    """In batches of 100, of which the last of 540 images is padded."""
    monkeypatch.setattr("experiments.harness.EVAL_BATCH", 100)
    network, data = harness.dense_network(0), harness.dataset

    def right(images, labels):
        logits, _ = harness.apply(network["params"], network["batch_stats"], images, train=False, key=None)
        return 100 * np.mean(np.asarray(logits).argmax(-1) == labels)

    assert harness.top1(**network) == pytest.approx(right(data.eval_images, data.eval_labels), abs=0.01)
    first = right(data.train_images[:540], data.train_labels[:540])
    assert harness.train_top1(**network) == pytest.approx(first, abs=0.01)


def kept_network(tmp_path, harness, seed=0):
    """A copy of the harness that finds the dense network of the other one, and the network's path."""
    harness.dense_network(seed)
    shutil.copytree(harness.workdir, tmp_path, dirs_exist_ok=True)
    return Harness(harness.dataset, harness.arch, tmp_path, harness.pretrain), next(tmp_path.glob(f"*/dense_{seed}"))


def test_the_dense_network_is_trained_once(tmp_path, harness, monkeypatch):
    copy, _ = kept_network(tmp_path, harness)
    monkeypatch.setattr(copy, "compiled", lambda *args: pytest.fail("is trained again"))
    jax.tree.map(np.testing.assert_array_equal, copy.dense_network(0), harness.dense_network(0))


def test_a_dense_network_that_was_trained_in_another_way_is_refused(tmp_path, harness):
    copy, path = kept_network(tmp_path, harness)
    longer = dataclasses.replace(harness.pretrain, epochs=2, batch_size=64)
    other = Harness(harness.dataset, "digits", tmp_path, longer)
    with pytest.raises(ConfigError, match=r"dense_0 was .*: epochs was 1, is 2; batch_size was 128, is 64. Remove it"):
        other.dense_network(0)
    record = path.with_suffix(".json")
    for spoil in (lambda: record.write_text("[1"), record.unlink):
        spoil()
        with pytest.raises(ConfigError, match=r"dense_0.json is no record of a training .* remove it and .*dense_0,"):
            copy.dense_network(0)


@pytest.mark.parametrize(("weight", "said"), [(1.0, "a temperature of 0.0"), (np.nan, "a temperature of nan")])
def test_a_dense_network_that_cannot_be_pruned_is_refused(tmp_path, harness, weight, said):
    copy, path = kept_network(tmp_path, harness)
    network = copy.dense_network(0)
    kernel = next(iter(copy.plan.paths))
    flat = {name: np.full_like(w, weight) if name == f"params/{kernel}" else w for name, w in ltp.named_leaves(network)}
    broken = traverse_util.unflatten_dict(flat, sep="/")
    shutil.rmtree(path)
    save_network(path, broken["params"], broken["batch_stats"])
    with pytest.raises(ConfigError, match=f"seed 0 cannot be pruned: {kernel} has {said}.*; remove .*dense_0, and it"):
        copy.dense_network(0)


def test_a_damaged_dense_network_is_told_with_the_remedy(tmp_path, harness):
    copy, path = kept_network(tmp_path, harness)
    (path / "_METADATA").write_text("")
    with pytest.raises(TrailError, match=f"dense_0 cannot be read: it is damaged.*; remove {path}, and it is trained"):
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
    np.testing.assert_array_equal(held.eval_labels, data.train_labels[-100:])
    np.testing.assert_array_equal(held.train_images, data.train_images[:-100])
    np.testing.assert_array_equal(held.train_labels, data.train_labels[:-100])


def test_settings_are_judged_on_training_images_and_methods_on_those_for_evaluation(tmp_path, monkeypatch):
    data, given = digits(), {}
    setup = compare_networks.NETWORKS["lenet_300_100"]._replace(load=lambda data_dir: data)
    monkeypatch.setitem(compare_networks.NETWORKS, "lenet_300_100", setup)
    monkeypatch.setattr(compare, "HELD_OUT", 100)
    for command, name in (("tune", "tune"), ("run", "grid")):
        monkeypatch.setattr(compare, name, lambda config, harness: given.update({config.command: harness.dataset}))
        monkeypatch.setattr(sys, "argv", ["compare", command, f"--workdir={tmp_path}", f"--results={tmp_path}"])
        compare.main()
    assert given["tune"].train_size == data.train_size - 100
    np.testing.assert_array_equal(given["tune"].eval_images, data.train_images[-100:])
    assert given["run"] is data


@pytest.mark.parametrize("option", ["--results", "--workdir"])
def test_where_nothing_can_be_written_is_said_before_the_first_run(tmp_path, monkeypatch, option):
    setup = compare_networks.NETWORKS["lenet_300_100"]._replace(load=digits)
    monkeypatch.setitem(compare_networks.NETWORKS, "lenet_300_100", setup)
    monkeypatch.setattr(compare, "grid", lambda config, harness: pytest.fail("it begins"))
    places = {"--results": tmp_path, "--workdir": tmp_path} | {option: "/proc/a"}
    monkeypatch.setattr(sys, "argv", ["compare", "run", *(f"{name}={place}" for name, place in places.items())])
    with pytest.raises(ConfigError, match=f"^{option} is /proc/a/.*, which cannot be written: No such file"):
        compare.main()


def test_augmented_images_are_shifted_by_up_to_two_pixels_and_mirrored():
    image = np.zeros((1, 8, 8, 1), np.uint8)
    image[0, 4, 2] = 255
    data = dataclasses.replace(
        digits(), train_size=1, train_images=image, train_labels=np.zeros(1, np.int32), padding=0
    )
    changed = augmented(data)
    seen = [next(changed.train(1, seed=seed))["image"][0, ..., 0] for seed in range(400)]
    # Columns 0 to 4 are shifts of the second, 3 to 7 those of its mirror image.
    assert {tuple(np.argwhere(pixels)[0].tolist()) for pixels in seen} == set(itertools.product(range(2, 7), range(8)))
    np.testing.assert_array_equal(changed.eval_images, data.eval_images)
    # Its dense networks are others.
    assert changed.name == "digits_augmented"


def test_augmentation_is_of_no_use_to_images_that_always_are_augmented():
    compare.CompareConfig(command="run", augment=True).check()
    with pytest.raises(ConfigError, match="--augment is for Fashion-MNIST"):
        compare.CompareConfig(command="run", augment=True, arch="resnet20").check()


def test_cells_are_kept_and_not_run_again(tmp_path, harness, monkeypatch):
    trial = settings.Trial(learning_rate=0.05, prune=0.5, select=0.75)
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"results": Path("gs://bucket")}, "^--results is gs:/bucket; accepted is a path of this machine"),
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


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("report", {"methods": ("ltp",)}, "^--methods goes with tune and run, not with report$"),
        ("report", {"seeds": (0,)}, "^--seeds goes with run, not with report$"),
        ("report", {"compressions": (8.0,)}, "^--compressions goes with run, not with report"),
        ("report", {"data_dir": Path("/data")}, "^--data-dir goes with tune and run, not with report"),
        ("report", {"workdir": Path("/runs")}, "^--workdir goes with tune and run, not with report"),
        ("run", {"pictures": Path("/pictures")}, "^--pictures goes with report, not with run"),
        ("report", {"tuning_seeds": (0,)}, "^--tuning-seeds goes with tune and run, not with report"),
        ("tune", {"seeds": (0,)}, "^--seeds goes with run, not with tune"),
        ("tune", {"compressions": (8.0,)}, "^--compressions goes with run, not with tune"),
        ("tune", {"setting_of": "ltp"}, "^--setting-of goes with run, not with tune$"),
    ],
)
def test_options_that_a_command_does_not_heed_are_refused(command, words, message):
    with pytest.raises(ConfigError, match=message):
        compare.CompareConfig(command=command, **words).check()


def test_help_tells_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/compare.py", "--help"])
    with pytest.raises(SystemExit):
        compare.main()
    assert capsys.readouterr().out.startswith("usage: python -m experiments.compare ")


def test_compression_that_a_method_cannot_meet_is_refused(tmp_path, harness):
    trial = settings.Trial(learning_rate=0.05, prune=0.5, select=0.75)
    with pytest.raises(ConfigError, match="--compressions has 300000, which ltp cannot meet"):
        compare.fill(harness, TRAIN, [(tmp_path / "ltp.json", 0)], "ltp", 300_000, trial)
