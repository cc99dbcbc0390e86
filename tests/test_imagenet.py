"""The ImageNet command on photographs: pretrained weights, training, trail, resume, a new head, and its refusals."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import imagenet, imagenet_config, imagenet_weights
from experiments.config import parse
from experiments.data.digits import digits
from experiments.dry_run import activation_bytes
from experiments.ending import CONFIG_ERROR, START_AGAIN
from experiments.options import ConfigError
from experiments.record import record, to_json
from ltp_jax import models, pretrained
from ltp_jax.trail import Trail
from tests.commands import ROOT, run_python
from tests.data.making import make_photos, write_dataset
from tests.models.filling import fill_state_dict

IMAGES = {"training": 1000, "held out": 100, "classes": 10}

# The command, which sends SIGTERM to itself with the training batch before the step that the environment says.
STOPPED = """
import os, signal
from experiments import imagenet
from experiments.data.photographs import PhotographDataset
from experiments.ending import run_command

train = PhotographDataset.train

def stopped(self, batch_size, *, start_step=0, **options):
    for step, batch in enumerate(train(self, batch_size, start_step=start_step, **options), start_step + 1):
        if step == int(os.environ["LTP_STEP"]):
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch

PhotographDataset.train = stopped
run_command(imagenet.main)
"""


@pytest.fixture
def command(monkeypatch):
    """The command in this process, which JAX would not let join a job any more."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["imagenet.py", *words])
        monkeypatch.setattr(imagenet, "initialize", lambda config: None)
        imagenet.main()

    return run


def test_resnet18_from_pretrained_weights_to_trail_and_on_after_an_interruption(data_dir, tmp_path, command):
    """Two epochs of four steps at 32 pixels: the first start is stopped within the second, the next ends the run."""
    weights = tmp_path / "resnet18.safetensors"
    save_file(fill_state_dict("resnet18"), weights)
    words = [
        "--arch=resnet18",
        f"--pretrained={weights}",
        f"--data-dir={data_dir}",
        f"--workdir={tmp_path / 'run'}",
        "--image-size=32",
        "--workers=0",
        "--train.batch-size=64",
        "--train.epochs=2",
        "--ltp.target-compression=5",
    ]
    stopped = run_python("-c", STOPPED, *words, LTP_STEP="6")
    assert stopped.returncode == START_AGAIN, stopped.stderr
    assert Trail(tmp_path / "run").epochs == (0, 1)
    command(*words)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "asked to stop: step 6 of prune is saved" in log
    assert "prune: goes on from step 6" in log
    assert "weights: resnet18 of torchvision (IMAGENET1K_V1): the middle 224 px of images resized to 256" in log
    assert "are of torchvision or timm; torchvision is assumed, --origin says it" in log
    trail = Trail(tmp_path / "run")
    assert [e.step for e in trail.entries] == [0, 4, 8]
    assert trail.entries[-1].compression == pytest.approx(5, rel=0.01)
    assert trail.entries[0].compression == 1
    for by_path in (trail.entries[-1].densities, trail.entries[-1].thresholds):  # in the order of their use
        assert [next(iter(by_path)), next(reversed(by_path))] == ["stem/conv/kernel", "head/kernel"]
    # Entry 0 is the network of the file.
    head = trail.restore(trail.dense)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(head, fill_state_dict("resnet18")["fc.weight"].T)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["learning_rate"] == 0.02  # as the user has it, for 256 images
    # Another run may take its dense network, and knows from it what images the weights want.
    assert config["origin"] == "torchvision"
    other = dataclasses.replace(imagenet_config.PRESETS["resnet18"], dense=tmp_path / "run" / "dense")
    assert imagenet_weights.dense_settings(other).origin == "torchvision"


