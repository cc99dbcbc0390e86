"""Whole runs of the digits experiment, as a user starts them: what they write, how they resume, what they refuse."""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from experiments import ending, report, trainer
from experiments import run as runs
from experiments.config import LtpConfig, MeshConfig, TrainConfig, parse
from experiments.console import MetricsWriter, progress_bar
from experiments.data.dataset import DataError
from experiments.data.digits import digits
from experiments.digits import DigitsConfig
from experiments.ending import RunError, run_command
from experiments.fashion_mnist import PRESETS
from experiments.options import ConfigError
from experiments.record import record, to_json, write_json
from ltp_jax import models
from ltp_jax.checkpoints import TrailError, restore_network, save_network
from ltp_jax.pruner import dense
from ltp_jax.sharding import make_mesh
from ltp_jax.trail import Trail
from tests.commands import ROOT, run_python
from tests.entries import entry

IMAGES = {"training": 1257, "held out": 540, "classes": 10}  # of the digits


def tiny(workdir, **changes):
    """Two epochs of each stage, 39 steps in all; thresholds are learned in the third."""
    config = DigitsConfig(
        workdir=workdir,
        pretrain=TrainConfig(epochs=2, batch_size=128, learning_rate=0.1),
        train=TrainConfig(epochs=2, batch_size=96, learning_rate=0.05, weight_decay=1e-4),
        ltp=LtpConfig(penalty=20.0, learn=0.5, reach=1.5),
    )
    return dataclasses.replace(config, **changes)


def start(config, dataset=None, begin=None):
    return runs.run(config, models.create("digits", num_classes=10), dataset or digits(), begin)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from nothing to its report, with TensorBoard files."""
    workdir = tmp_path_factory.mktemp("finished")
    start(tiny(workdir, tensorboard=True))
    return workdir


def test_trail_tells_of_a_pruned_network(finished):
    trail = Trail(finished)
    assert [e.epoch for e in trail.entries] == [0, 1, 2]
    assert trail.dense.compression == 1.0
    last = trail.entries[-1]
    assert last.compression > 1.5
    assert last.step == 2 * (digits().train_size // 96)
    params = trail.restore(last)["params"]
    kernels = {
        "block1/conv": params["block1"]["conv"]["kernel"],
        "block2/conv": params["block2"]["conv"]["kernel"],
        "block3/conv": params["block3"]["conv"]["kernel"],
        "dense": params["dense"]["kernel"],
        "head": params["head"]["kernel"],
    }
    kept = {f"{name}/kernel": np.count_nonzero(kernel) / kernel.size for name, kernel in kernels.items()}
    assert last.densities == pytest.approx(kept)
    total = sum(kernel.size for kernel in kernels.values())
    assert last.compression == pytest.approx(total / sum(np.count_nonzero(k) for k in kernels.values()))
    for name, kernel in kernels.items():  # what is left is above the threshold
        assert (kernel[kernel != 0] ** 2).min() > last.thresholds[f"{name}/kernel"]


def test_figures_of_an_entry_are_those_of_its_network(finished):
    """The restored network is evaluated by other means than the run's own."""
    trail, dataset = Trail(finished), digits()
    network = trail.restore(trail.entries[-1])
    batch = next(iter(dataset.evaluate(dataset.eval_size)))
    images = (np.float32(batch["image"]) - np.float32(dataset.mean)) / np.float32(dataset.std)
    logits = logits_of(network, images)
    assert trail.entries[-1].top1 == pytest.approx(100 * np.mean(logits.argmax(-1) == batch["label"]))
    top5 = np.argsort(-logits, axis=-1)[:, :5] == batch["label"][:, None]
    assert trail.entries[-1].top5 == pytest.approx(100 * np.mean(top5.any(-1)))
    assert trail.entries[-1].loss == pytest.approx(mean_loss(logits, batch["label"]), rel=1e-4)


def logits_of(network, images):
    return np.asarray(jax.jit(partial(models.create("digits", num_classes=10).apply, train=False))(network, images))


def mean_loss(logits, labels):
    return np.mean(np.log(np.exp(np.float64(logits)).sum(-1)) - logits[np.arange(len(labels)), labels])


def test_soft_figures_and_those_of_training_are_those_of_the_state(finished):
    """The state that was saved at the end, read without the run's own means."""
    entry, dataset = Trail(finished).entries[-1], digits()
    state = ocp.StandardCheckpointer().restore(finished / "resume" / str(entry.step) / "state")
    prune = state["pruning"]["prune"]

    def soft(keys, w):
        path = "/".join(key.key for key in keys)
        if path not in prune["thresholds"]:
            return w
        return w * (1 + np.tanh((w**2 - prune["thresholds"][path]) / prune["temperatures"][path] / 2)) / 2

    params = jax.tree_util.tree_map_with_path(soft, jax.device_get(state["params"]))
    batch = next(iter(dataset.evaluate(dataset.eval_size)))
    images = (np.float32(batch["image"]) - np.float32(dataset.mean)) / np.float32(dataset.std)
    network = {"params": params, "batch_stats": state["batch_stats"]}
    logits = logits_of(network, images)
    assert entry.soft_top1 == pytest.approx(100 * np.mean(logits.argmax(-1) == batch["label"]))
    assert entry.soft_loss == pytest.approx(mean_loss(logits, batch["label"]), rel=1e-4)
    assert entry.soft_loss != entry.loss
    # Of the second epoch alone, its 13 batches.
    totals = state["totals"]
    assert totals["examples"] == 13 * 96
    assert entry.train_loss == pytest.approx(float(totals["loss"] / totals["examples"]))
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if (row["stage"], row["kind"]) == ("prune", "train")][-1]
    assert last["accuracy"] == pytest.approx(100 * float(totals["correct"] / totals["examples"]))


