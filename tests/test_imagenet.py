"""The ImageNet command on photographs: pretrained weights, training, trail, resume, a new head, and its refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import imagenet
from experiments.config import ConfigError, parse
from ltp_jax import models
from ltp_jax.models.torch_names import torch_names
from ltp_jax.pretrained import _template, _torch_shape
from ltp_jax.trail import Trail

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LTP_DATA_DIR", ROOT.parent / "shared" / "tfds"))
needs_photographs = pytest.mark.skipif(
    not (DATA / "imagenet2012").is_dir(), reason=f"no photographs in {DATA}: set LTP_DATA_DIR to a TFDS directory"
)


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "experiments.imagenet", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def weights_file(arch, path, naming="torchvision"):
    """Weights of random numbers under the names and in the layout of PyTorch."""
    template = _template(arch, None)
    rng = np.random.default_rng(0)
    tensors = {}
    for key, name in torch_names(arch, naming, template).items():
        shape = _torch_shape(key, template[key])
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.0
        offset = 1.0 if key.endswith(("scale", "var")) else 0.0
        tensors[name] = np.float32(offset + scale * rng.normal(size=shape))
    save_file(tensors, path)
    return path


@needs_photographs
def test_resnet50_from_pretrained_weights_to_trail_and_on_after_an_interruption(tmp_path):
    """Two epochs at 32 pixels: the second start finds the first epoch's state and ends the run."""
    weights = weights_file("resnet50", tmp_path / "resnet50.safetensors")
    words = [
        "--arch=resnet50",
        f"--pretrained={weights}",
        f"--data-dir={DATA}",
        f"--workdir={tmp_path / 'run'}",
        "--image-size=32",
        "--workers=0",
        "--train.batch-size=64",
        "--train.epochs=2",
        "--ltp.target-compression=5",
    ]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    trail = Trail(tmp_path / "run")
    assert [e.step for e in trail.entries] == [0, 4, 8]
    assert trail.entries[-1].compression == pytest.approx(5, rel=0.01)
    assert trail.entries[0].compression == 1
    # Entry 0 is the network of the file.
    head = trail.restore(trail.dense)["params"]["head"]["kernel"]
    assert head.shape == (2048, 1000)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["learning_rate"] == pytest.approx(0.02 * 64 / 256)
    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert Trail(tmp_path / "run").entries == trail.entries
    assert "prune: goes on from step 8" in (tmp_path / "run" / "log.txt").read_text()
    # Another run may take its dense network, and knows from it what images the weights want.
    assert config["origin"] == "torchvision"
    other = dataclasses.replace(imagenet.PRESETS["resnet50"], dense=tmp_path / "run" / "dense")
    assert imagenet.dense_settings(other).origin == "torchvision"


@needs_photographs
def test_other_dataset_gets_a_new_head_and_training_before_pruning(tmp_path):
    weights = weights_file("mobilenet_v2_050", tmp_path / "w.safetensors", naming="timm")
    done = command(
        "--arch=mobilenet_v2_050",
        f"--pretrained={weights}",
        "--dataset=clothing_small",
        f"--data-dir={DATA}",
        f"--workdir={tmp_path / 'run'}",
        "--image-size=32",
        "--workers=0",
        "--pretrain.epochs=1",
        "--pretrain.warmup-epochs=0",
        "--pretrain.batch-size=1024",
        "--train.epochs=1",
        "--train.warmup-epochs=0",
        "--train.batch-size=1024",
        "--ltp.target-compression=3",
    )
    assert done.returncode == 0, done.stderr
    trail = Trail(tmp_path / "run")
    assert trail.restore(trail.dense)["params"]["head"]["kernel"].shape[-1] == 10
    assert trail.entries[-1].compression == pytest.approx(3, rel=0.01)


def test_a_dense_network_of_unknown_origin_is_refused(tmp_path):
    config = dataclasses.replace(imagenet.PRESETS["resnet50"], dense=tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"--origin is missing: .*config.json .* torchvision, torchvision-v2"):
        imagenet.dense_settings(config)
    for text in ("{", "[]", "{}", '{"origin": null}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="--origin is missing"):
            imagenet.dense_settings(config)
    (tmp_path / "config.json").write_text('{"origin": "torchvision-v2"}')
    assert imagenet.dense_settings(config).interpolation == "bilinear"
    assert imagenet.dense_settings(config).origin == "torchvision-v2"


def test_dry_run_needs_neither_data_nor_weights(tmp_path):
    done = command("--arch=resnet50", "--dry-run", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert found["parameters"] == 25_557_032
    assert "25,557,032" in done.stdout
    assert "stem/conv/kernel" in done.stdout


def test_missing_weights_are_explained():
    with pytest.raises(ConfigError, match=r"--pretrained is missing(.|\n)*safetensors.torch.save_file"):
        parse(imagenet.PRESETS, "", ["--arch=resnet50"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v5e:4x4", "--pretrained=w"], "--topology .* goes with --dry-run"),
        (["--pretrained=w", "--train.from-scratch"], "exclude each other"),
        (["--pretrained=w", "--image-size=8"], "--image-size is 8"),
        (["--pretrained=w", "--workers=-1"], "--workers is -1"),
        (
            ["--pretrained=w", "--ltp.target-compression=0.5"],
            "--ltp.target-compression is 0.5; accepted is more than 1",
        ),
        (["--pretrained=w", "--ltp.target-macs=4"], "--ltp.target-compression and --ltp.target-macs exclude"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(imagenet.PRESETS, "", words)


def test_weights_that_cannot_be_read_are_one_message(tmp_path):
    done = command(
        "--arch=resnet50", f"--pretrained={tmp_path / 'absent.safetensors'}", f"--workdir={tmp_path / 'run'}"
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "absent.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_origin_is_refused_with_the_known_ones():
    config = parse(imagenet.PRESETS, "", ["--arch=resnet50", "--pretrained=w", "--origin=elsewhere"])
    with pytest.raises(ConfigError, match="accepted for resnet50 are torchvision, torchvision-v2, timm"):
        imagenet.weight_settings(config)


def test_every_network_has_a_preset_and_weights_that_are_known():
    for arch, preset in imagenet.PRESETS.items():
        assert preset.arch == arch
        assert models.spec(arch).num_classes == 1000
        imagenet.weight_settings(preset)
