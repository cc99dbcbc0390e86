"""MobileNetV2 (Sandler et al., arXiv 1801.04381)."""

import dataclasses

import flax.linen as nn

from ltp_jax.models.inverted_residual import InvertedResidualNet, Stage, round_channels, scale
from ltp_jax.models.spec import NetworkSpec

_STAGES = tuple(
    dataclasses.replace(stage, activation=nn.relu6)
    for stage in (
        Stage(1, features=16, repeats=1, strides=1, expansion=1),
        Stage(2, features=24, repeats=2, strides=2, expansion=6),
        Stage(3, features=32, repeats=3, strides=2, expansion=6),
        Stage(4, features=64, repeats=4, strides=2, expansion=6),
        Stage(5, features=96, repeats=3, strides=1, expansion=6),
        Stage(6, features=160, repeats=3, strides=2, expansion=6),
        Stage(7, features=320, repeats=1, strides=1, expansion=6),
    )
)


def _row(name: str, width: float, parameters: int) -> NetworkSpec:
    options = {
        "stages": scale(_STAGES, width),
        "stem_features": round_channels(32 * width),
        "head_features": round_channels(1280 * max(1.0, width)),
        "activation": nn.relu6,
    }
    return NetworkSpec(name, InvertedResidualNet, options, 224, parameters)


NETWORKS = (
    _row("mobilenet_v2", 1.0, 3_504_872),
    _row("mobilenet_v2_035", 0.35, 1_677_128),
    _row("mobilenet_v2_050", 0.5, 1_968_680),
    _row("mobilenet_v2_075", 0.75, 2_636_424),
    _row("mobilenet_v2_140", 1.4, 6_108_776),
)