@pytest.mark.parametrize(("width", "columns"), [(80, 8), (79, 4), (48, 4)])
def test_table_of_a_trail_fits_into_a_terminal(finished, width, columns):
    trail, console = Trail(finished), Console(width=width, file=io.StringIO())
    table = report.terminal_table(trail, width)
    console.print(table)
    assert len(table.columns) == columns
    assert "…" not in console.file.getvalue()
    assert f"{trail.entries[-1].compression:.2f}×" in console.file.getvalue()


def test_table_and_pictures_of_a_trail(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(report, "save_picture", lambda figure, path: figures.update({path.stem: figure}))

    entries = tuple(
        entry(
            epoch,
            compression,
            top1,
            thresholds={"conv/kernel": tau},
            top5=99.125,
            soft_top1=top1 + 0.25,
            macs_compression=macs,
        )
        for epoch, compression, top1, tau, macs in (
            (0, 1.0, 90.0, 0.0, 1.0),
            (1, 8.0, 88.5, 0.25, 3.5),
            (2, 4.0, 88.0, 1e-35, None),
        )
    )
    paths = report.write(SimpleNamespace(entries=entries), tmp_path, "title")
    rows = [line for line in paths["table"].read_text().splitlines() if re.match(r"\| \d", line)]
    assert rows == [
        "| 0 | 1.00× | 100.00% | 1.00× | 90.00 | +0.00 | 99.12 | 0.5000 | +0.25 | * |",
        "| 1 | 8.00× | 12.50% | 3.50× | 88.50 | +1.50 | 99.12 | 0.5000 | +0.25 | * |",
        "| 2 | 4.00× | 25.00% | – | 88.00 | +2.00 | 99.12 | 0.5000 | +0.25 |  |",
    ]
    axes = figures["accuracy"].axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [(1, 90), (8, 88.5), (4, 88)])
    level, below, front = axes.lines
    assert [*level.get_ydata(), *below.get_ydata()] == [90, 90, 89, 89]
    np.testing.assert_allclose(np.transpose(front.get_data()), [(1, 90), (1, 90), (8, 88.5)])
    np.testing.assert_allclose(figures["density"].axes[0].lines[0].get_data(), [(0, 1, 2), (100, 12.5, 25)])
    # The thresholds in units of w, from the first epoch on; those of fixed masks are none.
    np.testing.assert_allclose(figures["thresholds"].axes[0].lines[0].get_data(), [(1, 2), (0.5, np.nan)])


