"""EfficientNet (Tan and Le, arXiv 1905.11946), and EfficientNet-Lite without squeeze-and-excitation and with ReLU6."""

import dataclasses

import flax.linen as nn

from ltp_jax.models.inverted_residual import InvertedResidualNet, Stage, round_channels, scale
from ltp_jax.models.spec import NetworkSpec

_STAGES = tuple(
    dataclasses.replace(stage, squeeze=0.25, activation=nn.silu)
    for stage in (
        Stage(1, features=16, repeats=1, strides=1, expansion=1),
        Stage(2, features=24, repeats=2, strides=2, expansion=6),
        Stage(3, features=40, repeats=2, strides=2, expansion=6, kernels=(5,)),
        Stage(4, features=80, repeats=3, strides=2, expansion=6),
        Stage(5, features=112, repeats=3, strides=1, expansion=6, kernels=(5,)),
        Stage(6, features=192, repeats=4, strides=2, expansion=6, kernels=(5,)),
        Stage(7, features=320, repeats=1, strides=1, expansion=6),
    )
)
_LITE_STAGES = tuple(dataclasses.replace(stage, squeeze=0.0, activation=nn.relu6) for stage in _STAGES)


def _row(
    name: str, width: float, depth: float, input_size: int, dropout_rate: float, parameters: int, stages=_STAGES
) -> NetworkSpec:
    options = {
        "stages": scale(stages, width, depth),
        "stem_features": round_channels(32 * width),
        "head_features": round_channels(1280 * width),
        "activation": stages[0].activation,
        "dropout_rate": dropout_rate,
        "drop_path_rate": 0.2,
    }
    return NetworkSpec(name, InvertedResidualNet, options, input_size, parameters)


NETWORKS = (
    _row("efficientnet_b0", 1.0, 1.0, 224, 0.2, 5_288_548),
    _row("efficientnet_b1", 1.0, 1.1, 240, 0.2, 7_794_184),
    _row("efficientnet_b2", 1.1, 1.2, 260, 0.3, 9_109_994),
    _row("efficientnet_b3", 1.2, 1.4, 300, 0.3, 12_233_232),
    _row("efficientnet_b4", 1.4, 1.8, 380, 0.4, 19_341_616),
    _row("efficientnet_lite0", 1.0, 1.0, 224, 0.2, 4_652_008, _LITE_STAGES),
)