def test_other_dataset_gets_a_new_head_and_training_before_pruning(tmp_path, command):
    """One of three classes, with two steps in each stage."""
    weights = tmp_path / "w.safetensors"
    save_file(fill_state_dict("resnet18"), weights)
    photos = make_photos()
    write_dataset(tmp_path, "tiny", {"train": photos, "test": photos[:10]})
    command(
        "--arch=resnet18",
        f"--pretrained={weights}",
        "--dataset=tiny",
        f"--data-dir={tmp_path}",
        f"--workdir={tmp_path / 'run'}",
        "--image-size=32",
        "--workers=0",
        "--pretrain.epochs=1",
        "--pretrain.warmup-epochs=0",
        "--pretrain.batch-size=8",
        "--train.epochs=1",
        "--train.warmup-epochs=0",
        "--train.batch-size=8",
        "--ltp.target-compression=3",
    )
    trail = Trail(tmp_path / "run")
    assert trail.restore(trail.dense)["params"]["head"]["kernel"].shape[-1] == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"pretrain", "prune"}
    assert trail.entries[-1].compression == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize(
    ("name", "split", "size", "expected"),
    [
        ("imagenet2012", None, None, 76.13),
        ("imagenet2012:5.1.0", "validation", 224, 76.13),
        ("imagenet2012", "train[:50]", None, None),
        ("imagenet2012_subset", None, None, None),
        ("imagenet2012", None, 160, None),
    ],
)
def test_a_network_is_held_to_what_was_published_on_the_same_images(tmp_path, monkeypatch, name, split, size, expected):
    (settings,) = (row for row in pretrained.settings("resnet50") if row.origin == "torchvision")
    monkeypatch.setattr(pretrained, "load", lambda *args, **options: ({}, settings))
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    config = dataclasses.replace(
        imagenet_config.PRESETS["resnet50"], origin="torchvision", eval_split=split, image_size=size
    )
    dataset = dataclasses.replace(digits(), name=name, num_classes=1000)
    begin = imagenet_weights.start_from(imagenet_weights.read_weights(path, config), config, dataset)
    assert (begin.trained, begin.expected_top1) == (True, expected)
    assert begin.digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_a_dense_network_of_unknown_origin_is_refused(tmp_path):
    config = dataclasses.replace(imagenet_config.PRESETS["resnet50"], dense=tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"--origin is missing: .*config.json .* torchvision, torchvision-v2"):
        imagenet_weights.dense_settings(config)
    for text in ("{", "[]", "{}", '{"origin": null}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="--origin is missing"):
            imagenet_weights.dense_settings(config)
    (tmp_path / "config.json").write_text('{"origin": "timm-lite"}')
    with pytest.raises(ConfigError, match=r"--dense began from weights of timm-lite, by .*; of resnet50"):
        imagenet_weights.dense_settings(config)
    (tmp_path / "config.json").write_text('{"origin": "torchvision-v2"}')
    assert imagenet_weights.dense_settings(config).interpolation == "bilinear"
    assert imagenet_weights.dense_settings(config).origin == "torchvision-v2"


def test_dry_run_needs_neither_data_nor_weights(tmp_path, command, capsys):
    command("--arch=resnet50", "--dry-run", f"--workdir={tmp_path}")
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert found["parameters"] == 25_557_032
    told = capsys.readouterr().out
    assert "25,557,032" in told
    assert "stem/conv/kernel" in told


def test_dry_run_says_that_it_cannot_write_before_it_computes(command, capsys):
    with pytest.raises(
        ConfigError, match=r"^--workdir is /proc/a/dry_run\.json, which cannot be written: No such file"
    ):
        command("--arch=resnet18", "--dry-run", "--workdir=/proc/a")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("workers", [[], ["--workers=0"]])
def test_every_process_says_which_cores_it_has(tmp_path, monkeypatch, command, workers):
    """One that was told a number of workers, too: those that were not ask all."""

    def asked():
        raise InterruptedError

    monkeypatch.setattr(imagenet, "sharers_of_cores", asked)
    with pytest.raises(InterruptedError):
        command("--from-scratch", f"--data-dir={tmp_path}", f"--workdir={tmp_path}", *workers)


def test_dry_run_counts_the_dataset_that_is_named(data_dir, tmp_path, command, capsys):
    command("--dry-run", f"--workdir={tmp_path}", "--dataset=clothing_small", f"--data-dir={data_dir}")
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert (found["train_size"], found["steps_per_epoch"]) == (3068, 2)
    assert found["parameters"] == 25_557_032 - 990 * 2049  # a head of ten classes
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "classes", "trained"),
    [
        ([], 1000, False),
        (["--from-scratch"], 1000, True),
        (["--pretrained=w"], 10, True),
        (["--dense=d"], 10, False),
    ],
)
def test_dry_run_looks_at_the_training_of_the_dense_network_where_there_is_one(
    tmp_path, monkeypatch, command, words, classes, trained
):
    monkeypatch.setattr(imagenet, "dry_run_counts", lambda config: (500, classes, None))
    words = [*words, "--dry-run", "--train.batch-size=64", "--pretrain.batch-size=512", "--arch=resnet18"]
    if trained:
        with pytest.raises(ConfigError, match=r"^--pretrain.batch-size is 512; the dataset has 500 images$"):
            command(*words, f"--workdir={tmp_path}")
    else:
        command(*words, f"--workdir={tmp_path}")
    assert (tmp_path / "dry_run.json").exists() != trained


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["--pretrained=efficientnet_b4-7eb33cd5.safetensors"], 320),  # timm's, by the digest in its name
        (["--pretrained=efficientnet_b4.safetensors"], 380),
        (["--pretrained=efficientnet_b4.safetensors", "--origin=timm"], 320),
        (["--dense={tmp_path}/dense"], 320),
        (["--dense={tmp_path}/not_yet"], 380),
        (["--pretrained={tmp_path}/w.safetensors"], 320),  # by what is in it
        ([], 380),
    ],
)
def test_dry_run_is_of_the_images_that_the_weights_want(tmp_path, monkeypatch, command, words, size):
    looked = []
    monkeypatch.setattr(imagenet.dry_run, "report", lambda *args, image_size, **rest: looked.append(image_size))
    (tmp_path / "config.json").write_text('{"origin": "timm"}')
    (tmp_path / "dense").mkdir()
    (timm,) = (row for row in pretrained.settings("efficientnet_b4") if row.origin == "timm")
    (tmp_path / "w.safetensors").touch()
    monkeypatch.setattr(pretrained, "load", lambda *args, **options: ({}, timm))
    command("--arch=efficientnet_b4", "--dry-run", *(word.format(tmp_path=tmp_path) for word in words))
    assert looked == [size]