def test_run_writes_what_the_documentation_says(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["train"]["batch_size"] == 96
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    entries = [row for row in rows if row["kind"] == "entry"]
    assert [row["epoch"] for row in entries] == [0, 1, 2]
    assert {"top1", "top5", "loss", "gap", "compression", "densities", "thresholds"} <= set(entries[0])
    assert {row["stage"] for row in rows} == {"pretrain", "prune"}
    assert "epoch 2:" in (finished / "log.txt").read_text()
    for name in ("accuracy", "density", "thresholds"):
        assert (finished / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    raw = json.loads((finished / "report" / "trail.json").read_text())["entries"]
    assert [row["epoch"] for row in raw] == [0, 1, 2]
    table = (finished / "report" / "trail.md").read_text()
    assert sum(line.startswith(("| 0", "| 1", "| 2")) for line in table.splitlines()) == 3
    for stage in ("pretrain", "prune"):
        assert list((finished / "tensorboard" / stage).glob("events.out.tfevents.*"))
    assert set(restore_network(finished / "dense")) == {"params", "batch_stats"}
    assert not (finished / "pretrain").exists()


def test_same_command_again_changes_nothing(finished, monkeypatch):
    """On a terminal that has not all signs, too, which gets others."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    before = (finished / "metrics.jsonl").read_text()
    stamp = (finished / "trail" / "2").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: start(tiny(finished, tensorboard=True)))
    assert stop.value.code == 0
    assert (finished / "metrics.jsonl").read_text() == before
    assert (finished / "trail" / "2").stat().st_mtime_ns == stamp
    terminal.seek(0)
    assert "1.00?" in terminal.read()


def test_a_damaged_line_of_figures_is_dropped(tmp_path):
    good = '{"stage": "prune", "kind": "train", "step": 3, "loss": 0.5}\n'
    lines = [good.encode(), b"\xff\xfe\x00{\n", b'{"stage": "prune"}\n', b"7\n", good.replace("3", "9").encode()]
    lines.append(good.replace("3", "Infinity").encode())
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    metrics.rewind("prune", 3)
    metrics.write("prune", "train", 3, {"loss": 0.6})
    assert (tmp_path / "metrics.jsonl").read_text() == good
    metrics.write("prune", "train", 4, {"loss": 0.25})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_bar_tells_the_rate_of_the_steps_and_not_of_what_was_before_them():
    now, written = [0.0], io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, get_time=lambda: now[0])
    with progress_bar(console, "prune", total=10, done=4, images=64) as advance:
        for now[0] in (1000.0, 1000.5, 1001.0):  # the first step was compiled
            advance()
    assert re.findall(r"prune .*\b(\d+/10)\S* .*\b(\d+) images/s", written.getvalue())[-1] == ("7/10", "128")


def test_there_is_no_bar_in_a_file():
    console = Console(file=io.StringIO())
    with progress_bar(console, "prune", total=10, done=4, images=64) as advance:
        advance()
    assert console.file.getvalue() == ""


def told_to_tensorboard(folder):
    """Kind and step of every event of the file in a folder."""
    (path,) = folder.iterdir()
    record, told = path.read_bytes(), []
    while record:  # length, its checksum, the event, and its checksum
        length = int.from_bytes(record[:8], "little")
        event = Event.FromString(record[12 : 12 + length])
        told.append((event.WhichOneof("what"), event.step))
        record = record[16 + length :]
    return told


@pytest.mark.parametrize("first", [0, 3])
def test_tensorboard_is_told_from_which_step_a_stage_goes_on(tmp_path, first):
    metrics = MetricsWriter(tmp_path, tensorboard=True)
    metrics.rewind("prune", first)
    for step in range(first + 1, 6):
        metrics.write("prune", "train", step, {"loss": 0.5})
    metrics.close()
    told = told_to_tensorboard(tmp_path / "tensorboard" / "prune")
    points = [("summary", step) for step in range(first + 1, 6)]
    assert [row for row in told if row[0] != "file_version"] == [("session_log", first + 1), *points]


def test_a_damaged_dense_network_is_told_with_the_remedy(finished, tmp_path):
    shutil.copytree(finished / "dense", tmp_path / "dense")
    write_json(tmp_path / "config.json", to_json(tiny(tmp_path)) | {"images": IMAGES})
    for path in (tmp_path / "dense").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(TrailError, match=f"dense cannot be read: it is damaged.*; remove {tmp_path / 'dense'}, and"):
        start(tiny(tmp_path))


def test_of_a_training_that_has_ended_its_own_states_are_removed_and_nothing_else(finished, tmp_path):
    network = restore_network(finished / "dense")
    trainer = SimpleNamespace(config=tiny(tmp_path), init_network=lambda: network)
    save_network(tmp_path / "dense", **network)
    for name in ("pretrain/39/state", "pretrain/40.orbax-checkpoint-tmp", "dense.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pretrain" / "thesis.tex").write_text("years")
    runs.dense_network(trainer, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "pretrain"]
    assert [path.name for path in (tmp_path / "pretrain").iterdir()] == ["thesis.tex"]
    (tmp_path / "pretrain" / "thesis.tex").unlink()
    runs.dense_network(trainer, None)
    assert not (tmp_path / "pretrain").exists()


class Interrupted(Exception):
    pass


class Interrupting:
    """A dataset whose training stream breaks off behind some batches of one stage."""

    def __init__(self, dataset, batch_size, after):
        self._dataset, self._batch_size, self._after = dataset, batch_size, after

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def train(self, batch_size, **options):
        for i, batch in enumerate(self._dataset.train(batch_size, **options)):
            if batch_size == self._batch_size and i == self._after:
                raise Interrupted
            yield batch


class Counting:
    """A dataset that counts how often its held-out images are read."""

    def __init__(self, dataset):
        self._dataset, self.evaluations = dataset, 0

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def evaluate(self, batch_size, **options):
        self.evaluations += 1
        return self._dataset.evaluate(batch_size, **options)


def test_the_seed_is_that_of_the_network_of_the_data_and_of_what_is_drawn(tmp_path):
    asked, begun = {}, []

    class Asked(Counting):
        def train(self, batch_size, **options):
            asked.update(options)
            raise Interrupted

    module, config = models.create("digits", num_classes=10), tiny(tmp_path, seed=7)
    metrics, resume = SimpleNamespace(rewind=lambda *args: None), SimpleNamespace(restore=lambda abstract: None)
    training = trainer.Trainer(config, module, Asked(digits()), metrics, Console(), lambda: False)
    with pytest.raises(Interrupted):
        training.fit(
            "pretrain",
            config.pretrain,
            dense(),
            optax.sgd(0.1),
            None,
            resume,
            keep=lambda state, epoch: begun.append(state),
        )
    assert (asked["seed"], asked["start_step"]) == (7, 0)
    expected = jax.jit(partial(module.init, train=False))(jax.random.key(7), np.zeros((1, 8, 8, 1), np.float32))
    chex.assert_trees_all_close(begun[0].params, expected["params"], rtol=1e-5)
    np.testing.assert_array_equal(jax.random.key_data(begun[0].key), jax.random.key_data(jax.random.key(7)))


@pytest.mark.parametrize(("batch_size", "after"), [(128, 12), (96, 5), (96, 16)])
def test_interrupted_run_ends_in_the_same_bits(finished, tmp_path, batch_size, after):
    """Broken off in the second epoch of pretraining, and in the first and the second of pruning."""
    with pytest.raises(Interrupted):
        start(tiny(tmp_path, tensorboard=True), Interrupting(digits(), batch_size, after))
    assert ("summary", 9) in told_to_tensorboard(tmp_path / "tensorboard" / "pretrain")
    start(tiny(tmp_path, tensorboard=True))
    whole, resumed = Trail(finished), Trail(tmp_path)
    assert resumed.entries == whole.entries
    for e in whole.entries:
        chex.assert_trees_all_equal(resumed.restore(e), whole.restore(e))
    assert (tmp_path / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_entry_lost_with_its_process_is_written_again(finished, tmp_path):
    start(tiny(tmp_path, dense=finished / "dense"))
    trail = tmp_path / "trail"
    (trail / "2").rename(trail / "2.orbax-checkpoint-tmp")  # as if the process had ended in the midst of writing it
    start(tiny(tmp_path, dense=finished / "dense"))
    assert sorted(p.name for p in trail.iterdir()) == ["0", "1", "2"]
    chex.assert_trees_all_equal(
        Trail(tmp_path).restore(Trail(tmp_path).entries[2]), Trail(finished).restore(Trail(finished).entries[2])
    )


def test_a_run_goes_on_when_a_broken_entry_was_removed(finished, tmp_path):
    config = tiny(tmp_path, dense=finished / "dense")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=3))
    with pytest.raises(Interrupted):
        start(config, Interrupting(digits(), 96, 30))  # in the third epoch
    before = Trail(tmp_path).entries
    shutil.rmtree(tmp_path / "trail" / "1")
    shutil.rmtree(tmp_path / "resume")
    stamp = (tmp_path / "trail" / "2").stat().st_mtime_ns
    trail = start(config)
    assert trail.epochs == (0, 1, 2, 3)
    assert trail.entries[:3] == before
    assert (tmp_path / "trail" / "2").stat().st_mtime_ns == stamp
    told = (tmp_path / "log.txt").read_text()
    assert told.count("WARNING the trail goes to epoch 2, but there is no state in") == 1
    assert "training starts over, and the entries that are there stay as they are" in told


def test_an_entry_that_cannot_be_made_anew_is_told(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "trail" / "1")
    assert start(tiny(tmp_path / "run")).epochs == (0, 2)
    told = (tmp_path / "run" / "log.txt").read_text()
    assert "WARNING the trail has no entries of the epochs 1: they were removed" in told


@pytest.mark.parametrize("states", [True, False])
def test_a_dense_entry_that_was_removed_is_made_anew_and_nothing_trained(finished, tmp_path, states):
    shutil.copytree(finished, tmp_path / "run")
    for folder in ("trail/0", "report"):
        shutil.rmtree(tmp_path / "run" / folder)
    if not states:
        shutil.rmtree(tmp_path / "run" / "resume")
    trail = start(tiny(tmp_path / "run", tensorboard=True), Interrupting(digits(), 96, 0))
    assert trail.entries == Trail(finished).entries
    chex.assert_trees_all_equal(trail.restore(trail.dense), restore_network(finished / "dense"))
    assert (tmp_path / "run" / "report" / "trail.md").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_a_run_goes_on_with_the_dense_network_that_it_began_with_alone(finished, tmp_path):
    with pytest.raises(Interrupted):
        start(tiny(tmp_path / "run", dense=finished / "dense"), Interrupting(digits(), 96, 16))
    network = restore_network(finished / "dense")
    save_network(tmp_path / "same" / "dense", **network)
    network["params"]["head"]["bias"][0] += 1
    save_network(tmp_path / "other" / "dense", **network)
    with pytest.raises(ConfigError, match=r"other options or data: --dense was .* has other weights now"):
        start(tiny(tmp_path / "run", dense=tmp_path / "other" / "dense"))
    assert start(tiny(tmp_path / "run", dense=tmp_path / "same" / "dense")).entries == Trail(finished).entries


def test_dense_network_of_another_architecture_is_refused(finished, tmp_path):
    with pytest.raises(TrailError, match=r"is no digits: params/head/bias has shape \(10,\), expected is \(7,\)"):
        runs.run(tiny(tmp_path, dense=finished / "dense"), models.create("digits", num_classes=7), digits())


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_dense_network_with_a_tensor_that_cannot_be_pruned_is_refused(finished, tmp_path, value):
    network = restore_network(finished / "dense")
    network["params"]["head"]["kernel"] = np.full_like(network["params"]["head"]["kernel"], value)
    message = "^the dense network cannot be pruned: head/kernel has a temperature of (0.0|nan): its weights are all of"
    save_network(tmp_path / "given" / "dense", **network)
    with pytest.raises(ConfigError, match=message):
        start(tiny(tmp_path / "run", dense=tmp_path / "given" / "dense"))
    assert not (tmp_path / "run").exists()
    write_json(tmp_path / "given" / "config.json", to_json(tiny(tmp_path / "given")) | {"images": IMAGES})
    with pytest.raises(ConfigError, match=message):  # as if it had been trained there
        start(tiny(tmp_path / "given"))
    assert not (tmp_path / "given" / "trail").exists()


def test_loss_that_is_no_number_stops_the_run_and_loses_nothing(finished, tmp_path):
    config = tiny(tmp_path, dense=finished / "dense")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=1e30))
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step \d+ of prune.*--train.learning-rate .*--dense="):
        start(config)
    assert Trail(tmp_path).epochs == (0,)
    Trail(tmp_path).restore(Trail(tmp_path).dense)
    assert not any((tmp_path / "resume").iterdir())


def test_network_without_a_loss_on_held_out_images_is_no_entry(finished, tmp_path):
    network = restore_network(finished / "dense")
    network["batch_stats"]["norm"]["var"][0] = np.nan  # which training does not look at
    save_network(tmp_path / "dense", **network)
    with pytest.raises(RunError, match="the loss on held-out images is nan: some weights"):
        start(tiny(tmp_path / "run", dense=tmp_path / "dense"))
    assert Trail(tmp_path / "run").epochs == ()


def test_other_options_in_the_same_directory_are_refused(finished):
    config = dataclasses.replace(tiny(finished, tensorboard=True), ltp=LtpConfig(penalty=20.0, learn=0.7, reach=1.5))
    with pytest.raises(ConfigError, match=r"--ltp\.learn was 0\.5, is 0\.7"):
        record(config, images=IMAGES)


def test_options_without_a_meaning_may_change_on_resuming(tmp_path):
    for ltp, idle, used in (
        (LtpConfig(target_compression=8.0), {"ramp": 0.1, "learn": 0.1, "reach": 0.1}, {"select": 0.9}),
        (LtpConfig(penalty=8.0), {"prune": 0.1, "select": 0.9}, {"ramp": 0.1}),
    ):
        config = tiny(tmp_path / str(ltp.penalty), ltp=ltp)
        (config.workdir / "trail" / "0").mkdir(parents=True)
        write_json(config.workdir / "config.json", to_json(config) | {"images": IMAGES})
        record(dataclasses.replace(config, ltp=dataclasses.replace(ltp, **idle)), images=IMAGES)
        with pytest.raises(ConfigError, match=f"--ltp.{next(iter(used))} was"):
            record(dataclasses.replace(config, ltp=dataclasses.replace(ltp, **used)), images=IMAGES)
    taken = tiny(tmp_path, dense=Path("/other/dense"))
    (tmp_path / "trail" / "0").mkdir(parents=True)
    write_json(tmp_path / "config.json", to_json(taken) | {"images": IMAGES})
    other = dataclasses.replace(taken, pretrain=TrainConfig(epochs=9, batch_size=128, learning_rate=0.1))
    with pytest.raises(ConfigError, match=r"--pretrain\.epochs was"):
        record(other, images=IMAGES)
    record(other, images=IMAGES, pretrains=False)


def test_a_run_goes_on_with_its_own_data_alone(tmp_path):
    config = tiny(tmp_path)
    record(config, images=IMAGES)
    (tmp_path / "dense").mkdir()
    with pytest.raises(ConfigError, match=r"other options or data: its images, training: was 1257, is 999\. Choose"):
        record(config, images=IMAGES | {"training": 999})
    record(config, images=IMAGES)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_run_is_not_gone_on_with_where_its_options_are_not_known(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    (tmp_path / "resume" / "39").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds what a run saved, but no record of its options .* choose another"):
        record(tiny(tmp_path), images=IMAGES)
    (tmp_path / "resume" / "39").rename(tmp_path / "resume" / ".DS_Store")  # nothing of a run
    (tmp_path / "config.json").unlink(missing_ok=True)  # a file of somebody else's stays, see below
    record(tiny(tmp_path), images=IMAGES)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_options_may_change_as_long_as_nothing_was_saved(tmp_path):
    record(tiny(tmp_path), images=IMAGES)
    record(tiny(tmp_path, seed=1), images=IMAGES)
    (tmp_path / "pretrain" / "11").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--seed was 1, is 2"):
        record(tiny(tmp_path, seed=2), images=IMAGES)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"mine": 1}'),
        ("config.json", "[]"),
        ("config.json", "{\n  // of another tool\n}"),
        ("metrics.jsonl", '{"mine": 1}\n'),
    ],
)
def test_a_file_of_somebody_else_stays_as_it_is(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"/{name} is there already, and not of a run; choose another --workdir"):
        record(tiny(tmp_path), images=IMAGES)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, text)]


@pytest.mark.parametrize(
    "words", [["digits", "--workdir={tmp_path}"], ["benchmarks.lean_step", "time", "--arch=digits"]]
)
def test_a_platform_without_a_device_is_one_message(tmp_path, words):
    module, *words = (word.format(tmp_path=tmp_path) for word in words)
    done = run_python("-m", f"experiments.{module}", *words, JAX_PLATFORMS="cuda")
    assert done.returncode == 1
    assert re.fullmatch("error: JAX finds no device to compute on: .*, or set JAX_PLATFORMS=cpu\n", done.stderr)


def test_what_is_where_a_run_would_write_stays_as_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "dense").write_text("mine")
    with pytest.raises(ConfigError, match=r"dense is there already, and not of a run; choose another --workdir"):
        start(tiny(tmp_path / "a"))
    assert (tmp_path / "a" / "dense").read_text() == "mine"
    (tmp_path / "b" / "config.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"config.json is there already, and not of a run; choose another --workdir"):
        record(tiny(tmp_path / "b"), images=IMAGES)


@pytest.mark.parametrize("folder", ["trail", "dense", "resume"])
def test_a_run_does_not_write_where_another_keeps_what_is_its_own(finished, folder):
    with pytest.raises(ConfigError, match=f"--workdir is .*/{folder}, where another run keeps what is its own"):
        record(tiny(finished / folder), images=IMAGES)
    assert not (finished / folder / "config.json").exists()


@pytest.mark.parametrize("write", [lambda path: write_json(path, {}), lambda path: report.save_picture(Figure(), path)])
def test_a_full_disk_is_told_with_the_file_and_the_remedy(tmp_path, monkeypatch, write):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write(tmp_path / "file")
    told, _ = ending.explain(raised.value)
    assert told.startswith(f"{tmp_path / 'file'}: No space left on device; what was saved before is whole: make")


def test_a_record_takes_the_place_of_the_one_before_as_a_whole(tmp_path):
    path, before = tmp_path / "record.json", tmp_path / "before.json"
    write_json(path, {"a": 1})
    before.hardlink_to(path)
    write_json(path, {"a": 2})
    # The file that was there was not written to: it would be half a file while that goes on.
    assert [json.loads(file.read_text()) for file in (before, path)] == [{"a": 1}, {"a": 2}]
    assert len(list(tmp_path.iterdir())) == 2


def test_two_runs_do_not_write_to_one_directory(finished, tmp_path):
    config = tiny(tmp_path / "run", dense=finished / "dense")
    with runs.only_writer(config.workdir), pytest.raises(RunError, match=r"another run is writing to .*/run; wait"):
        start(config)
    assert not any(config.workdir.iterdir())
    with pytest.raises(Interrupted):  # nobody is in it now
        start(config, Interrupting(digits(), 96, 0))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--workdir is .*/file, which is a file"):
        start(tiny(tmp_path / "file", dense=finished / "dense"))


def test_published_weights_that_cannot_be_pruned_are_not_kept(finished, tmp_path):
    network = restore_network(finished / "dense")
    broken = {**network["params"], "head": jax.tree.map(lambda w: w * np.nan, network["params"]["head"])}
    begin = runs.Start(lambda: network | {"params": broken}, trained=True)
    with pytest.raises(ConfigError, match=r"^the dense network cannot be pruned: head/kernel has a temperature of nan"):
        start(tiny(tmp_path), begin=begin)
    assert not (tmp_path / "dense").exists()
    # With others the same directory will do, whatever the options are.
    with pytest.raises(Interrupted):
        start(tiny(tmp_path, seed=1), Interrupting(digits(), 96, 0), begin._replace(network=lambda: network))
    assert Trail(tmp_path).epochs == (0,)


def test_held_out_images_that_cannot_be_read_are_one_message(tmp_path):
    class Broken(Counting):
        def evaluate(self, batch_size, **options):
            for batch in super().evaluate(batch_size, **options):
                yield {**batch, "mask": np.zeros_like(batch["mask"])}

    with pytest.raises(RunError, match=r"none of the held-out images of digits can be read. What was saved before"):
        start(tiny(tmp_path, pretrain=TrainConfig(epochs=1, batch_size=128, learning_rate=0.1)), Broken(digits()))
    assert restore_network(tmp_path / "dense")["params"]


@pytest.mark.parametrize(("beyond", "told"), [(-1.1, True), (-0.9, False), (0.9, False), (1.1, True)])
def test_a_dense_network_far_from_what_was_published_is_told(tmp_path, monkeypatch, beyond, told):
    """More accurate than published is suspicious, too: then they are other weights."""
    said, network = [], {"params": {"kernel": np.ones(2, np.float32)}, "batch_stats": {}}
    monkeypatch.setattr(runs.log, "warning", lambda text, *words: said.append(text % words))
    config = SimpleNamespace(own_dense=tmp_path / "dense")
    taking = SimpleNamespace(config=config, mesh=make_mesh(), evaluate=lambda *network: [{"top1": 70.0}])
    runs.take(taking, network, expected_top1=70 + beyond)
    assert [f"has 70.00 % top-1 where {70 + beyond:.2f} % was published" in text for text in said] == [True] * told
    chex.assert_trees_all_equal(restore_network(config.own_dense), network)


def test_a_new_head_that_cannot_be_trained_is_refused_before_it_begins(tmp_path):
    config = tiny(tmp_path / "run", pretrain=TrainConfig(epochs=1, batch_size=5000, learning_rate=0.1))
    begin = runs.Start(lambda: pytest.fail("was asked"), trained=False)
    with pytest.raises(ConfigError, match=r"--pretrain.batch-size is 5000; digits has"):
        runs.run(config, models.create("digits"), digits(), begin)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": TrainConfig(epochs=1, batch_size=5000, learning_rate=0.1)},
            "--train.batch-size is 5000; digits has",
        ),
        (
            {"train": TrainConfig(epochs=10**11, batch_size=96, learning_rate=0.1)},
            "--train.epochs is 100000000000; accepted is at most 1[0-9]{8}, of 2.31 steps",
        ),
        ({"mesh": MeshConfig(fsdp=3)}, "^--mesh.fsdp is 3; accepted are divisors of the 1 devices$"),
        ({"ltp": LtpConfig(target_compression=1e5)}, "the target of --ltp cannot be met.*fewer than one weight"),
        ({"dense": Path("/absent")}, "there is no network in /absent"),
        ({"dense": ROOT}, "^--dense is .*, which holds no network of this project; accepted is the dense/ of another"),
    ],
)
def test_what_cannot_come_to_an_end_is_refused_before_it_begins(tmp_path, changes, message):
    with pytest.raises((ConfigError, TrailError), match=message):
        start(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()  # where the corrected command would find other options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.epochs", "0"], "--train.epochs is 0; accepted is at least 1"),
        (["--ltp.t0", "0"], "--ltp.t0 is 0.0; accepted is more than 0"),
        (["--ltp.learn", "1.5"], "--ltp.learn is 1.5; accepted is more than 0, at most 1"),
        (["--train.learning-rate", "-1"], "--train.learning-rate is -1.0; accepted is more than 0"),
        (["--seed", "-3"], "--seed is -3"),
        (["--seed=1", "--workdir="], "^--workdir= has no value"),
        (["--seed=1", "--workdir", ""], "^--workdir has no value"),
        (["", "--seed=1"], "^the first word has no value"),
        (["--data-dir=/data"], "^--data-dir would do nothing: the digits come with scikit-learn"),
        (["--workdir", "gs://bucket/run"], "^--workdir: gs:/bucket/run is no path of a file system; accepted"),
        (["--dense=gs://bucket/dense"], "^--dense: gs:/bucket/dense is no path of a file system; accepted"),
        (["--data-dir=s3://bucket"], "^--data-dir is s3:/bucket; accepted is a path of this machine"),
        (["--workdir=/a/[b]/c"], r"^--workdir: /a/\[b\]/c is a pattern to Orbax; accepted is a path without"),
        (["--dense=/a?"], r"^--dense: /a\? is a pattern to Orbax; accepted is a path without"),
        (["--workdir=~nobody-of-that-name/a"], "^a path that begins with ~ has no meaning here"),
        (["--distributed.heartbeat-timeout=9999999"], "heartbeat-timeout is 9999999; accepted is 1 to 604800 seconds"),
        (["--ltp.penalty", "3", "--ltp.target-macs=2"], "--ltp.penalty and --ltp.target-macs exclude each other"),
        *(
            ([f"{flag}={value}"], f"^{flag} is {re.escape(value)}; accepted is more than [01], and finite")
            for flag in ("--ltp.t0", "--ltp.reach", "--train.learning-rate", "--ltp.target-macs")
            for value in ("inf", "nan", "1e+39")
        ),
        (["--ltp.t0=1e-45"], "^--ltp.t0 is 1e-45, which is zero in float32; accepted is more than 0"),
        (["--ltp.penalty=inf"], "^--ltp.penalty is inf; accepted is 0 or more, and finite"),
        (["--ltp.learn=0.3"], "^--ltp.learn would do nothing: this run prunes to a target, not to a penalty"),
        (["--ltp.reach", "3", "--ltp.ramp=1"], "^--ltp.ramp and --ltp.reach would do nothing"),
        (["--ltp.penalty=3", "--ltp.prune=0.5"], "^--ltp.prune would do nothing: this run prunes to a penalty"),
        (["--ltp.target-compression=None", "--ltp.select=0.9"], "^--ltp.select would do nothing"),
        (["--mesh.fsdp", "0"], "--mesh.fsdp is 0; accepted is at least 1"),
        *(
            (
                [f"--distributed.coordinator-address={address}"],
                f"coordinator-address is {address}; accepted is HOST:PORT",
            )
            for address in ("host", ":1234", "host:", "host:http", "host:0", "host:65536")
        ),
        (["--distributed.num-processes=0"], "--distributed.num-processes is 0; accepted is at least 1"),
        *(
            (["--distributed.num-processes=2", f"--distributed.process-id={i}"], f"process-id is {i}; accepted is 0 to")
            for i in (-1, 2)
        ),
    ],
)
def test_impossible_values_are_refused_with_the_accepted_ones(words, message):
    with pytest.raises(ConfigError, match=message):
        parse({"digits": DigitsConfig()}, "", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch=lenet6"], "lenet5"),
        (["--train.epoch", "3"], "--train.epochs"),
        (["--train.epochs", "many"], "many"),
    ],
)
def test_unknown_words_are_refused_with_the_accepted_ones(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(PRESETS, "", words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    config = parse(PRESETS, "", ["--workdir=~/run", "--dense=~/other/dense", "--data-dir=~/tfds"])
    paths = (config.workdir, config.dense, config.data_dir)
    assert paths == tuple(Path("/home/of/somebody") / path for path in ("run", "other/dense", "tfds"))


def test_a_run_elsewhere_may_be_started_in_a_directory_that_looks_like_a_pattern(tmp_path, monkeypatch):
    (tmp_path / "[a]").mkdir()
    monkeypatch.chdir(tmp_path / "[a]")
    assert parse(PRESETS, "", [f"--workdir={tmp_path}/run"]).workdir == tmp_path / "run"
    with pytest.raises(
        ConfigError, match=r"^--workdir: .*/\[a\]/run is a pattern to Orbax; accepted is a path without"
    ):
        parse(PRESETS, "", ["--workdir=run"])


def test_network_decides_the_defaults():
    assert parse(PRESETS, "", ["--arch", "lenet5"]).workdir == PRESETS["lenet5"].workdir
    assert parse(PRESETS, "", ["--arch=lenet5"]) == PRESETS["lenet5"]
    assert parse(PRESETS, "", []) == PRESETS["lenet_300_100"]
    assert parse(PRESETS, "", ["--ltp.t0", "0.01"]).ltp.t0 == 0.01
    assert parse(PRESETS, "", ["--ltp.prune=0.3"]).ltp.prune == 0.3
    assert parse(PRESETS, "", ["--ltp.penalty=9", "--ltp.learn=0.3"]).ltp.learn == 0.3


@pytest.mark.parametrize("goal", ["penalty", "target_density", "target_macs"])
def test_a_goal_takes_the_place_of_the_one_of_the_preset(goal):
    assert DigitsConfig().ltp.target_compression
    for words in ([f"--ltp.{goal.replace('_', '-')}=0.5"], [f"--ltp.{goal}", "0.5"]):
        words = [word.replace("0.5", "5") if goal == "target_macs" else word for word in words]
        ltp = parse({"digits": DigitsConfig()}, "", words).ltp
        assert getattr(ltp, goal) in (0.5, 5)
        assert ltp.target_compression is None


def test_help_names_every_nested_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(PRESETS, "What it does.", ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in ("--arch", "--workdir", "--data-dir", "--train.epochs", "--ltp.t0", "--mesh.fsdp", "What it does."):
        assert option in out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("why"), 2),
        (DataError("why"), 1),
        (TrailError("why"), 1),
        (RunError("why"), 1),
        (OSError(28, "No space left on device", "why"), 1),
    ],
)
def test_users_mistake_is_one_message_and_an_exit_code(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err.startswith("error: why")
    assert "Traceback" not in err


TINY = [
    "--pretrain.epochs=2",
    "--pretrain.batch-size=128",
    "--pretrain.warmup-epochs=0",
    "--pretrain.learning-rate=0.1",
    "--train.epochs=2",
    "--train.batch-size=96",
    "--train.warmup-epochs=0",
    "--train.learning-rate=0.05",
]
TO_PENALTY = ["--ltp.penalty=20", "--ltp.learn=0.5", "--ltp.reach=1.5"]


def test_one_and_eight_devices_agree(finished, tmp_path):
    # To a target: where a penalty begins, Adam follows the sign of gradients that are next to nothing, and rounding
    # alone decides how far a threshold goes. So it does at four times the rate: 5e-3 to 9e-3 of the loss were seen.
    target = ["--ltp.target-compression=8", "--train.learning-rate=0.005"]
    words = [*TINY, f"--dense={finished / 'dense'}", *target]
    assert jax.device_count() == 1
    one = start(parse({"digits": DigitsConfig()}, "", [f"--workdir={tmp_path / '1'}", *words])).entries
    program, devices = ("-m", "experiments.digits"), "--xla_force_host_platform_device_count=8"
    done = run_python(*program, f"--workdir={tmp_path / '8'}", *words, XLA_FLAGS=devices)
    assert done.returncode == 0, done.stderr
    eight = Trail(tmp_path / "8").entries
    for a, b in zip(one, eight, strict=True):
        # Sums in another order; mostly they make 1e-6 of the loss.
        assert (b.train_loss or 0) == pytest.approx(a.train_loss or 0, rel=5e-3)
        assert b.compression == pytest.approx(a.compression, rel=1e-2)
        assert b.thresholds == pytest.approx(a.thresholds, rel=1e-2)
        # Half pruned after so short a training, many images lie at the border of two classes: 3.0 was seen once.
        assert b.top1 == pytest.approx(a.top1, abs=5)
    assert eight[-1].compression == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_batch_that_devices_cannot_share_is_refused(tmp_path, monkeypatch, stage):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    config = tiny(tmp_path / "run", **{stage: TrainConfig(epochs=1, batch_size=100, learning_rate=0.1)})
    with pytest.raises(ConfigError, match=rf"^--{stage}.batch-size is 100; accepted are multiples of the 8 devices$"):
        start(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interrupt_ends_a_run_with_one_message(tmp_path, swallowed):
    """Ctrl-C in a step, whose computation goes on in the background, or in a callback that cannot be interrupted."""
    code = (
        "import gc, os, signal, sys, time\n"
        "from experiments import digits\n"
        "from experiments.ending import run_command\n"
        "from experiments.data.in_memory import InMemoryDataset\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "train = InMemoryDataset.train\n"
        "def interrupt(*args):\n"
        "    gc.callbacks.clear()\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "def interrupted(*args, **options):\n"
        "    for i, batch in enumerate(train(*args, **options)):\n"
        "        if i == 3:\n"
        f"            gc.callbacks.append(interrupt) if {swallowed} else interrupt()\n"
        "            gc.collect()\n"
        "        yield batch\n"
        "InMemoryDataset.train = interrupted\n"
        "run_command(digits.main)\n"
    )
    done = run_python("-c", code, f"--workdir={tmp_path / 'run'}", "--pretrain.epochs=1000", timeout=300)
    assert done.returncode == 130, done.stderr
    told = [line for line in done.stderr.splitlines() if not re.match(r"[IWEF]\d{4} ", line)]  # XLA logs, too
    assert told == ["error: interrupted; the same command goes on from the last saved state"]


def test_full_disk_is_one_message_and_loses_nothing(finished, tmp_path):
    """No file may grow beyond 60 kB: configuration and log fit, the checkpoint of the network does not."""
    code = (
        "import resource, signal, runpy, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "sys.argv = ['digits', *sys.argv[1:]];"
        "runpy.run_module('experiments.digits', run_name='__main__', alter_sys=True)"
    )
    words = [f"--workdir={tmp_path / 'run'}", f"--dense={finished / 'dense'}", *TINY, *TO_PENALTY]
    # What it compiles is not kept for other tests: that would be cut off as well.
    done = run_python("-c", code, *words, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1e9")
    assert done.returncode == 1
    assert sum(line.startswith("error: cannot write to") for line in done.stderr.splitlines()) == 1
    assert "what was saved before is whole" in done.stderr
    # With room again, the same options lead on to the end.
    trail = start(parse({"digits": DigitsConfig()}, "", words))
    assert trail.epochs == (0, 1, 2)


def test_nothing_happens_at_import():
    """Importing the library starts no backend, of which there is none here, and prints nothing."""
    code = (
        "import importlib, pkgutil, ltp_jax\n"
        "names = {module.name for module in pkgutil.walk_packages(ltp_jax.__path__, 'ltp_jax.')}\n"
        "assert names >= {'ltp_jax.trail', 'ltp_jax.models.resnet'}\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
    )
    done = run_python("-c", code, timeout=300, JAX_PLATFORMS="none")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_step_is_traced_once_in_a_run_and_held_out_images_are_read_once_an_entry(finished, tmp_path, monkeypatch):
    traced, dataset = [], Counting(digits())
    make = trainer.make_train_step

    def counting(*args):
        step = make(*args)

        def train_step(state, batch):
            traced.append(jax.tree.structure(state))
            return step(state, batch)

        return train_step

    monkeypatch.setattr(trainer, "make_train_step", counting)
    trail = start(tiny(tmp_path, dense=finished / "dense"), dataset)
    assert len(traced) == 1
    assert dataset.evaluations == len(trail.epochs)
    # The dense network of another run was taken, and comes to the same.
    assert trail.entries == Trail(finished).entries
    assert not (tmp_path / "dense").exists()
