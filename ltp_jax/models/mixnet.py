"""MixNet (Tan and Le, *MixConv*, arXiv 1907.09595)."""

import functools

import flax.linen as nn

from ltp_jax.models.inverted_residual import InvertedResidualNet, Stage, round_channels, scale
from ltp_jax.models.spec import NetworkSpec

_Swish = functools.partial(Stage, activation=nn.silu)

# Arguments of a row: stage, output channels, repeats, stride, expansion.
_SMALL = (
    Stage(1, 16, 1, 1, 1),
    Stage(2, 24, 1, 2, 6, expand_groups=2, project_groups=2),
    Stage(2, 24, 1, 1, 3, expand_groups=2, project_groups=2),
    _Swish(3, 40, 1, 2, 6, kernels=(3, 5, 7), squeeze=0.5),
    _Swish(3, 40, 3, 1, 6, kernels=(3, 5), squeeze=0.5, expand_groups=2, project_groups=2),
    _Swish(4, 80, 1, 2, 6, kernels=(3, 5, 7), squeeze=0.25, project_groups=2),
    _Swish(4, 80, 2, 1, 6, kernels=(3, 5), squeeze=0.25, project_groups=2),
    _Swish(5, 120, 1, 1, 6, kernels=(3, 5, 7), squeeze=0.5, expand_groups=2, project_groups=2),
    _Swish(5, 120, 2, 1, 3, kernels=(3, 5, 7, 9), squeeze=0.5, expand_groups=2, project_groups=2),
    _Swish(6, 200, 1, 2, 6, kernels=(3, 5, 7, 9, 11), squeeze=0.5),
    _Swish(6, 200, 2, 1, 6, kernels=(3, 5, 7, 9), squeeze=0.5, project_groups=2),
)
_MEDIUM = (
    Stage(1, 24, 1, 1, 1),
    Stage(2, 32, 1, 2, 6, kernels=(3, 5, 7), expand_groups=2, project_groups=2),
    Stage(2, 32, 1, 1, 3, expand_groups=2, project_groups=2),
    _Swish(3, 40, 1, 2, 6, kernels=(3, 5, 7, 9), squeeze=0.5),
    _Swish(3, 40, 3, 1, 6, kernels=(3, 5), squeeze=0.5, expand_groups=2, project_groups=2),
    _Swish(4, 80, 1, 2, 6, kernels=(3, 5, 7), squeeze=0.25),
    _Swish(4, 80, 3, 1, 6, kernels=(3, 5, 7, 9), squeeze=0.25, expand_groups=2, project_groups=2),
    _Swish(5, 120, 1, 1, 6, squeeze=0.5),
    _Swish(5, 120, 3, 1, 3, kernels=(3, 5, 7, 9), squeeze=0.5, expand_groups=2, project_groups=2),
    _Swish(6, 200, 1, 2, 6, kernels=(3, 5, 7, 9), squeeze=0.5),
    _Swish(6, 200, 3, 1, 6, kernels=(3, 5, 7, 9), squeeze=0.5, project_groups=2),
)


def _row(
    name: str, stages: tuple[Stage, ...], stem: int, width: float, dropout_rate: float, parameters: int
) -> NetworkSpec:
    options = {
        "stages": scale(stages, width),
        "stem_features": round_channels(stem * width),
        "head_features": 1536,
        "dropout_rate": dropout_rate,
    }
    return NetworkSpec(name, InvertedResidualNet, options, 224, parameters)


NETWORKS = (
    _row("mixnet_s", _SMALL, 16, 1.0, 0.2, 4_134_606),
    _row("mixnet_m", _MEDIUM, 24, 1.0, 0.25, 5_014_382),
    _row("mixnet_l", _MEDIUM, 24, 1.3, 0.25, 7_329_252),
)