def test_dry_run_refuses_a_dense_network_that_the_run_would_refuse(tmp_path, command):
    (tmp_path / "dense").mkdir()
    with pytest.raises(ConfigError, match=r"^--dense is .*/dense, which holds no network of this project; accepted"):
        command("--arch=alexnet", "--dry-run", f"--workdir={tmp_path}", f"--dense={tmp_path}/dense")
    assert not (tmp_path / "dry_run.json").exists()


def test_dry_run_says_that_counts_are_assumed(tmp_path):
    config = dataclasses.replace(imagenet_config.PRESETS["resnet50"], dataset="of_nobody", data_dir=str(tmp_path))
    images, classes, note = imagenet.dry_run_counts(config)
    assert (images, classes) == (1_281_167, 1000)
    assert note is not None
    assert "'of_nobody'" in note
    assert note.endswith("ImageNet's 1,281,167 images and 1,000 classes are assumed above.")
    assert imagenet.dry_run_counts(imagenet_config.PRESETS["resnet50"]) == (1_281_167, 1000, None)


@pytest.mark.parametrize("arch", ["alexnet", "resnet50", "mobilenet_v2", "efficientnet_b0", "mixnet_s"])
def test_memory_is_estimated_from_above(arch):
    """Beside the TPU compiler's peak for 256 images of 224×224 a chip."""
    rows = json.loads((ROOT / "experiments/results/lean_step_compile.json").read_text())
    (peak,) = (row["peak_bytes"] for row in rows if (row["arch"], row["method"]) == (arch, "target"))
    module = models.create(arch, dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    # Weights, momentum and gradients, and images of bytes.
    fixed = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    estimate = fixed + 256 * (activation_bytes(module, (224, 224, 3)) + 224 * 224 * 3)
    assert 1 <= estimate / peak < 2.1


def test_missing_weights_are_explained():
    with pytest.raises(ConfigError, match=r"--pretrained is missing(.|\n)*safetensors.torch.save_file") as told:
        parse(imagenet_config.PRESETS, "", ["--arch=resnet50"])
    text = str(told.value)
    assert 'model = torchvision.models.get_model("resnet50", weights="IMAGENET1K_V1")' in text
    assert 'get_model("resnet50", weights="IMAGENET1K_V2"): resnet50-11ad3fa6.safetensors' in text
    assert 'create_model("resnet50.a1_in1k", pretrained=True): resnet50-timm.safetensors, with --origin=timm' in text


@pytest.mark.parametrize("arch", imagenet_config.PRESETS)
def test_weights_saved_as_explained_are_known_by_their_name(arch):
    """Whichever weights a user saves, the file's name or the option that goes with it says which they are."""
    text = imagenet_config.where_weights_come_from(arch)
    first, *rest = (row for row in pretrained.settings(arch) if row.naming != "efficientnet_pytorch")
    for row in (first, *rest):
        assert f'"{row.release}"' in text
        name = f"{arch}-{row.digest or row.origin}.safetensors"
        assert name in text
        told_by_option = f"{name}, with --origin={row.origin}" in text
        assert told_by_option or pretrained.alternatives(name, row) == ()


def test_learning_rate_grows_with_the_batch_and_is_recorded_as_typed(tmp_path):
    words = ["--pretrained=w", f"--workdir={tmp_path}", "--train.batch-size=512", "--train.learning-rate=0.03"]
    config = parse(imagenet_config.PRESETS, "", words)
    assert config.train.peak_learning_rate == pytest.approx(0.06)
    record(config, images=IMAGES)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["learning_rate"] == 0.03
    (tmp_path / "dense").mkdir()
    with pytest.raises(ConfigError, match=r"--train\.learning-rate was 0\.03, is 0\.02\."):
        record(parse(imagenet_config.PRESETS, "", words[:-1]), images=IMAGES)


def test_what_does_not_change_the_numbers_may_change_on_resuming(tmp_path):
    config = dataclasses.replace(imagenet_config.PRESETS["resnet50"], workdir=tmp_path, pretrained=Path("a"))
    record(config, weights="1a", images=IMAGES)
    (tmp_path / "dense").mkdir()
    record(dataclasses.replace(config, workers=3, max_unreadable=7, dry_run_timeout=1.0), weights="1a", images=IMAGES)
    moved = dataclasses.replace(config, pretrained=Path("b"))
    record(moved, weights="1a", images=IMAGES)  # the same file elsewhere
    with pytest.raises(ConfigError, match="holds a run with other options or data: --pretrained has other weights now"):
        record(moved, weights="2b", images=IMAGES)
    assert json.loads((tmp_path / "config.json").read_text()) == to_json(moved) | {"images": IMAGES, "weights": "1a"}
    with pytest.raises(ConfigError, match="--origin was None, is torchvision-v2"):
        record(dataclasses.replace(moved, origin="torchvision-v2"), weights="1a", images=IMAGES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v5e:4x4", "--pretrained=w"], "--topology .* goes with --dry-run"),
        (["--pretrained=w", "--from-scratch"], "^--pretrained and --from-scratch exclude each other"),
        (["--pretrained=w", "--dense=d"], "^--dense and --pretrained exclude each other"),
        (["--pretrained=w", "--image-size=8"], "--image-size is 8; accepted is at least 32 for resnet50"),
        (["--dry-run", "--arch=alexnet", "--image-size=62"], "--image-size is 62; accepted is at least 63 for alexnet"),
        (["--pretrained=w", "--max-unreadable=-1"], "--max-unreadable is -1; accepted is 0 or more"),
        (
            ["--dry-run", "--topology=v5e:4x4", "--dry-run-timeout=0"],
            "--dry-run-timeout is 0.0; accepted is more than 0",
        ),
        (["--dry-run", "--dry-run-timeout=9"], "^--dry-run-timeout is that of a compilation; it goes with --topology$"),
        (
            ["--dry-run", "--topology=v5e:4x4", "--dry-run-timeout=inf"],
            "--dry-run-timeout is inf; accepted is more than 0, and finite",
        ),
        (["--pretrained=w", "--workers=-1"], "--workers is -1"),
        (["--pretrained=gs://bucket/w.pth"], "^--pretrained is gs:/bucket/w.pth; accepted is a path of this machine"),
        (
            ["--pretrained=w", "--ltp.target-compression=0.5"],
            "--ltp.target-compression is 0.5; accepted is more than 1",
        ),
        (["--pretrained=w", "--ltp.target-macs=4", "--ltp.penalty=1"], "--ltp.penalty and --ltp.target-macs exclude"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(imagenet_config.PRESETS, "", words)


def test_weights_that_cannot_be_read_are_one_message(tmp_path):
    words = "--arch=resnet50", f"--pretrained={tmp_path / 'absent.safetensors'}", f"--workdir={tmp_path / 'run'}"
    done = run_python("-m", "experiments.imagenet", *words)
    assert done.returncode == CONFIG_ERROR
    assert done.stderr == f"error: --pretrained is {tmp_path / 'absent.safetensors'}, which cannot be read: " + (
        "No such file or directory\n"
    )


def test_unknown_origin_is_refused_with_the_known_ones():
    config = parse(imagenet_config.PRESETS, "", ["--arch=resnet50", "--pretrained=w", "--origin=elsewhere"])
    with pytest.raises(ConfigError, match="accepted for resnet50 are torchvision, torchvision-v2, timm"):
        imagenet_weights.weight_settings(config)


def test_every_network_has_a_preset_and_weights_that_are_known():
    assert set(typing.get_args(imagenet_config.Arch)) == set(imagenet_config.PRESETS)
    for arch, preset in imagenet_config.PRESETS.items():
        assert preset.arch == arch
        assert models.spec(arch).num_classes == 1000
        imagenet_weights.weight_settings(preset)
